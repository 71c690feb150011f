"""`span`: a node of the agent's own structure, recorded when it ends.

Outside of a rollout a span does nothing, so that an agent runs the same without us. Spans nest by context; a span that
fails keeps its traceback and lets the exception pass.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_rl.episode import Span
from tracers.context import OpenSpan, current_rollout, new_span_id, open_span

KINDS = ("agent", "chain", "tool", "handoff")


@contextmanager
def span(name: str, kind: str = "chain", **attributes: Any) -> Iterator[OpenSpan]:
    """Record what happens inside as a span. Attributes must be JSON."""
    if kind not in KINDS:
        raise ValueError(f"span kind must be one of {', '.join(KINDS)}, not {kind!r}")
    parent = open_span.get()
    agent = name if kind == "agent" else (parent.agent if parent else None)
    opened = OpenSpan(id=new_span_id(), is_root=parent is None, agent=agent, began=time.perf_counter())
    rollout = current_rollout()
    if rollout is None:
        yield opened
        return
    token = open_span.set(opened)
    started_at, error = time.time(), None
    try:
        yield opened
    except BaseException:
        error = traceback.format_exc()
        raise
    finally:
        open_span.reset(token)
        rollout.emit(
            Span(
                id=opened.id,
                episode_id=rollout.episode_id,
                name=name,
                kind=kind,
                parent_id=parent.id if parent else None,
                started_at=started_at,
                ended_at=time.time(),
                attributes=attributes,
                error=error,
            )
        )
