"""From an episode to the rollout that credit rules see: the learner's calls, and what was earned where."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping

from lightning_rl.agents import callers
from lightning_rl.credit.placement import placed
from lightning_rl.credit.records import Rollout
from lightning_rl.credit.returns import require_weights, reward_weight
from lightning_rl.episode import Episode


def rollout_of(
    episode: Episode,
    weights: Mapping[str, float],
    learning: Collection[str],
    *,
    shaping: Mapping[str, float] | None = None,
    values: Mapping[str, list[float]] | None = None,
) -> Rollout:
    """`weights` are the recipe's, `learning` the ids of the calls that the learner made, `shaping` what the objective adds to
    the reward of a call (`algorithms.shaping`, and the reference policy's penalty), `values` the critic's, by call id.

    Raises RecipeError if a reward has no weight, see `returns.require_weights`.
    """
    require_weights(episode, weights)
    calls = sorted((call for call in episode.calls if call.id in learning), key=lambda call: (call.index, call.id))
    parts: dict[str | None, list[float]] = defaultdict(list)
    own = {call.id for call in calls}
    for reward, call_id in placed(episode):
        parts[call_id if call_id in own else None].append(reward_weight(reward, weights) * reward.value)
    for call_id, value in (shaping or {}).items():
        if call_id in own:
            parts[call_id].append(value)
    caller_of = callers(episode)
    return Rollout(
        episode=episode,
        calls=calls,
        agents={call.id: caller_of[call.id].agent or "" for call in calls},
        earned={call.id: math.fsum(parts[call.id]) for call in calls},
        outcome=math.fsum(parts[None]),
        values={call.id: values[call.id] for call in calls} if values else {},
    )
