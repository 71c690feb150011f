"""Makers of records for the tests of the domain."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_rl.algorithms.settings import AdvantageSettings
from lightning_rl.credit import bind, rule_function
from lightning_rl.credit.records import Credits, compared_in_group
from lightning_rl.credit.rollouts import rollout_of
from lightning_rl.episode import Call, Episode, EpisodeStart, Outcome, Reward, Task
from lightning_rl.recipe import Recipe
from lightning_rl.transition import Transition, call_masks, group_transitions, learning_calls, settle


def make_start(id: str = "e", **values: Any) -> EpisodeStart:
    return EpisodeStart(id=id, task=Task(id="t", input={}), **{"phase": "train"} | values)


def make_call(
    prompt: Sequence[int], sampled: Sequence[int], id: str = "c", episode_id: str = "e", **values: Any
) -> Call:
    defaults = {
        "index": 0,
        "model": "m",
        "logprobs": [-0.5] * len(sampled),
        "versions": [0] * len(sampled),
        "temperature": 1.0,
        "finish_reason": "stop",
    }
    return Call(id=id, episode_id=episode_id, prompt_ids=[*prompt], sampled_ids=[*sampled], **defaults | values)


def make_episode(
    id: str,
    calls: Sequence[Call] = (),
    rewards: dict[str, float] | None = None,
    outcome: Outcome | None = Outcome.COMPLETED,
    counted: bool = True,
) -> Episode:
    return Episode(
        start=make_start(id),
        calls=[*calls],
        rewards=[Reward(episode_id=id, name=name, value=value) for name, value in (rewards or {}).items()],
        outcome=outcome,
        counted=counted,
    )


def credits_of(
    group: Sequence[Episode], rule: str = "equal", weights: dict[str, float] | None = None, **arguments: Any
) -> Credits:
    """Of all calls, by a rule of ours."""
    rollouts = [rollout_of(episode, weights or {}, [call.id for call in episode.calls]) for episode in group]
    return bind(rule_function(rule), arguments, rule)(rollouts)


def transitions_of(
    group: Sequence[Episode],
    returns: dict[str, float],
    normalise: Any,
    *,
    learns: Sequence[str] = ("*",),
    adapters: Sequence[str] = (),
) -> list[Transition]:
    """From returns by call id, compared in the group as `equal` does."""
    rollouts = [rollout_of(episode, {}, learning_calls(episode, learns, adapters)) for episode in group]
    credits = compared_in_group(rollouts, {call.id: returns[call.id] for r in rollouts for call in r.calls})
    settings = AdvantageSettings(normalise=normalise)
    masks = {id: mask for episode in group for id, mask in call_masks(episode, learns, adapters).items()}
    transitions = group_transitions(group, credits, settings, masks)
    return settle(transitions, {episode.id: episode.start.group for episode in group})


def make_recipe(folder: Path, **sections: Any) -> Recipe:
    """With files of its own in the folder, and `good` as the reward that counts."""
    (folder / "a.py").write_text("def run(**task): ...\ndef tasks(seed): ...\ndef reward(task, episode): ...\n")
    values: dict[str, Any] = {
        "name": "r",
        "model": {"name": "tiny-llama"},
        "agent": {"function": "a.py:run"},
        "tasks": {"function": "a.py:tasks"},
        "reward": {"function": "a.py:reward", "weights": {"good": 1.0}},
        "train": {"steps": 1},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return Recipe.model_validate(values, context={"folder": folder})
