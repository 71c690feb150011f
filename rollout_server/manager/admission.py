"""How many pages the running sequences will need at their peak, by simulating when they end.

After Tokasaurus (Juravsky et al., 2025): every sequence grows by a token a pass, so between two ends usage only rises, and
it is enough to look right before each end. A histogram of how full the last pages are says how many pages are opened in
between: the work is O(sequences + shared pages), whatever the lengths. Pages that several sequences share count once, until the
last of them ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Demand(NamedTuple):
    length: int
    """Tokens with keys and values once what is planned is computed, and the whole prompt."""
    remaining: int
    """Passes until it ends, at least 1; each adds a token."""
    pages: Sequence[int]
    """Pages it holds."""
    shared: int
    """Leading ones that others may hold too."""


def peak_pages(demands: Iterable[Demand], page_size: int) -> int:
    """The most distinct pages that are in use at once until all have ended."""
    latest_first = sorted(demands, key=lambda d: d.remaining, reverse=True)
    seen: set[int] = set()
    leaving: list[int] = []  # pages that go when the sequence ends: those that no later one shares
    usage = whole = 0
    fill = [0] * page_size  # sequences by (length - 1) mod page_size
    for length, _, pages, shared in latest_first:
        own = max(len(pages), -(-length // page_size)) - shared
        for at in range(shared - 1, -1, -1):
            if pages[at] in seen:
                break
            seen.add(pages[at])
            own += 1
        leaving.append(own)
        usage += own
        fill[(length - 1) % page_size] += 1
        whole += 1
    peak = opened = 0
    gone = 0
    now = 0
    for at in range(len(latest_first) - 1, -1, -1):
        length, remaining, _, _ = latest_first[at]
        if remaining > now:
            now = remaining
            rounds, rest = divmod(now, page_size)
            opened = rounds * whole + (sum(fill[page_size - rest :]) if rest else 0)
            peak = max(peak, usage + opened - gone)
        grown = (length - 1 + now) // page_size - (length - 1) // page_size
        gone += leaving[at]
        opened -= grown
        whole -= 1
        fill[(length - 1) % page_size] -= 1
    return max(peak, usage) if latest_first else 0
