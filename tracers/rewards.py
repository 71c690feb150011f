"""`reward`: a number that the agent itself knows, emitted while it runs.

Outside of a rollout it checks its arguments and does nothing else, so that an agent runs the same without us.
"""

from __future__ import annotations

import math
import time
from numbers import Real

from lightning_rl.episode import Reward
from lightning_rl.errors import LightningError
from tracers.context import OpenSpan, current_place, current_rollout, ended_rollout, is_out_of_reach, open_span
from tracers.plain import as_json


def reward(value: float, name: str = "reward", *, span: OpenSpan | None = None) -> None:
    """Record a reward at `span`, by default at the innermost open one; at the episode where that is the agent.

    Raises ValueError for what is no finite number or no name, LightningError in what a rollout left running after its end, and
    in a child process that is no part of it.
    """
    number = _finite(value)
    if number is None:
        raise ValueError(f"reward {name!r} must be a finite number, not {value!r}")
    if not isinstance(name, str) or not name:
        raise ValueError(f"a reward's name must be non-empty text, not {name!r}")
    rollout = current_rollout()
    if is_out_of_reach():
        raise LightningError(
            f"reward {name!r} cannot reach its rollout, which runs in the process that started this one",
            hint="return the number to that process and call lrl.reward there",
        )
    if rollout is None:
        if (over := ended_rollout()) is not None:
            raise LightningError(
                f"reward {name!r} comes after the end of its rollout ({over.episode_id})",
                hint="wait for tasks and threads before the agent returns",
            )
        return
    rollout.emit(
        Reward(
            episode_id=rollout.episode_id, name=as_json(name), value=number, time=time.time(), span_id=_span_id(span)
        )
    )


def _finite(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, Real) and math.isfinite(value) else None
    except OverflowError:  # a whole number that no float can hold
        return None


def _span_id(span: OpenSpan | None) -> str | None:
    if span is not None:
        return None if span.is_root else span.id
    place, own = current_place(), open_span.get()
    if place is None or (own is not None and own.is_root and own.id == place.span_id):
        return None
    return place.span_id
