"""The return of an episode: the weighted sum of its rewards, wherever they were put."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_rl.automatic_rewards import NAMES
from lightning_rl.episode import Episode, Reward
from lightning_rl.errors import RecipeError


def episode_return(episode: Episode, weights: Mapping[str, float]) -> float:
    """R = Σ weight[name] · value, over the rewards of the episode, its calls and its spans.

    Raises RecipeError as `require_weights`.
    """
    require_weights(episode, weights)
    return math.fsum(reward_weight(reward, weights) * reward.value for reward in episode.rewards)


def reward_weight(reward: Reward, weights: Mapping[str, float]) -> float:
    """Empty weights count every reward as it is. Automatic rewards have their value in the recipe and count as they are,
    unless a weight names them."""
    return weights.get(reward.name, 1.0)


def require_weights(episode: Episode, weights: Mapping[str, float]) -> None:
    """Raises RecipeError if there are weights and a name has none: a misspelt name would train for something else than what
    the recipe says. Weight 0 only records."""
    unknown = sorted({reward.name for reward in episode.rewards} - {*weights, *NAMES}) if weights else []
    if unknown:
        raise RecipeError(
            f"reward.weights: episode {episode.id} has rewards named {', '.join(unknown)}, "
            f"which have no weight (weights are given for {', '.join(sorted(weights))})",
            hint="add the names to reward.weights, with weight 0 to record a reward without training for it",
        )
