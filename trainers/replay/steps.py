"""A step of a run once more, from what is stored of it: rewarded anew, credited anew. Pure but for the reward function.

What the agent emitted (also by OpenTelemetry) stays. What the recipe decides is given anew by the present one: automatic rewards,
and its function's, or where it has none those that the agent returned, read from its answer. Episodes that did not count stay as
they are: what an outcome means was decided when it was known.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Struct, structs

from lightning_rl.automatic_rewards import SOURCE as AUTOMATIC
from lightning_rl.automatic_rewards import require_free_names
from lightning_rl.episode import Episode, Outcome, Reward
from lightning_rl.errors import LightningError, RecipeError, RewardError
from lightning_rl.recipe import RETURNED, Recipe
from lightning_rl.scores import CallScores
from trainers.learning import StepData, learn_from
from trainers.runner.scoring import BY_RETURNING, FUNCTION, NoReward, given_rewards, no_reward, returned_rewards

RewardFunction = Callable[..., Any]
UNKNOWN = "unknown"
"""`Reward.source` in stores of versions that did not record it: such a reward is replaced by one of its name; one named `return`
was returned."""


class ReplayedStep(Struct, frozen=True, kw_only=True):
    step: int
    """As the store counts, from 0."""
    stored: list[Episode]
    """All attempts, as they were rewarded then."""
    before: StepData | None
    """What was learned then; None if the recipe that it is credited by does not fit the stored rewards."""
    unfit: str
    """Why not."""
    after: StepData
    """What is learned now."""


def replayed(
    step: int,
    stored: Sequence[Episode],
    then: Recipe,
    now: Recipe,
    score: RewardFunction | None,
    *,
    scores: Mapping[str, CallScores] | None = None,
    scored_then: bool = False,
) -> ReplayedStep:
    """`then` is the recipe that the stored rewards are credited by, `now` the one that they are replaced by; `score` is its
    reward function. `scores` are what the trainer that is retrained says about the calls, `scored_then` whether the run's own
    trainer said the same.

    Raises RewardError, or what the function raises as a RewardError, with the episode; RecipeError as `learn_from`.
    """
    before, unfit = None, ""
    try:
        before = learn_from(then, stored, scores if scored_then else None)
    except RecipeError as error:
        unfit = str(error)
    after = learn_from(now, [rewarded_anew(episode, now, score) for episode in stored], scores)
    return ReplayedStep(step=step, stored=list(stored), before=before, unfit=unfit, after=after)


def rewarded_anew(episode: Episode, recipe: Recipe, score: RewardFunction | None) -> Episode:
    """The episode with what the agent emitted, and the rewards that the recipe gives or lets the agent return."""
    if not episode.counted:
        return episode
    own = [
        reward
        for reward in episode.rewards
        if reward.source not in (AUTOMATIC, FUNCTION, BY_RETURNING)
        and not (score is not None and reward.source == UNKNOWN and reward.name == RETURNED)
    ]
    has_others = bool(own or recipe.reward.automatic.rules().given)
    returned = [] if score is not None else _returned(episode, recipe, has_others)
    record = structs.replace(episode, rewards=own, counted=False, ended_at=0.0)  # as it was judged when it ended
    try:
        given = given_rewards(record, score, recipe.reward.automatic.rules(), recipe.model.adapters)
    except LightningError:
        raise
    except Exception as error:
        raise RewardError(
            f"the reward function {recipe.reward.function} failed on episode {episode.id}: {type(error).__name__}: {error}",
            hint=f"look at the episode: lrl traces show RUN {episode.id}",
        ) from error
    given = [*returned, *given]
    replaced = {reward.name for reward in given}
    kept = [reward for reward in own if reward.source != UNKNOWN or reward.name not in replaced]
    require_free_names([*kept, *given])
    return structs.replace(episode, rewards=[*kept, *given])


def _returned(episode: Episode, recipe: Recipe, has_others: bool) -> list[Reward]:
    """As the agent's process reads them from the answer; RewardError if there are none, and no others."""
    try:
        is_command = recipe.agent.command is not None
        returned = [] if is_command else returned_rewards(episode.answer, episode.id, recipe.reward_names)
        if not returned and not has_others and episode.outcome is Outcome.COMPLETED:
            raise no_reward(episode.answer, is_command=is_command)
    except NoReward as error:
        raise RewardError(
            f"episode {episode.id}: {error}",
            hint="--reward FILE.py:FUNCTION, or reward.function, judges what was answered",
        ) from error
    return returned


def table(replay: ReplayedStep) -> list[list[str]]:
    """Means then and now, and in how many episodes they differ: a row for each reward, for the return R, for |advantage|."""
    counted = [episode for episode in replay.stored if episode.counted]
    then = {episode.id: by_name(episode.rewards) for episode in counted}
    now = {episode.id: by_name(episode.rewards) for episode in replay.after.counted}
    names = sorted({name for rewards in [*then.values(), *now.values()] for name in rewards})
    rows = [_row(name, _named(then, name), _named(now, name)) for name in names]
    for title, field in (("return R", "ret"), ("|advantage|", "advantage")):
        before = None if replay.before is None else _of_calls(replay.before, field)
        rows.append(_row(title, before, _of_calls(replay.after, field)))
    return rows


def by_name(rewards: Sequence[Reward]) -> dict[str, float]:
    """Values of one name are added up."""
    values: dict[str, list[float]] = defaultdict(list)
    for reward in rewards:
        values[reward.name].append(reward.value)
    return {name: math.fsum(parts) for name, parts in values.items()}


def report(replay: ReplayedStep) -> dict[str, Any]:
    """The whole of it as JSON: each counted episode's rewards, each of its calls' return and advantage, then and now. The step
    is from 1, as the console counts."""
    then = {} if replay.before is None else {t.call_id: t for t in replay.before.transitions}
    now = {transition.call_id: transition for transition in replay.after.transitions}
    rewards = {episode.id: by_name(episode.rewards) for episode in replay.after.counted}

    def credit(call_id: str) -> dict[str, Any]:
        sides = {"then": then.get(call_id), "now": now[call_id]}
        return {
            side: {"return": t.ret, "advantage": t.advantage, "masked": t.masked} if t else None
            for side, t in sides.items()
        }

    return {
        "step": replay.step + 1,
        "episodes": [
            {
                "id": episode.id,
                "rewards": {"then": by_name(episode.rewards), "now": rewards[episode.id]},
                "calls": {call.id: credit(call.id) for call in episode.calls},
            }
            for episode in replay.stored
            if episode.counted
        ],
        "ledger": {
            "then": replay.before.ledger.to_dict() if replay.before else None,
            "now": replay.after.ledger.to_dict(),
        },
    }


def _named(rewards: Mapping[str, Mapping[str, float]], name: str) -> dict[str, list[float]]:
    return {id: [values[name]] for id, values in rewards.items() if name in values}


def _of_calls(data: StepData, field: str) -> dict[str, list[float]]:
    """By episode, of its calls in order."""
    values: dict[str, list[float]] = defaultdict(list)
    for transition in data.transitions:
        values[transition.episode_id].append(getattr(transition, field))
    return values


def _row(title: str, then: Mapping[str, list[float]] | None, now: Mapping[str, list[float]]) -> list[str]:
    size = abs if title.startswith("|") else float

    def mean(values: Mapping[str, list[float]] | None) -> str:
        flat = [size(value) for parts in (values or {}).values() for value in parts]
        return f"{statistics.fmean(flat):.4f}" if flat else "–"

    changed = "–" if then is None else str(sum(then.get(id) != now.get(id) for id in {*then, *now}))
    return [title, mean(then), mean(now), changed]
