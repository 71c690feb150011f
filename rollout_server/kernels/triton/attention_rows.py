"""Each row's queries over the row's own pages: decode and prefill, mixed in one flat batch.

A program takes a tile of queries of one key/value head: all query heads of that group for one or several consecutive
tokens, so that keys and values are read once for the whole group. Where there are too few tiles to fill the device,
the keys of each are split among several programs, and `attention_merge` joins their parts (Flash-Decoding, Dao et al., 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from rollout_server.kernels.triton.attention_tile import attend_range, store_part


@triton.jit(do_not_specialize=["rows", "slots"])
def attend_rows(
    q: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor | None,
    part_weights: tl.tensor | None,
    keys: tl.tensor,
    values: tl.tensor,
    positions: tl.tensor,
    offsets: tl.tensor,
    tables: tl.tensor,
    lines: tl.tensor,
    lengths: tl.tensor,
    covered: tl.tensor | None,
    rows: tl.tensor,
    table_stride: tl.tensor,
    page_stride: tl.tensor,
    head_stride: tl.tensor,
    scale: tl.tensor,
    slots: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    DECODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Grid (tiles, K, splits). `covered` int32 [R], or None: the row's first position that no shared run has.

    DECODE: no row has more than one token, and tile b is row b. Otherwise row r has the tiles from
    offsets[r] // TOKENS + r on: at least as many as it needs, their number known on the host as T // TOKENS + R.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    tile, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if DECODE:
        row = tile
        first = tl.load(offsets + row)
    else:
        row = 0
        beyond = rows
        while beyond - row > 1:
            middle = (row + beyond) // 2
            if tl.load(offsets + middle) // TOKENS + middle <= tile:
                row = middle
            else:
                beyond = middle
        first = tl.load(offsets + row)
        first += (tile - first // TOKENS - row) * TOKENS
    last = tl.load(offsets + row + 1)
    if first < last:
        query = tl.arange(0, BLOCK_M)
        token = first + query // GROUP
        head = kv * GROUP + query % GROUP
        valid = (query < TOKENS * GROUP) & (token < last)
        dims = tl.arange(0, BLOCK_D)
        here = valid[:, None] & (dims < D)[None, :]
        at = (token.to(tl.int64) * HEADS + head)[:, None] * D + dims[None, :]
        queries = tl.load(q + at, mask=here, other=0.0)
        limits = tl.where(valid, tl.load(positions + token, mask=valid, other=0) + 1, 0)

        begin = 0
        if covered is not None:
            begin = tl.load(covered + row)
        end = tl.minimum(tl.load(lengths + row), tl.max(limits, axis=0))
        share = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(2)), BLOCK_N) * BLOCK_N
        begin += split * share
        end = tl.minimum(end, begin + share)
        acc, top, total = attend_range(
            queries,
            limits,
            begin,
            end,
            tables + tl.load(lines + row).to(tl.int64) * table_stride,
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
        if parts is None:
            mean = acc / tl.where(total > 0.0, total, 1.0)[:, None]
            tl.store(out + at, mean.to(out.dtype.element_ty), mask=here)
        else:
            store_part(parts, part_weights, split, slots, token, head, valid, acc, top, total, HEADS, D, BLOCK_D)
