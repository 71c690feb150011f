"""Decides what each forward pass computes. Plain Python, no clock, no I/O: given the same calls it does the same.

First come, first served within a priority. Every pass decodes one token of each running sequence and fills what is
left of its token budget with prompts, in chunks. When pages run out, cached prefixes are evicted first, then the
youngest running sequence is preempted: it keeps what it sampled and returns to the head of the queue.
"""

from __future__ import annotations

import itertools
from bisect import insort
from dataclasses import dataclass, field

from rollout_server.manager.pages import PagePool
from rollout_server.manager.prefix_tree import PrefixTree, Root
from rollout_server.manager.sequence import Sequence
from rollout_server.messages import Forward, Forwarded, Row, SamplingParams


@dataclass
class Counters:
    """Monotonic; what a benchmark or a test compares instead of a clock."""

    steps: int = 0
    prefill_tokens: int = 0
    """Prompt tokens computed, re-prefills after preemption or an update included."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix tree."""
    sampled_tokens: int = 0
    preemptions: int = 0
    finished: int = 0


@dataclass(frozen=True)
class Sampled:
    """A token, or a finished score, of one sequence."""

    request_id: str
    id: int = -1
    logprob: float = 0.0
    top_logprobs: list[tuple[int, float]] = field(default_factory=list)
    finish_reason: str | None = None
    cached_tokens: int = 0
    scores: list[float] | None = None


