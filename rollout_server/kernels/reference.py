"""The decoder's operations in plain torch: the oracle of every other backend, and the fallback where no compiler
was."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rollout_server.kernels.interface import Batch, LayerCache

name = "reference"


def add_norm(x_TW: torch.Tensor, delta_TW: torch.Tensor | None, weight_W: torch.Tensor, eps: float) -> torch.Tensor:
    if delta_TW is not None:
        x_TW.add_(delta_TW)
    wide = x_TW.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x_TW.dtype) * weight_W


def rope_store(
    qkv_TX: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], batch: Batch, cache: LayerCache, heads: int
) -> torch.Tensor:
    _, kv_heads, size, dim = cache.values.shape
    heads_THD = qkv_TX.view(qkv_TX.shape[0], heads + 2 * kv_heads, dim)
    qk, v = heads_THD.split([heads + kv_heads, kv_heads], dim=1)
    cos, sin = (part[batch.positions][:, None].to(qk.dtype) for part in rope)
    first, second = qk.chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    page, offset = batch.slots // size, batch.slots % size
    cache.keys[page, :, :, offset] = rotated[:, heads:]
    cache.values[page, :, offset] = v
    return rotated[:, :heads]


def attention(q_THD: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
    _, kv_heads, size, dim = cache.values.shape
    tokens, heads, _ = q_THD.shape
    out = torch.empty_like(q_THD)
    starts, lengths = batch.table.tolist(), batch.lengths.tolist()
    first = 0
    while first < tokens:  # one row: consecutive tokens with one page table
        last = first
        while last < tokens and starts[last] == starts[first]:
            last += 1
        longest = lengths[last - 1]
        pages = batch.pages[starts[first] : starts[first] + -(-longest // size)].long()
        keys = cache.keys[pages].permute(1, 0, 3, 2).reshape(kv_heads, -1, dim)[:, :longest].float()
        values = cache.values[pages].transpose(0, 1).reshape(kv_heads, -1, dim)[:, :longest].float()
        visible = torch.arange(longest, device=q_THD.device) < batch.lengths[first:last, None]
        row = F.scaled_dot_product_attention(
            q_THD[first:last].transpose(0, 1).float()[None],
            keys[None],
            values[None],
            attn_mask=visible,
            enable_gqa=True,
        )
        out[first:last] = row[0].transpose(0, 1).to(out.dtype)
        first = last
    return out.view(tokens, heads * dim)
