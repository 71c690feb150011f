"""However the engine's messages and the readers' leaving interleave, a request ends once and is cancelled if need be."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server import messages as m
from rollout_server.api.engine.engine_client import Generation
from rollout_server.api.errors import EngineError


def piece(index: int, ids: list[int], finish_reason: str | None = None, cached: int = 0) -> m.Tokens:
    return m.Tokens(
        request_id="r",
        index=index,
        ids=ids,
        logprobs=[-float(i) for i in ids],
        versions=[0] * len(ids),
        finish_reason=finish_reason,
        cached_tokens=cached,
    )


@given(
    n=st.integers(1, 4),
    steps=st.lists(st.tuples(st.sampled_from(["token", "last", "close", "fail", "close all"]), st.integers(0, 3))),
)
def test_any_interleaving(n: int, steps: list[tuple[str, int]]) -> None:
    """A choice that is closed before its end is cancelled once: alone while others are awaited, else with the request."""
    cancelled: list[int | None] = []
    ends: list[None] = []
    generation = Generation("r", n, lambda _, index: cancelled.append(index), lambda: ends.append(None))
    finished: set[int] = set()
    closed: set[int] = set()
    expected: list[int | None] = []
    over = False
    sent = dict.fromkeys(range(n), 0)
    for kind, at in steps:
        index = at % n
        if kind in ("token", "last") and index not in finished and not over:
            generation.deliver(piece(index, [1], "stop" if kind == "last" else None))
            sent[index] += index not in closed
            if kind == "last":
                finished.add(index)
        elif kind == "close":
            generation.streams[index].close()
            if not over and index not in closed | finished:
                expected.append(index if len(closed | finished) < n - 1 else None)
            closed.add(index)
        elif kind == "close all":
            generation.close()
            if not over:
                expected.append(None)
            closed = set(range(n))
        elif kind == "fail" and not over:
            generation.deliver(EngineError("aborted", "new weights"))
            finished = set(range(n))
        over = over or finished | closed == set(range(n))
        assert len(ends) == over
        assert cancelled == expected
    for index, stream in enumerate(generation.streams):
        arrived = stream.take()
        assert (len(arrived.ids) if arrived else 0) == sent[index]


def test_reading_merges_and_waits() -> None:
    async def run() -> None:
        generation = Generation("r", 2, lambda *_: None, lambda: None)
        first, second = generation.streams
        to_end = asyncio.ensure_future(second.read(to_end=True))
        generation.deliver(piece(0, [1], cached=9))
        generation.deliver(piece(1, [5]))
        generation.deliver(piece(0, [2, 3]))
        merged = await first.read()
        assert (merged.index, merged.ids, merged.logprobs, merged.cached_tokens) == (
            0,
            [1, 2, 3],
            [-1.0, -2.0, -3.0],
            9,
        )
        await asyncio.sleep(0)
        assert not to_end.done()
        generation.deliver(piece(1, [6], "length"))
        whole = await to_end
        assert (whole.index, whole.ids, whole.finish_reason) == (1, [5, 6], "length")
        generation.deliver(EngineError("aborted", "new weights"))
        with pytest.raises(EngineError, match="new weights"):
            await generation.read()

    asyncio.run(run())
