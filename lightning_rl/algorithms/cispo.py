"""CISPO: the ratio is clipped as a weight, so that no token loses its gradient.

    A = (R − mean of the group) / (std of the group + 1e-4)
    loss = −Σ w · c · sg(clip(ρ, 1 − ε_low, 1 + ε_high)) · A · log π

MiniMax-M1, arXiv 2506.13585, equations 4 and 5. Projects mean different things by these knobs: here, as in the paper and in verl,
the bounds of ρ are 1 − ε_low and 1 + ε_high; TRL's `epsilon_high` is the upper bound itself, and it has no lower one. The paper
sets no lower bound either (ε_low = 1) and gives no figure for the upper; ρ ≤ 5 (ε_high = 4) is what TRL advises, after
arXiv 2510.13786. Left out: the dynamic sampling and the length penalty that the paper takes from DAPO.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rl.algorithms.settings import AdvantageSettings, Settings

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS = Settings(
    name="cispo",
    advantage=AdvantageSettings(normalise="std"),
    surrogate="cispo",
    clip_low=1.0,
    clip_high=4.0,
)


def surrogate(logprobs: Tensor, ratio: Tensor, advantages: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The loss of each token, and whether its weight was clipped (whatever the sign of A); [L] each."""
    constant = ratio.detach()
    weight = constant.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return -weight * advantages * logprobs, weight != constant
