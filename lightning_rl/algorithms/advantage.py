"""How much better a return is than what its group earned.

The group is the rollouts of one task under one policy, and each rollout counts once, however many calls it made: a
baseline over calls would lean towards the longer rollouts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

Normalise = Literal["std", "none"]
EPSILON = 1e-4
"""Added to the standard deviation, as TRL does."""


class Baseline(Struct, frozen=True, kw_only=True):
    """advantage = (return − mean) / scale"""

    mean: float
    scale: float

    def advantage(self, value: float) -> float:
        return (value - self.mean) / self.scale


def group_baseline(rollout_returns: Sequence[float], normalise: Normalise) -> Baseline:
    """`std`: GRPO (arXiv 2402.03300), scale = unbiased standard deviation + 1e-4. `none`: Dr. GRPO (arXiv 2503.20783),
    scale = 1, which does not favour tasks that nearly always or nearly never succeed."""
    mean = statistics.fmean(rollout_returns)
    if normalise == "none" or len(rollout_returns) < 2:
        return Baseline(mean=mean, scale=1.0)
    variance = math.fsum((value - mean) ** 2 for value in rollout_returns) / (len(rollout_returns) - 1)
    return Baseline(mean=mean, scale=math.sqrt(variance) + EPSILON)
