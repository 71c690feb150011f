"""The decoder's operations in plain torch: the oracle of every other backend, and the fallback where no compiler
was."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from rollout_server.kernels.interface import Batch, LayerCache, Lora
from rollout_server.models.config import ModelConfig

name = "reference"
invariant = False
_BLOCK = 256


def allocate(
    config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> list[LayerCache]:
    """Keys and values alike: [P, K, S, D]."""
    shape = (pages, config.kv_heads, page_size, config.head_dim)
    return [
        LayerCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
        for _ in range(config.layers)
    ]


def pack(weight_NX: torch.Tensor) -> torch.Tensor:
    return weight_NX


def unpack(packed: torch.Tensor) -> torch.Tensor:
    return packed


def linear(x_TX: torch.Tensor, packed: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x_TX, packed, bias_N)


def add_lora(y_TN: torch.Tensor, x_TX: torch.Tensor, spans: Sequence[tuple[int, int, Lora]]) -> None:
    for start, end, lora in spans:
        y_TN[start:end] += F.linear(F.linear(x_TX[start:end], lora.down) * lora.scale, lora.up)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def add_norm(x_TW: torch.Tensor, delta_TW: torch.Tensor | None, weight_W: torch.Tensor, eps: float) -> torch.Tensor:
    if delta_TW is not None:
        x_TW.add_(delta_TW)
    wide = x_TW.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x_TW.dtype) * weight_W


def rope_store(
    qkv_TX: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], batch: Batch, cache: LayerCache, heads: int
) -> torch.Tensor:
    _, kv_heads, size, dim = cache.keys.shape
    heads_THD = qkv_TX.view(qkv_TX.shape[0], heads + 2 * kv_heads, dim)
    qk, v = heads_THD.split([heads + kv_heads, kv_heads], dim=1)
    cos, sin = (part[batch.positions][:, None].to(qk.dtype) for part in rope)
    first, second = qk.chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    page, offset = batch.cells // size, batch.cells % size
    cache.keys[page, :, offset] = rotated[:, heads:]
    cache.values[page, :, offset] = v
    return rotated[:, :heads]


def attention(q_THD: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
    _, kv_heads, size, dim = cache.keys.shape
    tokens, heads, _ = q_THD.shape
    out = torch.zeros_like(q_THD)
    offsets, lengths, lines = batch.offsets.tolist(), batch.lengths.tolist(), batch.lines.tolist()
    for row, (length, line) in enumerate(zip(lengths, lines, strict=True)):
        first, last = offsets[row], offsets[row + 1]
        if first == last:
            continue
        pages = batch.tables[line, : -(-length // size)].long()
        keys, values = (part[pages].transpose(0, 1).reshape(kv_heads, -1, dim)[:, :length].float() for part in cache)
        visible = torch.arange(length, device=q_THD.device) <= batch.positions[first:last, None]
        attended = F.scaled_dot_product_attention(
            q_THD[first:last].transpose(0, 1).float()[None],
            keys[None],
            values[None],
            attn_mask=visible,
            enable_gqa=True,
        )
        out[first:last] = attended[0].transpose(0, 1).to(out.dtype)
    return out.view(tokens, heads * dim)


def log_softmax_sample(
    logits_BV: torch.Tensor, temperatures_B: torch.Tensor, uniforms_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cold = temperatures_B == 0
    logprobs = torch.log_softmax(logits_BV.float() / torch.where(cold, 1.0, temperatures_B)[:, None], dim=-1)
    ids = torch.where(cold, logprobs.argmax(-1), _inverse_cdf(logprobs, uniforms_B))
    return ids, logprobs.gather(1, ids[:, None])[:, 0], torch.special.entr(logprobs.exp()).sum(-1)


def _inverse_cdf(logprobs_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """Two levels, so that only one block of the vocabulary per row is summed in order."""
    count, vocab = logprobs_BV.shape
    probs = F.pad(logprobs_BV.exp(), (0, -vocab % _BLOCK)).view(count, -1, _BLOCK)
    blocks = probs.sum(-1).double().cumsum(-1)
    target = uniforms_B * blocks[:, -1]
    block = torch.searchsorted(blocks, target[:, None], right=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp(min=0)), 0.0)
    within = probs.gather(1, block[..., None].expand(-1, -1, _BLOCK))[:, 0].double().cumsum(-1)
    offset = torch.searchsorted(within, target[:, None] - before, right=True).clamp_(max=_BLOCK - 1)
    ids = (block * _BLOCK + offset)[:, 0].clamp_(max=vocab - 1)
    # Rounding at a block's end can land on a token of no probability; the nearest one before it has some.
    for row in torch.nonzero(torch.isneginf(logprobs_BV.gather(1, ids[:, None])[:, 0])).flatten().tolist():
        alive = torch.nonzero(~torch.isneginf(logprobs_BV[row])).flatten()
        ids[row] = alive[(torch.searchsorted(alive, ids[row]) - 1).clamp(min=0)]
    return ids
