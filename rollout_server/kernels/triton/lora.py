"""Low-rank updates of many adapters in one batch: two launches, however many adapters are in it (after Punica's SGMV,
Chen et al., 2023).

`_down` takes a tile of tokens of one adapter and a part of the inputs, `_up` adds the parts, rounds, and takes the tile
to a block of outputs. Both find their adapter in a table of tiles, which holds the addresses of its matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from rollout_server.kernels.interface import Lora
from rollout_server.kernels.triton.device import power_of_2
from rollout_server.kernels.triton.product import product

_TOKENS = 16
"""The least that a matrix product takes: most adapters have fewer tokens in a decode pass."""
_INPUT_PARTS = 1024
"""Inputs that one program of `_down` sums."""
_ELEMENTS = 8192
"""Of an adapter's matrix in a program at a time."""

Tile = tuple[int, int, int, int, int, float]
"""First token, last token, address of `down`, address of `up`, rank, scale."""


@triton.jit(do_not_specialize=["tokens"])
def _down(
    x: tl.tensor,
    parts: tl.tensor,
    tiles: tl.tensor,
    tokens: tl.tensor,
    X: tl.tensor,
    x_stride: tl.tensor,
    PART: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Grid (tiles, parts): parts [parts, T, BLOCK_R] = x down^T over PART inputs each."""
    tile, part = tiles + tl.program_id(0) * 5, tl.program_id(1)
    token = tl.load(tile) + tl.arange(0, BLOCK_T)
    valid = token < tl.load(tile + 1)
    down = tl.load(tile + 2).to(tl.pointer_type(x.dtype.element_ty))
    rank = tl.load(tile + 4)
    lane = tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    for start in range(0, PART, BLOCK_X):
        at = part * PART + start + tl.arange(0, BLOCK_X)
        a = tl.load(x + token[:, None] * x_stride + at[None, :], mask=valid[:, None] & (at < X)[None, :], other=0.0)
        b = tl.load(down + lane[None, :] * X + at[:, None], mask=(lane < rank)[None, :] & (at < X)[:, None], other=0.0)
        total = product(a, b, total)
    target = parts + (part * tokens + token)[:, None] * BLOCK_R + lane[None, :]
    tl.store(target, total, mask=valid[:, None])


@triton.jit(do_not_specialize=["tokens"])
def _up(
    y: tl.tensor,
    parts: tl.tensor,
    tiles: tl.tensor,
    scales: tl.tensor,
    tokens: tl.tensor,
    count: tl.tensor,
    N: tl.tensor,
    y_stride: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Grid (tiles, blocks of outputs): y += (sum of `count` parts · scale) up^T, rounded where PEFT rounds."""
    tile = tiles + tl.program_id(0) * 5
    token = tl.load(tile) + tl.arange(0, BLOCK_T)
    valid = token < tl.load(tile + 1)
    dtype = y.dtype.element_ty
    up = tl.load(tile + 3).to(tl.pointer_type(dtype))
    rank = tl.load(tile + 4)
    lane = tl.arange(0, BLOCK_R)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    low = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    for part in range(0, count):
        low += tl.load(
            parts + (part * tokens + token)[:, None] * BLOCK_R + lane[None, :], mask=valid[:, None], other=0.0
        )
    low = (low.to(dtype).to(tl.float32) * tl.load(scales + tl.program_id(0))).to(dtype)
    matrix = tl.load(
        up + output.to(tl.int64)[None, :] * rank + lane[:, None],
        mask=(output < N)[None, :] & (lane < rank)[:, None],
        other=0.0,
    )
    share = product(low, matrix, tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)).to(dtype).to(tl.float32)
    target = y + token[:, None] * y_stride + output[None, :]
    here = valid[:, None] & (output < N)[None, :]
    tl.store(target, (tl.load(target, mask=here, other=0.0).to(tl.float32) + share).to(dtype), mask=here)


def add_lora(y_TN: torch.Tensor, x_TX: torch.Tensor, spans: Sequence[tuple[int, int, Lora]]) -> None:
    """y[start:end] += ((x[start:end] down^T) · scale) up^T in place, for each (start, end, adapter).

    The low-rank product is rounded to the dtype before and after it is scaled. Adapters of the same shape in a decode
    pass cost two launches in all; matrices must be contiguous and of x's dtype (ValueError).
    """
    tiles: list[Tile] = []
    for start, end, lora in spans:
        down, up = lora.down, lora.up
        for matrix in (down, up):
            if matrix.dtype != x_TX.dtype or not matrix.is_contiguous():
                raise ValueError(f"adapter matrix {tuple(matrix.shape)} must be contiguous {x_TX.dtype}")
        tiles += [
            (first, end, down.data_ptr(), up.data_ptr(), down.shape[0], lora.scale)
            for first in range(start, end, _TOKENS)
        ]
    if not tiles:
        return
    table, scales = _table(tuple(tiles), x_TX.device)
    tokens, inputs = x_TX.shape
    outputs = y_TN.shape[1]
    lanes = max(16, power_of_2(max(tile[4] for tile in tiles)))
    count = triton.cdiv(inputs, _INPUT_PARTS)
    parts = torch.empty(count, tokens, lanes, dtype=torch.float32, device=x_TX.device)
    _down[(len(tiles), count)](
        x_TX,
        parts,
        table,
        tokens,
        inputs,
        x_TX.stride(0),
        PART=_INPUT_PARTS,
        BLOCK_T=_TOKENS,
        BLOCK_X=max(16, min(64, _ELEMENTS // 2 // lanes)),
        BLOCK_R=lanes,
    )
    outputs_each = max(16, min(128, _ELEMENTS // lanes))
    _up[(len(tiles), triton.cdiv(outputs, outputs_each))](
        y_TN,
        parts,
        table,
        scales,
        tokens,
        count,
        outputs,
        y_TN.stride(0),
        BLOCK_T=_TOKENS,
        BLOCK_N=outputs_each,
        BLOCK_R=lanes,
    )


@lru_cache(maxsize=4096)
def _table(tiles: tuple[Tile, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [tiles, 5] and the scales fp32 [tiles] on the device. Passes that decode the same rows ask for the same."""
    table = torch.tensor([tile[:5] for tile in tiles], dtype=torch.int64)
    scales = torch.tensor([tile[5] for tile in tiles], dtype=torch.float32)
    return table.to(device), scales.to(device)
