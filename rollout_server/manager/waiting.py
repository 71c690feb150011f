"""The queue of sequences that wait for a slot: lower priority numbers first, first come first served within one.

Aging keeps low priorities from starving: a queue whose head has been passed over by `AGING` admissions of better
priorities gives the next one. Who was preempted returns to its place by order of arrival.
"""

from __future__ import annotations

import heapq

from rollout_server.manager.sequence import Sequence

AGING = 256
"""Admissions of better priority that a waiting head lets pass."""


class WaitingQueue:
    def __init__(self) -> None:
        self._queues: dict[int, list[tuple[int, Sequence]]] = {}
        self._passed: dict[int, int] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._queues.setdefault(sequence.priority, []), (sequence.number, sequence))
        self._passed.setdefault(sequence.priority, 0)
        self._length += 1

    def discard(self, sequence: Sequence) -> None:
        """A waiting sequence has ended (`sequence.ended`)."""
        assert sequence.ended
        self._length -= 1

    def head(self) -> Sequence | None:
        priority = self._next_priority()
        return self._queues[priority][0][1] if priority is not None else None

    def pop(self) -> Sequence:
        """Take the head, which is admitted."""
        priority = self._next_priority()
        if priority is None:
            raise IndexError("nobody waits")
        for other in self._queues:
            if other > priority:
                self._passed[other] += 1
        self._passed[priority] = 0
        self._length -= 1
        return heapq.heappop(self._queues[priority])[1]

    def sequences(self) -> list[Sequence]:
        return [entry[1] for queue in self._queues.values() for entry in queue if not entry[1].ended]

    def _next_priority(self) -> int | None:
        for priority, queue in list(self._queues.items()):
            while queue and queue[0][1].ended:
                heapq.heappop(queue)
            if not queue:
                del self._queues[priority], self._passed[priority]
        if len(self._queues) <= 1:
            return next(iter(self._queues), None)
        aged = [priority for priority in self._queues if self._passed[priority] >= AGING]
        return min(aged or self._queues)
