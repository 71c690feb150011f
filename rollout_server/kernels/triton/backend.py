"""The Triton backend: `Kernels` as a module. Matrix products are cuBLAS's, weights stay in torch's layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rollout_server.kernels.interface import LayerCache
from rollout_server.kernels.triton.add_norm import add_norm
from rollout_server.kernels.triton.attention import attention
from rollout_server.kernels.triton.lora import add_lora
from rollout_server.kernels.triton.rope_store import rope_store
from rollout_server.kernels.triton.sample import log_softmax_sample
from rollout_server.kernels.triton.silu_mul import silu_mul
from rollout_server.models.config import ModelConfig

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
invariant = False

# Sums are fp32, as `Kernels` promises: cuBLAS may otherwise add the parts of a split sum in bf16.
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def allocate(
    config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> list[LayerCache]:
    """Keys and values [P, K, S, D]: a page of one head is one block of memory, which is what a program reads."""
    shape = (pages, config.kv_heads, page_size, config.head_dim)
    return [
        LayerCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
        for _ in range(config.layers)
    ]


def pack(weight_NX: torch.Tensor) -> torch.Tensor:
    return weight_NX


def unpack(packed: torch.Tensor) -> torch.Tensor:
    return packed


def linear(x_TX: torch.Tensor, packed: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x_TX, packed, bias_N)
