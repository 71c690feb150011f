"""log softmax and inverse-CDF sampling of [B, V] logits in two levels: no sort, no [B, V] intermediate.

First every block of the vocabulary gets its maximum, its sum of exponentials, the sum of exponents weighted by them, and its
likeliest id; then one program a row finds the block that the uniform falls into, the id within it, and the row's entropy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rollout_server.kernels.triton.device import power_of_2

_BLOCK = 2048
"""Ids of a block: 75 blocks for a vocabulary of 152k."""


@triton.jit
def _block_sums(
    logits: tl.tensor,
    temperatures: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    weighted: tl.tensor,
    likeliest: tl.tensor,
    vocab: tl.tensor,
    row_stride: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    temperature = tl.where(temperature == 0.0, 1.0, temperature)
    at = block * BLOCK + tl.arange(0, BLOCK)
    scaled = tl.load(logits + row * row_stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    scaled = tl.div_rn(scaled, temperature)
    top = tl.max(scaled, axis=0)
    # A block without a finite logit has sum 0 and can neither be drawn nor be the likeliest.
    exponents = scaled - tl.where(top == float("-inf"), 0.0, top)
    slot = row * blocks + block
    tl.store(best + slot, top)
    probs = tl.exp(exponents)
    tl.store(total + slot, tl.sum(probs, axis=0))
    tl.store(weighted + slot, tl.sum(tl.where(probs > 0.0, probs * exponents, 0.0), axis=0))
    tl.store(likeliest + slot, tl.min(tl.where(scaled == top, at, vocab), axis=0))


@triton.jit
def _draw(
    logits: tl.tensor,
    temperatures: tl.tensor,
    uniforms: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    weighted: tl.tensor,
    likeliest: tl.tensor,
    ids: tl.tensor,
    logprobs: tl.tensor,
    entropies: tl.tensor,
    vocab: tl.tensor,
    row_stride: tl.tensor,
    blocks: tl.tensor,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    greedy = temperature == 0.0
    temperature = tl.where(greedy, 1.0, temperature)
    block = tl.arange(0, BLOCKS)
    tops = tl.load(best + row * blocks + block, mask=block < blocks, other=float("-inf"))
    sums = tl.load(total + row * blocks + block, mask=block < blocks, other=0.0)
    top = tl.max(tops, axis=0)
    weights = (sums * tl.exp(tops - top)).to(tl.float64)
    reach = tl.cumsum(weights, axis=0)
    mass = tl.sum(weights, axis=0)
    target = tl.load(uniforms + row) * mass
    # Of all with some probability, the first that reaches beyond the target; the last one where rounding left none.
    last = tl.max(tl.where(weights > 0.0, block, 0), axis=0)
    chosen = tl.minimum(tl.min(tl.where((reach > target) & (weights > 0.0), block, BLOCKS), axis=0), last)
    before = tl.sum(tl.where(block < chosen, weights, 0.0), axis=0)

    offset = tl.arange(0, BLOCK)
    at = chosen * BLOCK + offset
    source = logits + row * row_stride
    scaled = tl.load(source + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    scaled = tl.div_rn(scaled, temperature)
    probs = tl.exp(scaled - top).to(tl.float64)
    reach = before + tl.cumsum(probs, axis=0)
    last = tl.max(tl.where(probs > 0.0, offset, 0), axis=0)
    drawn = tl.minimum(tl.min(tl.where((reach > target) & (probs > 0.0), offset, BLOCK), axis=0), last)

    first = tl.load(likeliest + row * blocks + block, mask=block < blocks, other=vocab)
    best_id = tl.min(tl.where(tops == top, first, vocab), axis=0)
    token = tl.where(greedy, best_id, chosen * BLOCK + drawn)
    token = tl.minimum(token, vocab - 1)
    logit = tl.div_rn(tl.load(source + token).to(tl.float32), temperature)
    tl.store(ids + row, token.to(tl.int64))
    tl.store(logprobs + row, logit - top - tl.log(mass).to(tl.float32))
    # A block's exponents are relative to its own maximum: seen from the row's they are lower by the same amount all.
    within = tl.load(weighted + row * blocks + block, mask=block < blocks, other=0.0) * tl.exp(tops - top)
    below = tl.where(weights > 0.0, (tops - top) * weights, 0.0)
    tl.store(entropies + row, (tl.log(mass) - tl.sum(within + below, axis=0) / mass).to(tl.float32))


def log_softmax_sample(
    logits_BV: torch.Tensor, temperatures_B: torch.Tensor, uniforms_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids int64 [B] at `uniforms` (fp64) of the CDF of softmax(logits / temperature), their log-probs and entropies, fp32 [B].

    Rows of temperature 0 take the first of the likeliest ids, log-prob and entropy at temperature 1. Where the CDF is so
    close to a uniform that fp32 rounding of the sums decides, the neighbouring id of the reference may be drawn.
    """
    rows, vocab = logits_BV.shape
    device = logits_BV.device
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs, entropies = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    if not rows:
        return ids, logprobs, entropies
    blocks = triton.cdiv(vocab, _BLOCK)
    best, total, weighted = (torch.empty(rows, blocks, dtype=torch.float32, device=device) for _ in range(3))
    likeliest = torch.empty(rows, blocks, dtype=torch.int32, device=device)
    stride = logits_BV.stride(0)
    _block_sums[(rows, blocks)](
        logits_BV, temperatures_B, best, total, weighted, likeliest, vocab, stride, blocks, BLOCK=_BLOCK, num_warps=8
    )
    _draw[(rows,)](
        logits_BV,
        temperatures_B,
        uniforms_B,
        best,
        total,
        weighted,
        likeliest,
        ids,
        logprobs,
        entropies,
        vocab,
        stride,
        blocks,
        BLOCKS=power_of_2(blocks),
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return ids, logprobs, entropies
