"""How good a policy is: a mean over held-out episodes, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct

from lightning_rl.automatic_rewards import SOURCE
from lightning_rl.episode import Episode
from lightning_rl.errors import RewardError
from lightning_rl.recipe import RETURNED

Z95 = 1.959963984540054


class Score(Struct, frozen=True, kw_only=True):
    value: float
    n: int
    ci95: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.ci95[0]:.2f}, {self.ci95[1]:.2f}]"


def score(values: Sequence[float]) -> Score:
    """Mean and 95 % interval: Wilson's for successes and failures (Wilson 1927), else the normal approximation."""
    n = len(values)
    if not n:
        return Score(value=math.nan, n=0, ci95=(math.nan, math.nan))
    mean = math.fsum(values) / n
    if set(values) <= {0.0, 1.0}:
        centre = (mean + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n * n))
    else:
        centre = mean
        half = Z95 * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(n - 1, 1) / n)
    return Score(value=mean, n=n, ci95=(centre - half, centre + half))


def success_values(episodes: Sequence[Episode], reward: str) -> list[float]:
    """One value per task: the named reward of its counted attempt, 0 where the policy never got as far as being scored.

    In evaluation a failed episode is a failure of the policy to solve the task; in training it is none, see `outcomes`.
    Raises RewardError where `reward` is `return`, the default, and the agents return other rewards instead.
    """
    given = {r.name for episode in episodes if episode.counted for r in episode.rewards if r.source != SOURCE}
    if reward == RETURNED and given and RETURNED not in given:
        raise RewardError(
            f"no episode has a reward named {RETURNED!r}, which is to say whether a task was solved; there are "
            f"{', '.join(sorted(given))}",
            hint="name one of them in evaluate.success, or give reward.weights",
        )
    return [
        math.fsum(r.value for r in episode.rewards if r.name == reward) if episode.counted else 0.0
        for episode in episodes
    ]


def last_attempts(episodes: Sequence[Episode]) -> list[Episode]:
    """The counted attempt of every (task, sample), else its last one."""
    best: dict[tuple[str, int], Episode] = {}
    for episode in episodes:
        key = (episode.start.task.id, episode.start.sample)
        known = best.get(key)
        if known is None or episode.counted or (not known.counted and episode.start.attempt > known.start.attempt):
            best[key] = episode
    return list(best.values())
