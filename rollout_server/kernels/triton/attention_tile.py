"""The common core of the attention kernels: a tile of queries against a range of one page table's positions.

Online softmax in base 2 (Milakov & Gimelshein, 2018; FlashAttention-2, Dao, 2023); keys and values are gathered
through the page table, a block of positions at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rollout_server.kernels.triton.product import product


@triton.jit
def attend_range(
    q: tl.tensor,
    limits: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    table: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    page_stride: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Queries q [BLOCK_M, BLOCK_D] over the positions `begin` … `end`-1, each up to its own limit [BLOCK_M].

    `keys` and `values` point to the head's part of page 0; `scale` has log2(e) in it. Returns the sum of weighted
    values [BLOCK_M, BLOCK_D], the greatest score and the sum of weights 2^(score - greatest) [BLOCK_M]: a sum of 0
    where a query saw nothing.
    """
    dims = tl.arange(0, BLOCK_D)
    limits = tl.minimum(limits, end)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        there = at < end
        page = tl.load(table + at // PAGE, mask=there, other=0).to(tl.int64)
        cell = page * page_stride + (at % PAGE) * D
        k = tl.load(keys + cell[None, :] + dims[:, None], mask=there[None, :] & (dims < D)[:, None], other=0.0)
        scores = product(q, k, tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)) * scale
        scores = tl.where(at[None, :] < limits[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # A query that has seen nothing yet has no maximum; any finite number stands in for it.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, axis=1)
        v = tl.load(values + cell[:, None] + dims[None, :], mask=there[:, None] & (dims < D)[None, :], other=0.0)
        acc = product(weights.to(v.dtype), v, acc * fade[:, None])
        top = new_top
    return acc, top, total


@triton.jit
def store_part(
    parts: tl.tensor,
    part_weights: tl.tensor,
    slot: tl.tensor,
    slots: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    valid: tl.tensor,
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One partial result a query: its mean of values to `parts` [T, H, slots, D], and the base-2 logarithm of its sum of
    weights to `part_weights` [T, H, slots], -inf where it saw nothing."""
    dims = tl.arange(0, BLOCK_D)
    at = (token.to(tl.int64) * HEADS + head) * slots + slot
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    tl.store(part_weights + at, tl.where(seen, top + tl.log2(total), float("-inf")), mask=valid)
    mean = acc / total[:, None]
    tl.store(parts + at[:, None] * D + dims[None, :], mean, mask=valid[:, None] & (dims < D)[None, :])
