"""`reward`: a number that the agent itself knows, emitted while it runs.

Outside of a rollout it checks its arguments and does nothing else, so that an agent runs the same without us.
"""

from __future__ import annotations

import math
import time
from numbers import Real

from lightning_rl.episode import Reward
from tracers.context import OpenSpan, current_rollout, open_span


def reward(value: float, name: str = "reward", *, span: OpenSpan | None = None) -> None:
    """Record a reward at `span`, by default at the innermost open one; at the episode where that is the agent."""
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"reward {name!r} must be a finite number, not {value!r}")
    if not isinstance(name, str) or not name:
        raise ValueError(f"a reward's name must be non-empty text, not {name!r}")
    rollout = current_rollout()
    if rollout is None:
        return
    place = span or open_span.get()
    rollout.emit(
        Reward(
            episode_id=rollout.episode_id,
            name=name,
            value=float(value),
            time=time.time(),
            span_id=None if place is None or place.is_root else place.id,
        )
    )
