"""The tree of shared page runs equals a trie built naively, and keeps what attention relies on."""

from __future__ import annotations

import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from rollout_server.kernels.interface import SharedRun
from rollout_server.worker.sharing import BLOCK_PAGES, Thresholds, shared_runs

SIZE = 16
BLOCK = SIZE * BLOCK_PAGES


def naive(
    rows: dict[int, list[tuple[int, ...]]], first: int, depth: int, least: int, pages: int
) -> set[tuple[object, ...]]:
    """`rows`: the visible blocks of rows that agree in the first `depth`; runs that begin at block `first`."""
    last = depth
    while len(rows) >= least and len({tuple(blocks[: last + 1]) for blocks in rows.values()}) == 1:
        if any(len(blocks) <= last for blocks in rows.values()):
            break
        last += 1
    found: set[tuple[object, ...]] = set()
    if (last - first) * BLOCK_PAGES >= pages:
        found.add((tuple(sorted(rows)), first * BLOCK_PAGES, last * BLOCK_PAGES))
        first = last
    for branch in {blocks[last] for blocks in rows.values() if len(blocks) > last}:
        inside = {row: blocks for row, blocks in rows.items() if len(blocks) > last and blocks[last] == branch}
        if len(inside) >= least:
            found |= naive(inside, first, last, least, pages)
    return found


@st.composite
def passes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Page tables that branch as a radix tree's do (a page has one parent), and first positions."""
    width = 12
    page = 1
    tables: list[list[int]] = []
    for _ in range(draw(st.integers(0, 14))):
        kept = draw(st.integers(0, width)) if tables else 0
        base = tables[draw(st.integers(0, len(tables) - 1))][:kept] if kept else []
        fresh = list(range(page, page + width - len(base)))
        page += len(fresh)
        tables.append(base + fresh)
    order = draw(st.permutations(range(len(tables))))
    starts = [draw(st.integers(0, width * SIZE - 1)) for _ in tables]
    return (
        np.array([tables[i] for i in order], np.int32).reshape(len(tables), width),
        np.array(starts, np.int32),
    )


@settings(deadline=None, max_examples=300)
@given(case=passes(), least=st.integers(2, 5), pages=st.sampled_from([4, 8]))
def test_equals_a_naive_trie(case: tuple[np.ndarray, np.ndarray], least: int, pages: int) -> None:
    tables, starts = case
    runs = shared_runs(tables, starts, SIZE, Thresholds(least, pages, 1))
    visible = {
        row: [tuple(table[b * BLOCK_PAGES : (b + 1) * BLOCK_PAGES]) for b in range(start // BLOCK)]
        for row, (table, start) in enumerate(zip(tables.tolist(), starts.tolist(), strict=True))
    }
    assert {(tuple(run.rows), run.first, run.last) for run in runs} == naive(visible, 0, 0, least, pages)
    reached = [0] * len(tables)
    members: dict[int, set[int]] = {}
    for run in runs:
        assert run.last - run.first >= pages
        assert len(run.rows) >= least
        assert len({tuple(tables[row, : run.last]) for row in run.rows}) == 1
        for row in run.rows:
            assert reached[row] == run.first  # without gap or overlap, parents first
            reached[row] = run.last
            assert run.last * SIZE <= starts[row]
            assert set(run.rows) <= members.get(row, set(run.rows))
            members[row] = set(run.rows)


def test_a_group_and_its_branches() -> None:
    """64 rows share 8 pages; half of them 8 more; one row has not come so far."""
    tables = np.zeros((64, 20), np.int32)
    tables[:, :8] = np.arange(1, 9)
    tables[:, 8:] = 100 + np.arange(64 * 12).reshape(64, 12)
    tables[:32, 8:16] = np.arange(50, 58)
    starts = np.full(64, 18 * SIZE, np.int32)
    starts[5] = 9 * SIZE
    assert shared_runs(tables, starts, SIZE, Thresholds(4, 4, 1)) == [
        SharedRun(list(range(64)), 0, 8),
        SharedRun([row for row in range(32) if row != 5], 8, 16),
    ]


@pytest.mark.parametrize("groups", [1, 16, 256])
def test_cheap(groups: int) -> None:
    """256 rows of 40 pages: a fraction of a millisecond of the processor's time, bounded loosely."""
    rng = np.random.default_rng(0)
    tables = np.repeat(rng.permutation(groups * 40).astype(np.int32).reshape(groups, 40), 256 // groups, axis=0)
    tables[:, 30:] = 100_000 + np.arange(256 * 10).reshape(256, 10)
    tables, starts = tables[rng.permutation(256)], np.full(256, 639, np.int32)
    best = float("inf")
    for _ in range(20):
        started = time.thread_time()
        runs = shared_runs(tables, starts, SIZE, Thresholds(4, 4, 1))
        best = min(best, time.thread_time() - started)
    assert len(runs) == (groups if groups < 256 else 0)
    assert best < 0.005
