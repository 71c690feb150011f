"""Makers of records for the tests of the domain."""

from collections.abc import Sequence
from typing import Any

from lightning_rl.episode import Call, Episode, EpisodeStart, Outcome, Reward, Task


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
