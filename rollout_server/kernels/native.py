"""The decoder's operations in C (`cpu/attention.c`), called through ctypes on torch's own memory.

Results of a token depend on nothing but its own row, bit for bit: neither batch size nor chunked prefill nor prefix
hits change them. `load()` returns None where the extension was not built.
"""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache as once

import torch  # first: the extension resolves its OpenMP symbols against the runtime that torch brings

from rollout_server.kernels.interface import Batch, LayerCache

PAGE_SIZE = 16
"""Fixed by the memory layout."""


class NativeKernels:
    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._attention = library.lrl_attention
        self._attention.argtypes = [c_void_p] * 7 + [c_int64, c_int, c_int, c_int, c_float, c_int]
        self._attention.restype = c_int
        self._rope_store = library.lrl_rope_store
        self._rope_store.argtypes = [c_void_p] * 8 + [c_int64, c_int, c_int, c_int, c_int]
        self._rope_store.restype = None
        self._add_norm = library.lrl_add_norm
        self._add_norm.argtypes = [c_void_p] * 4 + [c_int64, c_int, c_float, c_int]
        self._add_norm.restype = None

    def add_norm(
        self, x_TW: torch.Tensor, delta_TW: torch.Tensor | None, weight_W: torch.Tensor, eps: float
    ) -> torch.Tensor:
        out = torch.empty_like(x_TW)
        tokens, width = x_TW.shape
        delta = None if delta_TW is None else delta_TW.data_ptr()
        self._add_norm(x_TW.data_ptr(), delta, weight_W.data_ptr(), out.data_ptr(), tokens, width, eps, _is_bf16(x_TW))
        return out

    def rope_store(
        self, qkv_TX: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], batch: Batch, cache: LayerCache, heads: int
    ) -> torch.Tensor:
        _, kv_heads, _, dim = cache.values.shape
        tokens = qkv_TX.shape[0]
        q = qkv_TX.new_empty(tokens, heads, dim)
        cos, sin = rope
        self._rope_store(
            qkv_TX.data_ptr(), q.data_ptr(), cache.keys.data_ptr(), cache.values.data_ptr(), cos.data_ptr(),
            sin.data_ptr(), batch.positions.data_ptr(), batch.slots.data_ptr(), tokens, heads, kv_heads, dim,
            _is_bf16(qkv_TX),
        )  # fmt: skip
        return q

    def attention(self, q_THD: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
        _, kv_heads, _, dim = cache.values.shape
        tokens, heads, _ = q_THD.shape
        out = torch.empty_like(q_THD)
        status = self._attention(
            q_THD.data_ptr(), cache.keys.data_ptr(), cache.values.data_ptr(), out.data_ptr(), batch.pages.data_ptr(),
            batch.table.data_ptr(), batch.lengths.data_ptr(), tokens, heads, kv_heads, dim, dim**-0.5, _is_bf16(q_THD),
        )  # fmt: skip
        if status:
            raise MemoryError("attention scores") if status == 1 else ValueError(f"head shape {heads, kv_heads, dim}")
        return out.view(tokens, heads * dim)


def supports(heads: int, kv_heads: int, dim: int) -> bool:
    """Shapes within the kernel's fixed buffers."""
    return dim % 16 == 0 and dim <= 256 and heads // kv_heads <= 16


@once
def load() -> NativeKernels | None:
    """The compiled kernels, or None when the extension was not built."""
    spec = importlib.util.find_spec("rollout_server.kernels.cpu._attention")
    return NativeKernels(ctypes.CDLL(spec.origin)) if spec is not None and spec.origin else None


def _is_bf16(tensor: torch.Tensor) -> int:
    if tensor.dtype not in (torch.bfloat16, torch.float32) or not tensor.is_contiguous():
        raise TypeError(f"native kernels take contiguous float32 or bfloat16, not {tensor.dtype}")
    return int(tensor.dtype is torch.bfloat16)
