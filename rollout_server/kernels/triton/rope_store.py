"""Rotary embedding (Su et al., 2021; halves as in GPT-NeoX) of queries and keys; keys and values go to their cells."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rollout_server.kernels.interface import Batch, LayerCache
from rollout_server.kernels.triton.device import power_of_2

_HEADS = 8
"""Heads of a token that a program takes."""


@triton.jit
def _rope_store(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    cells: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    qkv_stride: tl.tensor,
    page_stride: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    at = tl.arange(0, BLOCK_HALF)[None, :]
    here = (head < HEADS + 2 * KV_HEADS) & (at < HALF)
    dtype = q.dtype.element_ty

    source = qkv + token * qkv_stride + head * D + at
    first = tl.load(source, mask=here, other=0.0)
    second = tl.load(source + HALF, mask=here, other=0.0)
    position = tl.load(positions + token).to(tl.int64)
    angle = position * HALF + at
    c = tl.load(cos + angle, mask=at < HALF, other=0.0).to(dtype).to(tl.float32)
    s = tl.load(sin + angle, mask=at < HALF, other=0.0).to(dtype).to(tl.float32)
    # Products are rounded to the dtype before they are added, as torch rounds them.
    x, y = first.to(tl.float32), second.to(tl.float32)
    low = ((x * c).to(dtype).to(tl.float32) - (y * s).to(dtype).to(tl.float32)).to(dtype)
    high = ((y * c).to(dtype).to(tl.float32) + (x * s).to(dtype).to(tl.float32)).to(dtype)

    target = q + token * (HEADS * D) + head * D + at
    is_query = here & (head < HEADS)
    tl.store(target, low, mask=is_query)
    tl.store(target + HALF, high, mask=is_query)

    cell = tl.load(cells + token)
    base = (cell // PAGE) * page_stride + (cell % PAGE) * D
    is_key = here & (head >= HEADS) & (head < HEADS + KV_HEADS)
    target = keys + base + (head - HEADS) * (PAGE * D) + at
    tl.store(target, low, mask=is_key)
    tl.store(target + HALF, high, mask=is_key)
    is_value = here & (head >= HEADS + KV_HEADS)
    target = values + base + (head - HEADS - KV_HEADS) * (PAGE * D) + at
    tl.store(target, first, mask=is_value)
    tl.store(target + HALF, second, mask=is_value)


def rope_store(
    qkv_TX: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], batch: Batch, cache: LayerCache, heads: int
) -> torch.Tensor:
    """qkv [T, (H + 2 K) D] -> rotated queries [T, H, D]; rotated keys and the values enter `cache` [P, K, S, D]."""
    _, kv_heads, page, dim = cache.keys.shape
    tokens = qkv_TX.shape[0]
    q = qkv_TX.new_empty(tokens, heads, dim)
    if tokens:
        _rope_store[(tokens, triton.cdiv(heads + 2 * kv_heads, _HEADS))](
            qkv_TX,
            *rope,
            batch.positions,
            batch.cells,
            q,
            cache.keys,
            cache.values,
            qkv_TX.stride(0),
            cache.keys.stride(0),
            HEADS=heads,
            KV_HEADS=kv_heads,
            D=dim,
            PAGE=page,
            BLOCK_HEADS=_HEADS,
            BLOCK_HALF=power_of_2(dim // 2),
        )
    return q
