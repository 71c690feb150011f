"""Residual addition in place and RMS norm (Zhang & Sennrich, 2019) in one reading of the row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rollout_server.kernels.triton.device import power_of_2

_TILE = 1024
"""Elements that a program should have at least: narrow rows (norms of single heads) share one."""


@triton.jit(do_not_specialize=["rows"])
def _add_norm(
    x: tl.tensor,
    delta: tl.tensor | None,
    weight: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    delta_stride: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    here = (row < rows) & (at < width)
    dtype = x.dtype.element_ty
    values = tl.load(x + row * x_stride + at, mask=here, other=0.0)
    if delta is not None:
        added = tl.load(delta + row * delta_stride + at, mask=here, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(dtype)
        tl.store(x + row * x_stride + at, values, mask=here)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
    normed = (wide * scale[:, None]).to(dtype).to(tl.float32)
    weights = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (normed * weights).to(dtype), mask=here)


def add_norm(x_TW: torch.Tensor, delta_TW: torch.Tensor | None, weight_W: torch.Tensor, eps: float) -> torch.Tensor:
    """x += delta in place, then x / rms(x) · weight: [T, W]. The norm sees the sum as it was rounded."""
    rows, width = x_TW.shape
    out = x_TW.new_empty(rows, width)
    block = power_of_2(width)
    rows_each = max(1, _TILE // block)
    if rows:
        _add_norm[(triton.cdiv(rows, rows_each),)](
            x_TW,
            delta_TW,
            weight_W,
            out,
            rows,
            width,
            x_TW.stride(0),
            0 if delta_TW is None else delta_TW.stride(0),
            eps,
            ROWS=rows_each,
            BLOCK=block,
            num_warps=min(16, max(4, block // 1024)),
        )
    return out
