"""x W^T in tiles of one shape, their products added in one order: a row's bits do not depend on the other rows.

cuBLAS picks tile shapes and splits of the sum by the number of rows, so that a token's logits change in the last bits
with the batch around it. Here the tile depends on the weight's shape alone, and every row of a tile is computed alike.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rollout_server.kernels.triton.device import power_of_2
from rollout_server.kernels.triton.product import product

_ROWS = 64
"""The least that Hopper's matrix instructions take."""


@triton.jit(do_not_specialize=["rows"])
def _matmul(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor | None,
    y: tl.tensor,
    rows: tl.tensor,
    N: tl.tensor,
    X: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr,
) -> None:
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_X)
    x_at = x + row.to(tl.int64)[:, None] * x_stride + step[None, :]
    weight_at = weight + column.to(tl.int64)[None, :] * weight_stride + step[:, None]
    total = tl.zeros([BLOCK_ROWS, BLOCK_N], dtype=tl.float32)
    for start in range(0, X, BLOCK_X):
        left = X - start
        a = tl.load(x_at, mask=(row < rows)[:, None] & (step < left)[None, :], other=0.0)
        b = tl.load(weight_at, mask=(column < N)[None, :] & (step < left)[:, None], other=0.0)
        total = product(a, b, total)
        x_at += BLOCK_X
        weight_at += BLOCK_X
    if bias is not None:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    target = y + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (column < N)[None, :])


def matmul(x_TX: torch.Tensor, weight_NX: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b: [T, N], summed in fp32; the same bits for a row whatever the other rows are."""
    rows, inputs = x_TX.shape
    outputs = weight_NX.shape[0]
    y = x_TX.new_empty(rows, outputs)
    wide = x_TX.dtype == torch.float32
    columns = 32 if wide or outputs < 8192 else 64
    if rows:
        _matmul[(triton.cdiv(outputs, columns), triton.cdiv(rows, _ROWS))](
            x_TX,
            weight_NX,
            bias_N,
            y,
            rows,
            outputs,
            inputs,
            x_TX.stride(0),
            weight_NX.stride(0),
            BLOCK_ROWS=_ROWS,
            BLOCK_N=columns,
            BLOCK_X=min(32 if wide else 128, max(16, power_of_2(inputs))),
            num_warps=4,
            num_stages=3,
        )
    return y
