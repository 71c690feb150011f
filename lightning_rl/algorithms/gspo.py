"""GSPO: one ratio for the whole call, since its reward is one.

    s = exp(mean over the call's tokens of log π / π_old)
    A = (R − mean of the group) / (std of the group + 1e-4)
    loss = Σ w · c · −min(s A, clip(s, 1 − 3e-4, 1 + 4e-4) A),  with w = 1 / (rollouts · tokens of the rollout)

Zheng et al., arXiv 2507.18071. In the gradient, s is sg(s) · π / sg(π) (its equation of GSPO-token), so that A and c may differ
from token to token; where they do not, that is the gradient of s itself. Its 1/G and 1/|y_i|
weigh each output the same; an output is a rollout here. Left out: the KL penalty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rl.algorithms.sequences import sequence_means
from lightning_rl.algorithms.settings import AdvantageSettings, Settings

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS = Settings(
    name="gspo",
    advantage=AdvantageSettings(normalise="std"),
    ratio="sequence",
    clip_low=3e-4,
    clip_high=4e-4,
    aggregation="rollout",
)


def sequence_log_ratio(log_ratio: Tensor, sequences: Tensor) -> Tensor:
    """log s of each token's call, with the gradient of that token's own log-prob; [L] from [L]."""
    mean = sequence_means(log_ratio.detach(), sequences)
    return mean + (log_ratio - log_ratio.detach())
