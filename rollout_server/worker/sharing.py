"""Which rows of a pass see the same pages: the tree of page runs that shared-prefix attention works on.

Hydragen (Juravsky et al., 2024) attends to one common prefix as a matrix product; DeFT (Yao et al., 2024) does so for
every branch of a tree. Pages are shared by reference, so equal page numbers at equal places are equal contents, and the
tree is read off the page tables alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rollout_server.kernels.interface import SharedRun

BLOCK_PAGES = 4
"""Runs begin and end at multiples of this: 64 positions, what the CPU kernel takes at a time."""


class Thresholds(NamedTuple):
    """What a run must have at least to be one."""

    rows: int
    pages: int
    saved: int
    """Rows × pages."""


MEASURED = Thresholds(rows=16, pages=32, saved=2048)
"""On a 2-core CPU (docs/results.md). Below, rows are as fast on their own: pages that others read too are in cache, while
gathering queries and keeping their state between runs costs time, and small passes without runs are replayed whole
(`cpu_programs`)."""


def shared_runs(
    tables: npt.NDArray[np.int32], starts: npt.NDArray[np.int32], page_size: int, least: Thresholds
) -> list[SharedRun]:
    """Runs of at least so many pages that at least so many rows share, parents before children.

    `tables` int32 [R, pages] holds the rows' page tables, `starts` int32 [R] the position of each row's first token: pages
    that reach it are not all visible to all the row's tokens and belong to no run. A stretch too short for a run that
    rows share before they part is counted to the longer runs after it, so that runs of a row leave no gap.
    """
    blocks = starts // (page_size * BLOCK_PAGES)
    rows = np.flatnonzero(blocks > 0)
    if rows.size < least.rows:
        return []
    _, which, counts = np.unique(tables[rows, 0], return_inverse=True, return_counts=True)
    rows = rows[counts[which] >= least.rows]
    if not rows.size:
        return []
    rows, common = _sort(tables, rows, blocks[rows])
    runs: list[SharedRun] = []
    pending = [(0, rows.size, 0)]
    while pending:
        low, high, first = pending.pop()
        inner = common[low + 1 : high]
        last = int(inner.min())
        pages = (last - first) * BLOCK_PAGES
        if pages >= least.pages and pages * (high - low) >= least.saved:
            runs.append(SharedRun(np.sort(rows[low:high]).tolist(), first * BLOCK_PAGES, last * BLOCK_PAGES))
            first = last
        edges = [low, *(np.flatnonzero(inner == last) + low + 1).tolist(), high]
        pending += [
            (begin, end, first)
            for begin, end in zip(edges[-2::-1], edges[:0:-1], strict=True)
            if end - begin >= least.rows
        ]
    return runs


def _sort(
    tables: npt.NDArray[np.int32], rows: npt.NDArray[np.intp], blocks: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The rows so ordered that equal prefixes are neighbours, and how many blocks each has in common with the one
    before it (0 for the first)."""
    lengths = blocks * BLOCK_PAGES
    width = int(lengths.max())
    prefixes = np.where(np.arange(width) < lengths[:, None], tables[rows, :width], -1)
    keys = [prefix.tobytes() for prefix in prefixes]
    order = sorted(range(rows.size), key=keys.__getitem__)
    prefixes = prefixes[order]
    differ = (prefixes[1:] != prefixes[:-1]) | (prefixes[1:] < 0)
    common = np.where(differ.any(1), differ.argmax(1), width) // BLOCK_PAGES
    return rows[order], np.concatenate([np.zeros(1, np.intp), common])
