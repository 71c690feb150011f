"""What an episode earned, in its own process: what the agent returned, or what the recipe's reward function says of it.

A reward is a finite number with a name, at the episode or at a call or span that the episode has. Anything else is an error, of
the agent where it returned it, of ours where the reward function did.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
import traceback
from collections.abc import Callable, Collection, Generator
from numbers import Real
from pathlib import Path
from typing import Any

import msgspec

from lightning_rl.automatic_rewards import AutomaticRules, automatic_rewards, require_free_names
from lightning_rl.episode import Episode, Outcome, Reward
from lightning_rl.errors import LightningError
from lightning_rl.recipe import RETURNED
from trainers.runner.user_code import load_function
from trainers.runner.words import Done, FunctionAt

MAX_ERROR = 20_000
FUNCTION = "function"
"""`Reward.source` of what a reward function gives."""
BY_RETURNING = "returned"
"""`Reward.source` of what the agent returned, where no reward function judges it."""
SHOWN = 200


class NoReward(LightningError):
    """The agent gave no reward, or one that is none."""


def returned_rewards(answer: Any, episode_id: str, names: Collection[str] = ()) -> list[Reward]:
    """A number is the reward `return`; a dict of numbers by name is rewards if the recipe names one of them (`names`);
    anything else is an answer only.

    Raises NoReward for a number that is not finite.
    """
    values: dict[str, Any] = {}
    if isinstance(answer, Real):
        values = {RETURNED: answer}
    elif isinstance(answer, dict) and not answer.keys().isdisjoint(names):
        fit = all(isinstance(name, str) and name and isinstance(value, Real) for name, value in answer.items())
        values = answer if fit else {}
    for name, value in values.items():
        if not is_finite(value):
            raise NoReward(f"the agent returned the reward {name} = {value}; a reward must be a finite number")
    now = time.time()
    return [
        Reward(episode_id=episode_id, name=recordable(name), value=float(value), time=now, source=BY_RETURNING)
        for name, value in values.items()
    ]


def is_finite(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:
        return False


def no_reward(answer: Any, *, is_command: bool = False) -> NoReward:
    """The agent has ended, and nothing says how good it was."""
    if is_command:
        how = 'Write a line such as {"reward": 0.5}'
    else:
        how = (
            "Return a number, or numbers by names of which reward.weights or evaluate.success has one; or call "
            "lightning_rl.reward(value, name)"
        )
    said = "answered" if is_command else "returned"
    return NoReward(
        f"the agent gave no reward: it {said} {_short(answer)} and emitted none. {how}; "
        "or name a function in the recipe's reward.function"
    )


def judged(
    done: Done,
    function: FunctionAt | None,
    record: Episode,
    rules: AutomaticRules,
    adapters: Collection[str],
) -> Done:
    """`done` with the automatic rewards, and those of the recipe's function; an infrastructure error if either fails.
    `adapters` are the models that are not the policy."""
    path, name, module = function or ("", "", "")
    what = f"the reward function {path}:{name}" if function else "reward.automatic"
    try:
        score = load_function(Path(path), name, module) if function else None
        rewards = given_rewards(record, score, rules, adapters)
        require_free_names([*done.rewards, *record.rewards, *rewards])
    except BaseException:
        message = f"{what} failed on outcome {done.outcome}\n{last_traceback()}"
        return Done(outcome=Outcome.INFRASTRUCTURE_ERROR, answer=done.answer, error=message)
    return msgspec.structs.replace(done, rewards=[*done.rewards, *rewards])


def given_rewards(
    record: Episode, score: Callable[..., Any] | None, rules: AutomaticRules, adapters: Collection[str]
) -> list[Reward]:
    """What the recipe adds to the agent's own rewards: the automatic ones, and those of its function, which sees them."""
    rewards = automatic_rewards(record, rules, adapters=adapters)
    if score is not None:
        seen = msgspec.structs.replace(record, rewards=[*record.rewards, *rewards])
        rewards += checked(call_agent(score, record.start.task, seen), record)
    return rewards


def checked(result: Any, record: Episode) -> list[Reward]:
    """What a reward function returned, as rewards of this episode. Raises TypeError or ValueError."""
    now = time.time()
    if isinstance(result, dict):
        result = [Reward(episode_id=record.id, name=name, value=value) for name, value in result.items()]
    if not isinstance(result, list | tuple):
        raise TypeError(f"return {{name: number}} or a list of rewards, not {_short(result)}")
    calls, spans = {call.id for call in record.calls}, {span.id for span in record.spans}
    rewards: list[Reward] = []
    for reward in result:
        if not isinstance(reward, Reward):
            raise TypeError(f"return {{name: number}} or a list of rewards, not {_short(reward)} in it")
        if not isinstance(reward.name, str) or not reward.name:
            raise ValueError(f"a reward's name must be text, not {reward.name!r}")
        if not is_finite(reward.value):
            raise ValueError(f"reward {reward.name!r} must be a finite number, not {_short(reward.value)}")
        for what, place, known in (("call", reward.call_id, calls), ("span", reward.span_id, spans)):
            if place is not None and place not in known:
                raise ValueError(
                    f"reward {reward.name!r} is put at the {what} {place!r}, which this episode does not have"
                )
        value, at = float(reward.value), reward.time or now
        own = {"episode_id": record.id, "name": recordable(reward.name), "source": FUNCTION}
        rewards.append(msgspec.structs.replace(reward, value=value, time=at, **own))
    return rewards


def call_agent(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a sync or async function of the user's returns; of a generator the list of its items, unless it returns something."""
    result = function(*arguments)
    if inspect.isgenerator(result):
        return _exhausted(result)
    if not inspect.isawaitable(result) and not inspect.isasyncgen(result):
        return result

    async def finish() -> Any:
        return [item async for item in result] if inspect.isasyncgen(result) else await result

    return asyncio.run(finish())


def _exhausted(generator: Generator[Any, Any, Any]) -> Any:
    items: list[Any] = []
    while True:
        try:
            items.append(next(generator))
        except StopIteration as stop:
            return items if stop.value is None else stop.value


def last_traceback() -> str:
    """The current exception's, at a length and in characters that can be recorded."""
    return recordable(traceback.format_exc())


def recordable(text: str) -> str:
    return text[-MAX_ERROR:].encode(errors="backslashreplace").decode()


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= SHOWN else text[:SHOWN] + '…'}"
