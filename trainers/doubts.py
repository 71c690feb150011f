"""What a person should hear of a step before it is trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from lightning_rl.agents import callers
from lightning_rl.errors import RecipeError
from lightning_rl.ledger import UNKNOWN_AGENT
from lightning_rl.recipe import Recipe
from lightning_rl.transition import ESTIMATED_AS_ZERO, NOT_OF_THE_LEARNER, Mask
from trainers.learning import StepData

NAMED = 20
"""Names that a line has at most."""


def doubts(recipe: Recipe, data: StepData, *, is_first: bool) -> list[str]:
    """Lines, of which some are only for a run's first step.

    Raises RecipeError where nobody learns in the first step: that is a misspelt name. Later, those who learn did not come to it.
    """
    lines = []
    if (nobody := nobody_learns(recipe, data)) and is_first:
        raise RecipeError(
            nobody,
            hint="name an agent, a graph node or a model that is asked for, and leave its calls to the policy in agent.routes",
        )
    if nobody:
        lines.append(f"nothing is trained: {nobody}")
    elif why := _all_left_out(data):
        lines.append(f"nothing is trained: {why}")
    lonely = groups_of_one(data)
    if lonely:
        lines.append(
            f"{len(lonely)} of {len(groups(data))} groups have one rollout that counts, which cannot be compared and is not "
            f"trained on: {_named(lonely)}"
        )
    lines += _alone(data, lonely)
    if is_first:
        lines += [*_unmet_weights(recipe, data), *_restricted(recipe, data)]
    return lines


def nobody_learns(recipe: Recipe, data: StepData) -> str:
    """Why, if no call of the step is of those that `agent.learns` says; else "". A step without calls says nothing."""
    if not data.transitions or any(t.masked not in NOT_OF_THE_LEARNER for t in data.transitions):
        return ""
    seen = {name for episode in data.counted for caller in callers(episode).values() for name in caller.names if name}
    return (
        f"agent.learns: no call of the policy fits {', '.join(recipe.agent.learns)}; the calls of this step were made under the "
        f"names {_named(sorted(seen)) or '(none)'}"
    )


def groups(data: StepData) -> list[str]:
    """Those with an episode that counts, in order."""
    return list(dict.fromkeys(episode.start.group for episode in data.counted))


def groups_of_one(data: StepData) -> list[str]:
    """Groups in which a single rollout of the learner counts, and all of it that could be trained on is left out for that. Choices
    that a rollout made in one place (`tree`) may be compared with each other, and are trained on."""
    group_of = {episode.id: episode.start.group for episode in data.counted}
    learners = {t.episode_id for t in data.transitions if t.masked not in NOT_OF_THE_LEARNER}
    sizes = Counter(group_of[episode_id] for episode_id in learners)
    alone = {group_of[t.episode_id] for t in data.transitions if t.masked is Mask.GROUP_OF_ONE}
    compared = {group_of[t.episode_id] for t in data.transitions if t.masked is None or t.masked in ESTIMATED_AS_ZERO}
    return [group for group in groups(data) if group in alone - compared and sizes[group] == 1]


def _alone(data: StepData, lonely: Collection[str]) -> list[str]:
    """Of calls that were compared with nobody in groups beside `lonely`: those of an agent that came in one rollout only, say."""
    counts: Counter[str] = Counter()
    alone = {t.call_id for t in data.transitions if t.masked is Mask.GROUP_OF_ONE}
    for episode in data.counted:
        if episode.start.group not in lonely:
            counts.update(caller.agent or UNKNOWN_AGENT for id, caller in callers(episode).items() if id in alone)
    if not counts:
        return []
    by = _named([f"{count} of {agent}" for agent, count in sorted(counts.items())])
    return [f"{by}: calls that no other rollout of the group can be compared with, and that are not trained on"]


def _all_left_out(data: StepData) -> str:
    """Why, if the recipe's `restricted` and `max_staleness` leave out all that the learner did; else ""."""
    masks = Counter(t.masked for t in data.transitions if t.masked not in NOT_OF_THE_LEARNER)
    if not masks or not masks.keys() <= {Mask.RESTRICTED, Mask.STALE}:
        return ""
    by = {
        Mask.RESTRICTED: "were sampled under restrictions, and train.restricted is mask",
        Mask.STALE: "are of policies older than train.max_staleness",
    }
    counts = [f"{masks[mask]} {what}" for mask, what in by.items() if masks[mask]]
    return f"of the learner's {masks.total()} calls {', '.join(counts)}"


def _unmet_weights(recipe: Recipe, data: StepData) -> list[str]:
    given = {reward.name for episode in data.counted for reward in episode.rewards}
    unmet = [name for name, weight in recipe.reward.weights.items() if weight and name not in given]
    if not unmet or not data.counted:
        return []
    return [f"reward.weights: no episode of this step has a reward named {', '.join(unmet)}"]


def _restricted(recipe: Recipe, data: StepData) -> list[str]:
    """Of calls that are trained on although they were sampled from another distribution."""
    trained = {t.call_id for t in data.transitions if t.masked is None}
    calls = [call for episode in data.counted for call in episode.calls if call.id in trained and call.restricted]
    if not calls:
        return []
    by = sorted({what for call in calls for what in call.restricted})
    return [
        f"{len(calls)} of {len(trained)} calls that are trained on were sampled under restrictions ({', '.join(by)}): nothing "
        "corrects for those; train.restricted=mask leaves such calls out"
    ]


def _named(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
