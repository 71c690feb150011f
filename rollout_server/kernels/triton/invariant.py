"""The Triton backend in batch-invariant mode: a row has the same bits whatever the other rows are. Slower.

Matrix products are `matmul`'s. Attention has one tile shape for decode and prefill, neither splits a row's keys nor
joins rows over shared runs, so that the order of a token's sums follows from its own position alone: blocks of keys
that only other tokens of the tile see multiply its sums by one and add zero. The rest of `backend` is invariant as it is.
"""

from __future__ import annotations

import torch

from rollout_server.kernels.interface import Batch, LayerCache
from rollout_server.kernels.triton.attention import Tiling, attend, prefill_tile
from rollout_server.kernels.triton.backend import (
    add_lora,
    add_norm,
    allocate,
    log_softmax_sample,
    pack,
    rope_store,
    silu_mul,
    unpack,
)
from rollout_server.kernels.triton.matmul import matmul as linear

__all__ = [
    "add_lora",
    "add_norm",
    "allocate",
    "attention",
    "invariant",
    "linear",
    "log_softmax_sample",
    "name",
    "pack",
    "rope_store",
    "silu_mul",
    "unpack",
]

name = "triton"
invariant = True


def attention(q_THD: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
    """[T, H, D] -> [T, H * D]. `batch.runs` say only what could be shared; the rows' own tables hold the same pages."""
    tile = prefill_tile(q_THD.shape[1] // cache.keys.shape[1], q_THD.dtype)
    alone = batch._replace(runs=[])
    return attend(q_THD, alone, cache, Tiling(decode=False, tile=tile, splits=1, run_tile=tile, run_splits=1))
