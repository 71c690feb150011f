"""The Triton backend: `Kernels` as a module. Matrix products are cuBLAS's, weights stay in torch's layout.

The cache is the reference's too, [P, K, S, D]: a page of one head is one block of memory, which is what a program reads.
"""

from __future__ import annotations

import torch

from rollout_server.kernels.reference import allocate, linear, pack, unpack
from rollout_server.kernels.triton.add_norm import add_norm
from rollout_server.kernels.triton.attention import attention
from rollout_server.kernels.triton.lora import add_lora
from rollout_server.kernels.triton.rope_store import rope_store
from rollout_server.kernels.triton.sample import log_softmax_sample
from rollout_server.kernels.triton.silu_mul import silu_mul

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
