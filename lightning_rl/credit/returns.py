"""The return of an episode: the weighted sum of its rewards, wherever they were put."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_rl.automatic_rewards import NAMES
from lightning_rl.episode import Episode
from lightning_rl.errors import RecipeError


def episode_return(episode: Episode, weights: Mapping[str, float]) -> float:
    """R = Σ weight[name] · value, over the rewards of the episode, its calls and its spans.

    Empty weights count every reward as it is. Otherwise each name must have a weight, 0 to record it only: a misspelt
    name would else train for something else than what the recipe says. Automatic rewards have their value in the recipe
    and count as they are, unless a weight names them.
    """
    unknown = sorted({reward.name for reward in episode.rewards} - {*weights, *NAMES}) if weights else []
    if unknown:
        raise RecipeError(
            f"reward.weights: episode {episode.id} has rewards named {', '.join(unknown)}, "
            f"which have no weight (weights are given for {', '.join(sorted(weights))})",
            hint="add the names to reward.weights, with weight 0 to record a reward without training for it",
        )
    return math.fsum(weights.get(reward.name, 1.0) * reward.value for reward in episode.rewards)
