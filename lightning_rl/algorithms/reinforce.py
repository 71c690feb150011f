"""REINFORCE: the log-probability of what was sampled, times its advantage. No ratio, no clipping, no critic.

    A = R − mean over the rollouts of the step
    loss = −Σ w · c · A · log π,  with w = 1 / (rollouts · tokens of the rollout)

Williams 1992, https://doi.org/10.1007/BF00992696, with the step's mean return as the baseline. The correction c = π_old / μ alone
accounts for who sampled. Several updates on the same rollouts are not corrected for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rl.algorithms.settings import AdvantageSettings, Settings

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS = Settings(
    name="reinforce",
    advantage=AdvantageSettings(baseline="none", batch="mean"),
    surrogate="reinforce",
    aggregation="rollout",
)


def surrogate(logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each token, and whether it was clipped (never); [L] each."""
    return -advantages * logprobs, advantages.new_zeros(advantages.shape).bool()
