"""The GRPO objective over the tokens of a micro-batch, with clip-higher and truncated importance sampling.

With π the current policy, π_old the trainer's policy before the step, μ the policy as the server sampled from it, A the
advantage of the token's transition and w its weight (see `aggregation`):

    ρ = π / π_old
    c = min(π_old / μ, C)                                  held constant
    loss = Σ w · c · −min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A)

GRPO: DeepSeekMath, arXiv 2402.03300, without a reference model. Clip-higher (ε_high > ε_low): DAPO, arXiv 2503.14476.
Truncated importance sampling (TIS) for the difference between trainer and server: Yao et al. 2025, "Your efficient RL
framework secretly brings you off-policy RL training". C caps the correction from above only, so a token that the server
found too likely is trained less, and none is trained much more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LossSum(NamedTuple):
    """Both add up over the micro-batches of a step."""

    loss: Tensor
    """Scalar; weights already make it the step's mean."""
    metrics: dict[str, Tensor]
    """Sums over tokens, and `tokens`, their number; see `metric_means`."""


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    tis_cap: float | None,
) -> LossSum:
    """All tensors are 1-D, one entry for each sampled token; a gradient flows into `logprobs` only."""
    logprobs = logprobs.float() if logprobs.dtype.itemsize < 4 else logprobs
    old_logprobs, behaviour_logprobs = old_logprobs.detach(), behaviour_logprobs.detach()
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    correction = _correction(old_logprobs, behaviour_logprobs, tis_cap)
    loss = (-torch.minimum(ratio * advantages, clipped * advantages) * correction * weights).sum()
    with torch.no_grad():
        is_clipped = ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))
        metrics = {
            "tokens": torch.full_like(loss, len(logprobs)),
            "clip_fraction": is_clipped.sum().to(loss.dtype),
            "ratio": ratio.sum(),
            "tis": correction.sum(),
            "kl_old": k3(log_ratio).sum(),
            "kl_behaviour": k3(logprobs - behaviour_logprobs).sum(),
        }
    return LossSum(loss, metrics)


def _correction(old_logprobs: Tensor, behaviour_logprobs: Tensor, cap: float | None) -> Tensor:
    """c of the module's equation, or ones."""
    if cap is None:
        return torch.ones_like(old_logprobs)
    return (old_logprobs - behaviour_logprobs).exp().clamp(max=cap)


def k3(log_ratio: Tensor) -> Tensor:
    """An estimate of KL(q ‖ π) at a token drawn from q, with log_ratio = log π − log q: unbiased and never negative.

    http://joschu.net/blog/kl-approx.html
    """
    return torch.expm1(log_ratio) - log_ratio


def metric_means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Means over tokens, from metrics that were added up."""
    tokens = sums["tokens"].clamp(min=1)
    return {name: (value / tokens).item() for name, value in sums.items() if name != "tokens"}
