"""Causal attention over the paged cache [P, K, S, D]: which kernels run, in which tiles, with how many splits.

All is decided from host-known bounds (rows, tokens, `Batch.longest`, `Batch.most`), so that a pass is the same sequence
of launches whatever the lengths on the device are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from rollout_server.kernels.interface import Batch, LayerCache
from rollout_server.kernels.triton.attention_merge import merge_parts
from rollout_server.kernels.triton.attention_rows import attend_rows
from rollout_server.kernels.triton.attention_runs import attend_runs
from rollout_server.kernels.triton.device import power_of_2, programs
from rollout_server.kernels.triton.run_plan import LastPlan

_DECODE_TILE = 16
"""The least that a matrix product takes: one row's group of query heads, padded."""
_PREFILL_TILE = 64
"""The least that Hopper's matrix instructions take; reads keys a fourth as often as the decode tile."""
_MOST_SPLITS = 32

_plans = LastPlan()


class Tiling(NamedTuple):
    """How the launches of one pass are cut."""

    decode: bool
    """One token a row at most: tile b is row b."""
    tile: int
    """Queries of a program: tokens × the query heads of a group."""
    splits: int
    """Programs that share the keys of a tile."""
    run_tile: int
    run_splits: int


def attention(q_THD: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
    """[T, H, D] -> [T, H * D]; fastest tiling for this batch."""
    return attend(q_THD, batch, cache, choose_tiling(q_THD, batch, cache))


def choose_tiling(q_THD: torch.Tensor, batch: Batch, cache: LayerCache) -> Tiling:
    """Splits until the device is full, no further than to blocks of keys, and in powers of two: each is compiled once."""
    tokens, heads, _ = q_THD.shape
    kv_heads, page = cache.keys.shape[1], cache.keys.shape[2]
    group = heads // kv_heads
    decode = batch.most == 1
    run_tile = prefill_tile(group, q_THD.dtype)
    tile = max(_DECODE_TILE, power_of_2(group)) if decode else run_tile
    rows = batch.lines.shape[0]
    tiles = rows if decode else tokens // (tile // group) + rows
    block = key_block(q_THD.dtype)
    wanted = programs(q_THD.device)
    splits = _splits(wanted, tiles * kv_heads, batch.longest, block)
    run_splits = 1
    if batch.runs:
        plan = _plans.of(batch, page, run_tile // group)
        run_splits = _splits(wanted, plan.tiles.shape[0] // 2 * kv_heads, plan.longest, block)
    return Tiling(decode, tile, splits, run_tile, run_splits)


def _splits(wanted: int, launched: int, keys: int, block: int) -> int:
    """The greatest power of two of splits that neither fills the device twice nor leaves a split without keys."""
    most = min(wanted // max(launched, 1), -(-keys // block), _MOST_SPLITS)
    return 1 << max(most.bit_length() - 1, 0)


def key_block(dtype: torch.dtype) -> int:
    """Positions of keys that a program holds at a time."""
    return 32 if dtype == torch.float32 else 64


def prefill_tile(group: int, dtype: torch.dtype) -> int:
    """Queries of a program where a row has several tokens. fp32 products are made without matrix instructions, and
    more than a decode tile of them does not fit in registers."""
    return max(_DECODE_TILE if dtype == torch.float32 else _PREFILL_TILE, power_of_2(group))


def attend(q_THD: torch.Tensor, batch: Batch, cache: LayerCache, tiling: Tiling) -> torch.Tensor:
    """[T, H, D] -> [T, H * D] in the given tiling."""
    q = q_THD.contiguous()
    tokens, heads, dim = q.shape
    kv_heads, page = cache.keys.shape[1], cache.keys.shape[2]
    group, rows = heads // kv_heads, batch.lines.shape[0]
    out = torch.empty_like(q)
    if not tokens:
        return out.view(tokens, heads * dim)
    plan = _plans.of(batch, page, tiling.run_tile // group) if batch.runs else None
    slots = tiling.splits + (plan.depth * tiling.run_splits if plan is not None else 0)
    parts = weights = None
    if slots > 1:
        parts = torch.empty(tokens, heads, slots, dim, dtype=torch.float32, device=q.device)
        weights = torch.empty(tokens, heads, slots, dtype=torch.float32, device=q.device)
    scale = dim**-0.5 * math.log2(math.e)
    shape = {"HEADS": heads, "GROUP": group, "D": dim, "PAGE": page}
    blocks = {
        "BLOCK_N": key_block(q.dtype),
        "BLOCK_D": max(16, power_of_2(dim)),
        "num_warps": 8 if q.dtype == torch.float32 else 4,
        "num_stages": 2,
    }
    if plan is not None and weights is not None:
        weights[:, :, tiling.splits :].fill_(-torch.inf)
        attend_runs[(plan.tiles.shape[0] // 2, kv_heads, tiling.run_splits)](
            q,
            parts,
            weights,
            cache.keys,
            cache.values,
            batch.offsets,
            batch.tables,
            batch.lines,
            plan.tiles,
            plan.runs,
            plan.members,
            plan.reach,
            batch.tables.stride(0),
            cache.keys.stride(0),
            cache.keys.stride(1),
            scale,
            slots,
            tiling.splits,
            plan.steps,
            BLOCK_M=tiling.run_tile,
            **shape,
            **blocks,
        )
    tiles = rows if tiling.decode else tokens // (tiling.tile // group) + rows
    attend_rows[(tiles, kv_heads, tiling.splits)](
        q,
        out,
        parts,
        weights,
        cache.keys,
        cache.values,
        batch.positions,
        batch.offsets,
        batch.tables,
        batch.lines,
        batch.lengths,
        None if plan is None else plan.covered,
        rows,
        batch.tables.stride(0),
        cache.keys.stride(0),
        cache.keys.stride(1),
        scale,
        slots,
        DECODE=tiling.decode,
        BLOCK_M=tiling.tile,
        **shape,
        **blocks,
    )
    if parts is not None:
        merge_parts[(tokens, heads)](
            parts,
            weights,
            out,
            slots,
            D=dim,
            BLOCK_SLOTS=power_of_2(slots),
            BLOCK_D=blocks["BLOCK_D"],
            num_warps=1 if slots <= 8 else 4,
        )
    return out.view(tokens, heads * dim)