class Scheduler:
    def __init__(self, *, pages: int, page_size: int, max_batch: int, max_step_tokens: int, version: int = 0) -> None:
        self.page_size, self.max_batch, self.max_step_tokens = page_size, max_batch, max_step_tokens
        self.pool = PagePool(pages)
        self.tree = PrefixTree(self.pool, page_size)
        self.version = version
        self.counters = Counters()
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._running: list[Sequence] = []
        self._planned: list[tuple[Sequence, int]] = []
        self._cancelled: set[str] = set()
        self._numbers = itertools.count()

    # requests ---------------------------------------------------------------------------------------------------------

    def submit(self, request_id: str, ids: list[int], sampling: SamplingParams | None, priority: int = 0) -> None:
        """Queue a request: `sampling` None asks for the log-prob of ids[1:]. Lower `priority` goes first.

        Raises ValueError when it could not run even alone.
        """
        longest = len(ids) + (sampling.max_tokens if sampling else 0)
        if -(-longest // self.page_size) > self.pool.total:
            raise ValueError(f"{longest} tokens do not fit in the KV cache of {self.pool.total * self.page_size}")
        sequence = Sequence(next(self._numbers), request_id, list(ids), len(ids), sampling, priority)
        insort(self._waiting, (priority, sequence.number, sequence), key=lambda entry: entry[:2])

    def cancel(self, request_id: str) -> None:
        """Forget a request. One that is in the pass under way is dropped when its results arrive."""
        for sequence, _ in self._planned:
            if sequence.request_id == request_id:
                self._cancelled.add(request_id)
                return
        for entry in self._waiting:
            if entry[2].request_id == request_id:
                self._waiting.remove(entry)
                return
        for sequence in self._running:
            if sequence.request_id == request_id:
                self._retire(sequence)
                return

    def set_version(self, version: int) -> None:
        """New weights are live: no page of the old ones is read again. Running sequences re-prefill what they have.

        Only between passes.
        """
        if self._planned:
            raise RuntimeError("weights changed while a pass was under way")
        for sequence in reversed(self._running):
            self._requeue(sequence)
        self._running.clear()
        for root in self.tree.roots():
            self.tree.drop(root)
        self.version = version

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def queue_lengths(self) -> dict[str, float]:
        return {"waiting": len(self._waiting), "running": len(self._running)}

    # passes -----------------------------------------------------------------------------------------------------------

    def plan(self) -> Forward | None:
        """The next pass, or None when there is nothing to do. `apply` must follow before the next `plan`."""
        if self._planned:
            raise RuntimeError("the last pass has no results yet")
        rows: list[Row] = []
        budget = self.max_step_tokens
        for sequence in list(self._running):  # decodes first: they have waited longest
            if sequence.pending == 1 and sequence in self._running and self._secure(sequence, 1):
                rows.append(self._row(sequence, 1))
                budget -= 1
        for sequence in list(self._running):  # then prompts already begun
            if sequence.pending > 1 and budget > 0 and sequence in self._running:
                budget -= self._prefill(sequence, budget, rows)
        while budget > 0 and self._waiting and len(self._running) < self.max_batch:
            sequence = self._waiting[0][2]
            if not self._admit(sequence):
                break
            self._waiting.pop(0)
            self._running.append(sequence)
            budget -= self._prefill(sequence, budget, rows)
        if not rows:
            return None
        self.counters.steps += 1
        return Forward(step=self.counters.steps, rows=rows)

    def apply(self, results: Forwarded) -> list[Sampled]:
        """Take in the results of the planned pass, in its row order."""
        events: list[Sampled] = []
        planned, self._planned = self._planned, []
        for i, (sequence, count) in enumerate(planned):
            sequence.computed += count
            if sequence.request_id in self._cancelled:
                self._cancelled.discard(sequence.request_id)
                self._retire(sequence)
            elif sequence.sampling is None:
                sequence.scores += results.scores[i]
                if sequence.pending == 0:
                    self._retire(sequence)
                    events.append(Sampled(sequence.request_id, scores=sequence.scores, finish_reason="stop"))
            elif results.ids[i] >= 0:
                events.append(self._take(sequence, results, i))
        return events

    def _take(self, sequence: Sequence, results: Forwarded, row: int) -> Sampled:
        assert sequence.sampling is not None
        token = results.ids[row]
        sequence.ids.append(token)
        self.counters.sampled_tokens += 1
        reason = None
        if token in sequence.sampling.stop_ids:
            reason = "stop"
        elif sequence.sampled >= sequence.sampling.max_tokens:
            reason = "length"
        if reason:
            self._retire(sequence)
            self.counters.finished += 1
        return Sampled(
            sequence.request_id,
            token,
            results.logprobs[row],
            results.top_logprobs[row] if results.top_logprobs else [],
            reason,
            sequence.cached_tokens,
        )

    # planning ---------------------------------------------------------------------------------------------------------

    @property
    def _root(self) -> Root:
        return (self.version, "")

    def _admit(self, sequence: Sequence) -> bool:
        """Take over the known prefix; False when there is no room for the rest beside what is running."""
        nodes = [] if sequence.sampling is None else self.tree.match(self._root, sequence.ids)
        for node in nodes:
            self.pool.hold(node.page)
        needed = -(-(len(sequence.ids) + 1) // self.page_size) - len(nodes)
        if self.pool.free < needed:
            self.tree.evict(needed - self.pool.free)
        if self.pool.free < needed:
            for node in nodes:
                self.pool.release(node.page)
            return False
        self.tree.touch(nodes)
        sequence.pages = [node.page for node in nodes]
        sequence.in_tree = len(nodes)
        sequence.leaf = nodes[-1] if nodes else None
        sequence.off_tree = sequence.sampling is None
        sequence.computed = len(nodes) * self.page_size
        if sequence.sampled == 0:
            sequence.cached_tokens = sequence.computed
        self.counters.cached_tokens += sequence.computed
        return True

    def _prefill(self, sequence: Sequence, budget: int, rows: list[Row]) -> int:
        count = min(sequence.pending, budget)
        if not self._secure(sequence, count):
            return 0
        rows.append(self._row(sequence, count))
        self.counters.prefill_tokens += count
        return count

    def _secure(self, sequence: Sequence, count: int) -> bool:
        """Pages for `count` more tokens, if need be at the cost of cached prefixes and younger sequences.

        False when the sequence itself had to give way.
        """
        missing = -(-(sequence.computed + count) // self.page_size) - len(sequence.pages)
        while missing > self.pool.free:
            if self.tree.evict(missing - self.pool.free):
                continue
            in_pass = {planned.number for planned, _ in self._planned}
            victims = [s for s in self._running if s.number not in in_pass]
            victim = max(victims, key=lambda s: (s.priority, s.number), default=sequence)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages += [self.pool.take() for _ in range(missing)]
        return True

    def _row(self, sequence: Sequence, count: int) -> Row:
        start = sequence.computed
        complete = start + count == len(sequence.ids)
        scoring = sequence.sampling is None
        row = Row(
            sequence=sequence.number,
            ids=sequence.ids[start : start + count],
            start=start,
            pages=list(sequence.pages),
            sampling=sequence.sampling if complete else None,
            draw=sequence.sampled,
            targets=sequence.ids[start + 1 : start + count + 1] if scoring else [],
        )
        self._planned.append((sequence, count))
        self._enter_tree(sequence, start + count)
        return row

    def _enter_tree(self, sequence: Sequence, computed: int) -> None:
        size = self.page_size
        while not sequence.off_tree and (sequence.in_tree + 1) * size <= computed:
            at = sequence.in_tree
            key = tuple(sequence.ids[at * size : (at + 1) * size])
            node = self.tree.insert(self._root, sequence.leaf, key, sequence.pages[at])
            if node is None:
                sequence.off_tree = True
                return
            sequence.leaf = node
            sequence.in_tree += 1

    def _preempt(self, sequence: Sequence) -> None:
        self.counters.preemptions += 1
        self._running.remove(sequence)
        self._requeue(sequence)

    def _requeue(self, sequence: Sequence) -> None:
        self._free(sequence)
        sequence.scores = []
        insort(self._waiting, (sequence.priority, sequence.number, sequence), key=lambda entry: entry[:2])

    def _retire(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
        self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        for page in sequence.pages:
            self.pool.release(page)
        sequence.pages = []
        sequence.computed = sequence.in_tree = 0
        sequence.leaf = None

    # invariants -------------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Every page's holders are exactly the sequences and tree nodes that name it; AssertionError otherwise."""
        expected = [0] * self.pool.total
        for sequence in self._running:
            for page in sequence.pages:
                expected[page] += 1
        tree = self.tree.pages()
        assert len(tree) == len(set(tree)) == self.tree.size, "a page stands twice in the prefix tree"
        for page in tree:
            expected[page] += 1
        actual = [self.pool.holders(page) for page in range(self.pool.total)]
        assert actual == expected, "pages held differ from pages named"
        assert self.pool.free == expected.count(0), "free list differs from unheld pages"
        assert all(not s.pages for _, _, s in self._waiting), "a waiting sequence holds pages"
        assert all(root == self._root for root in self.tree.roots()), "pages of an old version are in the tree"
