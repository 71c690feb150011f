"""Joins partial attention results over disjoint sets of keys by the logarithms of their sums of weights."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slots"])
def merge_parts(
    parts: tl.tensor,
    part_weights: tl.tensor,
    out: tl.tensor,
    slots: tl.tensor,
    D: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Grid (T, H): `parts` [T, H, slots, D] and `part_weights` [T, H, slots] -> `out` [T, H, D].

    A part of weight -inf is never read. A query without any part, the padding of a captured pass, becomes 0.
    """
    query = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    slot = tl.arange(0, BLOCK_SLOTS)
    dims = tl.arange(0, BLOCK_D)
    weight = tl.load(part_weights + query * slots + slot, mask=slot < slots, other=float("-inf"))
    there = weight > float("-inf")
    top = tl.max(weight, axis=0)
    share = tl.where(there, tl.exp2(weight - tl.where(top == float("-inf"), 0.0, top)), 0.0)
    total = tl.sum(share, axis=0)
    part = tl.load(
        parts + (query * slots + slot)[:, None] * D + dims[None, :],
        mask=there[:, None] & (dims < D)[None, :],
        other=0.0,
    )
    mean = tl.sum(part * share[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + query * D + dims, mean.to(out.dtype.element_ty), mask=dims < D)
