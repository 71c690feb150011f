"""The paged memory for keys and values of every layer, on the worker's device."""

from __future__ import annotations

import torch

from rollout_server.kernels.interface import LayerCache
from rollout_server.models.config import ModelConfig


def allocate(config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype) -> list[LayerCache]:
    """One cache a layer, with one page more than the manager knows of: padding tokens write there."""
    rows, k, d = pages + 1, config.kv_heads, config.head_dim
    return [
        LayerCache(torch.zeros(rows, k, d, page_size, dtype=dtype), torch.zeros(rows, k, page_size, d, dtype=dtype))
        for _ in range(config.layers)
    ]
