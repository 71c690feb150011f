"""Divergence between two policies, estimated at the tokens that one of them sampled.

With d = log q − log p at a token drawn from q, each estimates KL(q ‖ p) (http://joschu.net/blog/kl-approx.html):

    k1 = d                    unbiased; of either sign
    k2 = d² / 2               biased; never negative
    k3 = exp(−d) − 1 + d      unbiased; never negative

Of gradients with respect to q, k2 alone has that of KL(q ‖ p) on average, where the tokens are q's own: d ∇log q. That of k1 is
zero on average, so that k1 has no place in a loss; that of k3 is (1 − exp(−d)) ∇log q, which is ∇KL(p ‖ q) on average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lightning_rl.algorithms.settings import Kl, KlEstimator

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_LOG_RATIO = 20.0
"""Logarithms of ratios are held within ± this before they are exponentiated: e^20 is 4.9e8, and float32 overflows from 88 on. A
token beyond it has a finite loss and no gradient through that ratio. verl bounds k3's d by the same, TRL does not."""
LARGEST_K3_PENALTY = 10.0
"""What k3 is at most where it is taken from a reward, as in verl. Without it one token that the reference finds very likely, and
the policy does not (d = −20), would cost 4.9e8 and be all of the baseline. k1 and k2 grow slowly, and are not bounded."""


def k1(log_ratio: Tensor) -> Tensor:
    """`log_ratio`: log q − log p of tokens drawn from q, any shape."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """`log_ratio`: log q − log p of tokens drawn from q, any shape."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """`log_ratio`: log q − log p of tokens drawn from q, any shape."""
    bounded = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return (-bounded).expm1() + bounded


ESTIMATORS: dict[KlEstimator, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def penalties(kl: Kl, old: Sequence[float], reference: Sequence[float]) -> list[float]:
    """What each token costs: the coefficient times the estimate of KL(π_old ‖ π_ref) at it, k3 up to `LARGEST_K3_PENALTY`.

    `old`, `reference`: log-probs of the same tokens. ValueError if they are not equally many.
    """
    import torch

    if len(old) != len(reference):
        raise ValueError(f"{len(old)} tokens have log-probs by the policy, {len(reference)} by the reference")
    log_ratio = torch.tensor(old, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)
    estimate = ESTIMATORS[kl.estimator](log_ratio)
    if kl.estimator == "k3":
        estimate = estimate.clamp(max=LARGEST_K3_PENALTY)
    costs: list[float] = (kl.coefficient * estimate).tolist()
    return costs
