"""What the three agents earn. `right`, whether the one letter that matters was right, only records (its weight is 0)."""

from lightning_rl.episode import Episode, Reward, Task

LUCK = 0.5
"""What a stroke of luck is worth. Five of them have a variance of 1.25, a decision taken blindly one of 0.19."""


def early_key(task: Task, episode: Episode) -> list[Reward]:
    """The episode earns 1 at its end if the first letter was right."""
    return [_whole(episode, "outcome", _right(task, episode)), _whole(episode, "right", _right(task, episode))]


def long_tail(task: Task, episode: Episode) -> list[Reward]:
    """The first call earns 1 at once if it was right; each later one its luck."""
    earned = [_right(task, episode), *(LUCK * luck for luck in episode.answer["luck"])]
    return [*_at_calls(episode, earned), _whole(episode, "right", _right(task, episode))]


def two_agents(task: Task, episode: Episode) -> list[Reward]:
    """The episode earns 1 if the planner was right; each of the worker's calls its luck."""
    earned = [0.0, *(LUCK * luck for luck in episode.answer["luck"])]
    return [*_at_calls(episode, earned)[1:], *early_key(task, episode)]


def _right(task: Task, episode: Episode) -> float:
    return float(episode.answer["said"][0] == task.input["key"])


def _whole(episode: Episode, name: str, value: float) -> Reward:
    return Reward(episode_id=episode.id, name=name, value=value)


def _at_calls(episode: Episode, earned: list[float]) -> list[Reward]:
    calls = sorted(episode.calls, key=lambda call: call.index)
    return [
        Reward(episode_id=episode.id, name="step", value=value, call_id=call.id)
        for call, value in zip(calls, earned, strict=True)
    ]
