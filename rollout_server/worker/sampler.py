"""From logits to sampled ids and the log-prob of each under the very distribution that it was drawn from.

A token is the inverse CDF of one uniform, and the uniform is a hash of (seed, index of the token in its sequence):
what else is in the batch has no influence, and a sequence that is computed again samples the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rollout_server.messages import SamplingParams

_BLOCK = 256
_MASK = (1 << 64) - 1


def uniform(seed: int, draw: int) -> float:
    """A number in (0, 1) from two integers, by two rounds of the splitmix64 finaliser (Steele et al., 2014)."""
    return ((_mix(_mix(seed & _MASK) ^ draw) >> 11) + 0.5) / (1 << 53)


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def distribution(logits_BV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Log-probs [B, V] that rows are drawn from: temperature, then top-k, top-p and min-p, then renormalised.

    Greedy rows (temperature 0) get the model's own log-probs at temperature 1.
    """
    temperatures = torch.tensor([p.temperature or 1.0 for p in params], dtype=torch.float32)
    if not bool((temperatures == 1.0).all()):
        logits_BV = logits_BV / temperatures[:, None]
    logprobs = torch.log_softmax(logits_BV, dim=-1)
    filtered = [
        i for i, p in enumerate(params) if p.temperature > 0 and (p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0)
    ]
    for i in filtered:
        logprobs[i] = _filter(logprobs[i], params[i])
    return logprobs


def _filter(logprobs_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    ordered, order = logprobs_V.sort(descending=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_k > 0:
        keep[params.top_k :] = False
    if params.top_p < 1.0:
        kept = torch.where(keep, ordered, -torch.inf)
        mass = torch.softmax(kept, dim=-1).cumsum(-1)
        keep &= torch.cat([mass.new_zeros(1), mass[:-1]]) < params.top_p  # the token that crosses top_p stays
    if params.min_p > 0.0:
        keep &= ordered >= ordered[0] + torch.log(torch.tensor(params.min_p))
    result = torch.full_like(logprobs_V, -torch.inf)
    result[order[keep]] = torch.log_softmax(ordered[keep], dim=-1)
    return result


def sample(
    logprobs_BV: torch.Tensor, params: Sequence[SamplingParams], draws: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 [B] and their log-probs fp32 [B]; greedy rows take the first of the likeliest ids."""
    rows = torch.arange(logprobs_BV.shape[0])
    hot = [i for i, p in enumerate(params) if p.temperature > 0]
    cold = [i for i, p in enumerate(params) if p.temperature == 0]
    ids = torch.empty_like(rows)
    if cold:
        ids[cold] = (logprobs_BV[cold] if hot else logprobs_BV).argmax(dim=-1)
    if hot:
        us = torch.tensor([uniform(params[i].seed, draws[i]) for i in hot], dtype=torch.float64)
        ids[hot] = _inverse_cdf(logprobs_BV[hot] if cold else logprobs_BV, us)
    return ids, logprobs_BV[rows, ids]


def _inverse_cdf(logprobs_BV: torch.Tensor, us: torch.Tensor) -> torch.Tensor:
    """Two levels, so that only one block of the vocabulary per row is summed in order."""
    count, vocab = logprobs_BV.shape
    padding = -vocab % _BLOCK
    probs = torch.nn.functional.pad(logprobs_BV.exp(), (0, padding)).view(count, -1, _BLOCK)
    blocks = probs.sum(-1).double().cumsum(-1)
    target = us * blocks[:, -1]
    block = torch.searchsorted(blocks, target[:, None], right=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp(min=0)), 0.0)
    within = probs.gather(1, block[..., None].expand(-1, -1, _BLOCK))[:, 0].double().cumsum(-1)
    offset = torch.searchsorted(within, target[:, None] - before, right=True).clamp_(max=_BLOCK - 1)
    ids = (block * _BLOCK + offset)[:, 0].clamp_(max=vocab - 1)
    # Rounding at a block's end can land on a token of no probability; the nearest one before it has some.
    for row in torch.nonzero(torch.isneginf(logprobs_BV.gather(1, ids[:, None])[:, 0])).flatten().tolist():
        alive = torch.nonzero(~torch.isneginf(logprobs_BV[row])).flatten()
        ids[row] = alive[torch.searchsorted(alive, ids[row]).clamp(max=len(alive) - 1)]
    return ids
