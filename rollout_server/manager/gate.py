"""Whether the head of the queue may start beside what runs: the simulated peak of pages must fit (`admission`).

A simulation is not repeated for every head. While the last one is recent, what a newcomer needs alone is added to its peak,
and only where that does not fit is it made anew. A head that did not fit waits until somebody leaves the batch.
"""

from __future__ import annotations

from bisect import bisect_left

from rollout_server.manager.admission import Demand, peak_pages
from rollout_server.manager.memory import Memory
from rollout_server.manager.sequence import Sequence
from rollout_server.manager.stopping import LengthPredictor

RETRY_STEPS = 16
"""Passes after which a head that did not fit is tried again although nobody has left."""
RECENT_STEPS = 64
"""Passes for which a simulation holds."""


class Gate:
    def __init__(self, memory: Memory) -> None:
        self.predictor = LengthPredictor()
        self.left = 0
        """Sequences that have left the batch."""
        self._memory = memory
        self._peak: int | None = None
        self._peak_step = 0
        self._closed: tuple[Sequence | None, int, int] | None = None
        """(for which head, until so many have left, or else until that pass)."""

    def close(self, head: Sequence | None, step: int) -> None:
        """`head` (None: whoever it is) does not fit as things are."""
        self._peak = None
        self._closed = (head, self.left + 1, step + RETRY_STEPS)

    def is_closed(self, head: Sequence | None, running: list[Sequence], step: int) -> bool:
        """The head did not fit, and nothing has changed since."""
        if self._closed is None:
            return False
        whom, left, at = self._closed
        if running and self.left < left and step < at and (whom is None or whom is head):
            return True
        self._closed = None
        return False

    def fits(self, head: Sequence, shared: list[int], running: list[Sequence], step: int) -> bool:
        """Whether the peak leaves room for one more, which starts with the pages `shared`; closed for it otherwise."""
        if not running:
            self._peak = None
            return True
        pool, size = self._memory.pool, self._memory.page_size
        demand = self._demand(head, shared, len(shared))
        if self._peak is not None and step < self._peak_step + RECENT_STEPS:
            need = -(-(demand.length + demand.remaining) // size)
            need -= sum(1 for page in shared if pool.holders(page))
            if self._peak + need <= pool.total:
                self._peak += need
                return True
        demands = [self._demand(s, s.pages, self._shared_pages(s)) for s in running]
        self._peak, self._peak_step = peak_pages([*demands, demand], size), step
        if self._peak <= pool.total:
            return True
        self.close(head, step)
        return False

    def _demand(self, sequence: Sequence, pages: list[int], shared: int) -> Demand:
        remaining = 1
        if sequence.sampling is not None and sequence.drawn < sequence.max_tokens:
            remaining = self.predictor.remaining(sequence.drawn, sequence.max_tokens)
        return Demand(sequence.target - 1, remaining, pages, shared)

    def _shared_pages(self, sequence: Sequence) -> int:
        """Leading pages that others hold too: who holds a page holds those before it."""
        holders = self._memory.pool.holders
        return bisect_left(sequence.pages, True, key=lambda page: holders(page) <= 1)
