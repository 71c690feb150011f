"""silu(gate) · up of a stacked [T, 2 I] product (SwiGLU, Shazeer 2020)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _silu_mul(gate_up: tl.tensor, out: tl.tensor, row_stride: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * row_stride + at, mask=at < width, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + width + at, mask=at < width, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * width + at, (silu * up).to(dtype), mask=at < width)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 I] -> [T, I]; silu is rounded to the dtype before the product, as torch rounds it."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width)
    if tokens:
        _silu_mul[(tokens, triton.cdiv(width, _BLOCK))](gate_up, out, gate_up.stride(0), width, BLOCK=_BLOCK)
    return out
