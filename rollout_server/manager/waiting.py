"""The queue of sequences that wait for a slot: lower priority numbers first, fair between flows within one.

A flow is whoever asks: an episode, a client. Who is next is decided by start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM
1996): a request starts at virtual time max(now, end of its flow's request before it) and ends its cost later; the
earliest start is next. So a flow that floods stands behind itself, and the few requests of another wait for about one
request of each flow. The cost is what is known on arrival, the prompt's tokens and those expected to be sampled; unlike
virtual token counters (Sheng et al., OSDI 2024), which charge afterwards, this keeps one flow's requests, and one
request's choices, in the order of their arrival. Virtual time goes on by cost / (flows that wait) with each admission, as in
WF2Q+ (Bennett and Zhang, 1997): new flows, which start now, cannot hold back one that waits, however many come.

Aging keeps low priorities from starving: a queue whose head has been passed over by `AGING` admissions of better
priorities gives the next one. Who was preempted returns to its place, and time does not go on when its turn comes again.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from rollout_server.manager.sequence import Sequence

AGING = 256
"""Admissions of better priority that a waiting head lets pass."""
SLACK = 64
"""Entries of no use that a table may have beyond as many as are of use."""


@dataclass(slots=True)
class Flow:
    waiting: int = 0
    last: float = 0.0
    """Virtual time at which its newest request starts."""
    end: float = 0.0
    """Virtual time at which that request ends."""


class FairQueue:
    """The sequences of one priority."""

    def __init__(self, now: float) -> None:
        self.now = now
        """Virtual time."""
        self.active = 0
        """Flows that wait."""
        self.passed = 0
        """Admissions of better priority since the last of this one."""
        self.flows: dict[str, Flow] = {}
        """Those that wait, and those that had more than their share lately."""
        self._heap: list[tuple[float, int, Sequence]] = []
        self._length = 0
        self._sweep_at = SLACK

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for _, _, sequence in self._heap if not sequence.ended)

    def push(self, sequence: Sequence) -> None:
        request = sequence.request
        flow = self._flow(request.flow)
        if request.start is None:
            request.start = flow.last = flow.end = max(self.now, flow.end)
        flow.end += sequence.cost
        self._enter(sequence, request.start, flow)

    def put_back(self, sequence: Sequence) -> None:
        assert sequence.request.start is not None
        self._enter(sequence, sequence.request.start, self._flow(sequence.request.flow))

    def discard(self, sequence: Sequence) -> None:
        flow = self._gone(sequence)
        if not sequence.charged:  # it never ran: its flow is not charged for it
            flow.end = max(flow.last, flow.end - sequence.cost)
        if len(self._heap) > 2 * self._length + SLACK:
            self._heap = [entry for entry in self._heap if not entry[2].ended]
            heapq.heapify(self._heap)

    def head(self) -> Sequence:
        """Raises IndexError when nobody waits."""
        while self._heap[0][2].ended:
            heapq.heappop(self._heap)
        return self._heap[0][2]

    def pop(self) -> Sequence:
        sequence = self.head()
        start = heapq.heappop(self._heap)[0]
        if not sequence.charged:
            self.now = max(self.now, start) + sequence.cost / self.active
            sequence.charged = True
        self.passed = 0
        self._gone(sequence)
        if len(self.flows) > self._sweep_at:
            self.flows = {name: flow for name, flow in self.flows.items() if flow.waiting or flow.end > self.now}
            self._sweep_at = 2 * len(self.flows) + SLACK
        return sequence

    def _flow(self, name: str) -> Flow:
        flow = self.flows.get(name)
        if flow is None:
            flow = self.flows[name] = Flow()
        return flow

    def _enter(self, sequence: Sequence, start: float, flow: Flow) -> None:
        heapq.heappush(self._heap, (start, sequence.number, sequence))
        self._length += 1
        self.active += not flow.waiting
        flow.waiting += 1

    def _gone(self, sequence: Sequence) -> Flow:
        flow = self.flows[sequence.request.flow]
        self._length -= 1
        flow.waiting -= 1
        self.active -= not flow.waiting
        return flow


class WaitingQueue:
    def __init__(self) -> None:
        self.tokens = 0
        """Of the prompts of all requests that wait."""
        self._queues: dict[int, FairQueue] = {}
        self._now = 0.0
        """Virtual time does not go back when a priority's queue is forgotten: who was preempted keeps its start."""

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    @property
    def flows(self) -> int:
        """How many wait, in each priority."""
        return sum(queue.active for queue in self._queues.values())

    def push(self, sequence: Sequence) -> None:
        """A sequence arrives. The choices of a request arrive one after the other."""
        self._queue(sequence).push(sequence)
        self._count(sequence, 1)

    def put_back(self, sequence: Sequence) -> None:
        """A sequence that was popped waits again, in its old place."""
        self._queue(sequence).put_back(sequence)
        self._count(sequence, 1)

    def discard(self, sequence: Sequence) -> None:
        """A waiting sequence has ended (`sequence.ended`)."""
        assert sequence.ended
        self._queues[sequence.priority].discard(sequence)
        self._left(sequence)

    def head(self) -> Sequence | None:
        priority = self._next_priority()
        return self._queues[priority].head() if priority is not None else None

    def pop(self) -> Sequence:
        """Take the head, which is admitted. Raises IndexError when nobody waits."""
        priority = self._next_priority()
        if priority is None:
            raise IndexError("nobody waits")
        for other, queue in self._queues.items():
            queue.passed += other > priority
        sequence = self._queues[priority].pop()
        self._left(sequence)
        return sequence

    def sequences(self) -> list[Sequence]:
        return [sequence for queue in self._queues.values() for sequence in queue]

    def _queue(self, sequence: Sequence) -> FairQueue:
        queue = self._queues.get(sequence.priority)
        if queue is None:
            queue = self._queues[sequence.priority] = FairQueue(self._now)
        return queue

    def _left(self, sequence: Sequence) -> None:
        self._count(sequence, -1)
        queue = self._queues[sequence.priority]
        if not len(queue):
            self._now = max(self._now, queue.now)
            del self._queues[sequence.priority]

    def _count(self, sequence: Sequence, change: int) -> None:
        request = sequence.request
        before, request.queued = request.queued, request.queued + change
        if not before or not request.queued:
            self.tokens += change * sequence.prompt_length

    def _next_priority(self) -> int | None:
        if len(self._queues) <= 1:
            return next(iter(self._queues), None)
        aged = [priority for priority, queue in self._queues.items() if queue.passed >= AGING]
        return min(aged or self._queues)
