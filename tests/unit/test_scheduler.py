"""The scheduler without a model: random traffic, cancellations, updates and little memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.manager.scheduler import Scheduler
from rollout_server.messages import Forward, Forwarded, SamplingParams

PAGE = 4


@dataclass
class Pages:
    """What a worker's memory would hold: for every slot, (version, token prefix up to it)."""

    content: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = field(default_factory=dict)


def run_pass(scheduler: Scheduler, forward: Forward, pages: Pages) -> Forwarded:
    """A worker whose next token is a function of the prefix, and which checks every key that it is told to read."""
    version = scheduler.version
    prefixes = []
    for row in forward.rows:  # first everybody writes, as every layer does
        known = row.start + len(row.ids)
        assert len(row.pages) * PAGE >= known
        before: tuple[int, ...] = ()
        if row.start:
            page, offset = row.pages[(row.start - 1) // PAGE], (row.start - 1) % PAGE
            prefixes.append((page, offset))
            before = pages.content.get((page, offset), (version, ()))[1] if (page, offset) in pages.content else ()
        for i, token in enumerate(row.ids):
            position = row.start + i
            before = (*before, token)
            pages.content[row.pages[position // PAGE], position % PAGE] = (version, before)
    ids = []
    for row in forward.rows:  # then everybody reads
        prefix: tuple[int, ...] = ()
        for position in range(row.start + len(row.ids)):
            slot_version, slot_prefix = pages.content[row.pages[position // PAGE], position % PAGE]
            assert slot_version == version, "a page of old weights was read"
            prefix = (*prefix, slot_prefix[-1])
            assert len(slot_prefix) <= position + 1
        assert list(prefix[row.start :]) == row.ids
        ids.append(next_token(prefix) if row.sampling is not None else -1)
    n = len(ids)
    return Forwarded(step=forward.step, ids=ids, logprobs=[0.0] * n, top_logprobs=[], scores=[[]] * n, seconds=0.0)


def next_token(prefix: tuple[int, ...]) -> int:
    return hash(prefix) % 5 + 1


def expected(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(tuple(ids)))
    return ids[len(prompt) :]


requests = st.tuples(
    st.lists(st.integers(1, 2), min_size=1, max_size=20),  # two ids only: many shared prefixes
    st.integers(1, 8),
    st.integers(0, 6),  # arrives after so many passes
    st.booleans(),  # is cancelled some time later
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=14), st.integers(7, 20), st.integers(1, 5), st.integers(2, 12), st.data()
)
def test_random_traffic(traffic: list, pages: int, max_batch: int, max_step_tokens: int, data: st.DataObject) -> None:
    scheduler = Scheduler(pages=pages, page_size=PAGE, max_batch=max_batch, max_step_tokens=max_step_tokens)
    memory = Pages()
    update_at = data.draw(st.sets(st.integers(1, 20), max_size=2))
    outputs: dict[str, list[int]] = {}
    finished: set[str] = set()
    cancelled: set[str] = set()
    for passes in range(3000):
        for i, (prompt, new, at, cancel) in enumerate(traffic):
            if at == passes:
                outputs[str(i)] = []
                scheduler.submit(str(i), prompt, SamplingParams(max_tokens=new))
            if cancel and passes == at + 3 and i % 2:  # between passes
                scheduler.cancel(str(i))
                cancelled.add(str(i))
        if passes in update_at:
            scheduler.set_version(scheduler.version + 1)
        forward = scheduler.plan()
        if forward is None:
            if passes > 12:
                break
            continue
        assert sum(len(row.ids) for row in forward.rows) <= max(max_step_tokens, max_batch)
        for i, (_, _, at, cancel) in enumerate(traffic):
            if cancel and passes >= at + 3 and not i % 2 and str(i) not in cancelled:  # while a pass is under way
                scheduler.cancel(str(i))
                cancelled.add(str(i))
        for event in scheduler.apply(run_pass(scheduler, forward, memory)):
            outputs[event.request_id].append(event.id)
            if event.finish_reason:
                finished.add(event.request_id)
        scheduler.check_integrity()
    assert scheduler.idle, "a request starved"
    for i, (prompt, new, _, _) in enumerate(traffic):
        if str(i) in finished:
            assert outputs[str(i)] == expected(prompt, new)
        else:
            assert str(i) in cancelled
    for root in scheduler.tree.roots():
        scheduler.tree.drop(root)
    assert scheduler.pool.free == pages, "pages leaked"


def test_first_come_first_served() -> None:
    scheduler = Scheduler(pages=64, page_size=PAGE, max_batch=1, max_step_tokens=16)
    for i in range(5):
        scheduler.submit(str(i), [i + 1] * 5, SamplingParams(max_tokens=2))
    order = []
    memory = Pages()
    while (forward := scheduler.plan()) is not None:
        order += [e.request_id for e in scheduler.apply(run_pass(scheduler, forward, memory)) if e.finish_reason]
    assert order == [str(i) for i in range(5)]


def test_a_request_that_can_never_fit_is_refused() -> None:
    scheduler = Scheduler(pages=4, page_size=PAGE, max_batch=1, max_step_tokens=16)
    with pytest.raises(ValueError, match="17 tokens"):
        scheduler.submit("a", [1] * 10, SamplingParams(max_tokens=7))
