"""The queries of many rows over the pages that they share, as one matrix product (Hydragen, Juravsky et al., 2024).

Every position of a run is visible to every query of its rows, so that no mask is needed and rows need not be kept apart:
a program takes a tile of queries of one key/value head from as many rows as fit. Where rows branch at several depths,
each depth is a run of its own (DeFT, Yao et al., 2024), and `attention_merge` joins the parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rollout_server.kernels.triton.attention_tile import attend_range, store_part


@triton.jit(
    do_not_specialize=["slots", "private_slots", "steps"],
    do_not_specialize_on_alignment=["tiles", "runs", "members", "reach"],
)
def attend_runs(
    q: tl.tensor,
    parts: tl.tensor,
    part_weights: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    offsets: tl.tensor,
    tables: tl.tensor,
    lines: tl.tensor,
    tiles: tl.tensor,
    runs: tl.tensor,
    members: tl.tensor,
    reach: tl.tensor,
    table_stride: tl.tensor,
    page_stride: tl.tensor,
    head_stride: tl.tensor,
    scale: tl.tensor,
    slots: tl.tensor,
    private_slots: tl.tensor,
    steps: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Grid (tiles, K, splits).

    `tiles` int32 [tiles, 2]: the run, and the index of the tile's first token among the run's tokens.
    `runs` int32 [runs, 5]: first and last member, first and last position, depth.
    Partial results go to the slots after the `private_slots` of `attend_rows`, depth by depth.
    `members` int32 [members]: a row each; `reach` int32 [members + 1]: tokens of the members before.
    `steps`: halvings that find one member of a run.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    tile, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    run = runs + tl.load(tiles + tile * 2) * 5
    first, last = tl.load(run), tl.load(run + 1)
    lowest = tl.load(reach + first) + tl.load(tiles + tile * 2 + 1)
    highest = tl.load(reach + last)
    if lowest < highest:
        query = tl.arange(0, BLOCK_M)
        index = lowest + query // GROUP
        head = kv * GROUP + query % GROUP
        valid = (query < TOKENS * GROUP) & (index < highest)
        index = tl.where(valid, index, lowest)
        member = tl.zeros([BLOCK_M], dtype=tl.int32) + first
        beyond = tl.zeros([BLOCK_M], dtype=tl.int32) + last
        for _ in range(steps):
            middle = (member + beyond) // 2
            left = tl.load(reach + middle) <= index
            member = tl.where(left, middle, member)
            beyond = tl.where(left, beyond, middle)
        token = tl.load(offsets + tl.load(members + member)) + index - tl.load(reach + member)
        dims = tl.arange(0, BLOCK_D)
        at = (token.to(tl.int64) * HEADS + head)[:, None] * D + dims[None, :]
        queries = tl.load(q + at, mask=valid[:, None] & (dims < D)[None, :], other=0.0)

        begin, end = tl.load(run + 2), tl.load(run + 3)
        share = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(2)), BLOCK_N) * BLOCK_N
        begin += split * share
        end = tl.minimum(end, begin + share)
        line = tl.load(lines + tl.load(members + first)).to(tl.int64)
        acc, top, total = attend_range(
            queries,
            tl.where(valid, end, 0),
            begin,
            end,
            tables + line * table_stride,
            keys + kv * head_stride,
            values + kv * head_stride,
            page_stride,
            scale,
            D,
            PAGE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
        )
        slot = private_slots + tl.load(run + 4) * tl.num_programs(2) + split
        store_part(parts, part_weights, slot, slots, token, head, valid, acc, top, total, HEADS, D, BLOCK_D)
