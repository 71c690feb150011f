"""Decides what each forward pass computes. Plain Python, no I/O, and no clock but for masks: given the same calls it does the
same.

Every pass decodes one token of each running sequence and fills what is left of its token budget with prompts, in chunks.
Up to `lookahead` passes are planned beyond the one whose results are awaited; a token that is not known yet is named by the
slot that drew it. The queue's head is admitted while the simulated peak of pages fits (`admission`), and nobody overtakes
it; who is the head is decided fairly between flows (`waiting`). Where admission was too hopeful, cached prefixes are evicted
first, then the youngest running sequence of the lowest priority is preempted: it keeps what it sampled and returns to its
place in the queue.

A sequence with a grammar is masked: what it may draw is known as soon as its last token is, so it is never planned ahead.
Masks may take long: beyond `MASKS_S` between two passes the rest is computed later, oldest first, and whose mask is late misses a
pass. No draw depends on that. Before `min_tokens` it is masked against its stop ids, which depends on a count only.

Prompts are prefilled one after the other, so that whatever the next one shares with those before is in the tree when
its turn comes: no prefix is computed twice while it is kept.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict

from rollout_server import messages as m
from rollout_server.manager.counters import Counters
from rollout_server.manager.gate import Gate
from rollout_server.manager.integrity import check_integrity
from rollout_server.manager.masking import GrammarError, Masker, all_but
from rollout_server.manager.memory import Memory
from rollout_server.manager.pass_plan import Completion, PassPlan
from rollout_server.manager.prefix_tree import NO_MATCH, Match, Root
from rollout_server.manager.refusal import Refused
from rollout_server.manager.sequence import Request, Sequence
from rollout_server.manager.waiting import WaitingQueue

LAST_DRAWN = [-1]
MASKS_S = 0.02
"""Time for masks between two passes; the last one may exceed it."""


class Scheduler:
    def __init__(
        self,
        *,
        pages: int,
        page_size: int,
        vocab_size: int,
        max_batch: int,
        max_step_tokens: int,
        lookahead: int = 0,
        host_pages: int = 0,
        version: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_step_tokens, self.lookahead, self.vocab_size = max_step_tokens, lookahead, vocab_size
        self.memory = Memory(pages=pages, page_size=page_size, host_pages=host_pages)
        self.versions: dict[str, int] = {"": version}
        """Of each adapter that is loaded; `""` is the policy."""
        self.counters = Counters()
        self.paused = self.asleep = False
        self.slots = min(max_batch, max_step_tokens)
        """No more than can decode in one pass."""
        self.free_slots = list(range(self.slots - 1, -1, -1))
        self.requests: dict[str, Request] = {}
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        """By priority and arrival."""
        self.in_flight: deque[PassPlan] = deque()
        self.prefilling: Sequence | None = None
        """The one running sequence whose prompt is part-way planned."""
        self._gate = Gate(self.memory)
        self._late: dict[int, Sequence] = {}
        """Sequences whose masks are still to be computed, oldest first."""
        self._clock = clock
        self._stalled = False
        """The last pass was planned without all who should be in it, for want of pages."""
        self._numbers = itertools.count()

    # requests ---------------------------------------------------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        ids: list[int],
        sampling: m.SamplingParams | None,
        priority: int = 0,
        n: int = 1,
        adapter: str = "",
        flow: str = "",
        masker: Masker | None = None,
    ) -> None:
        """Queue a request: `sampling` None asks for the log-prob of ids[1:]. Lower `priority` goes first.

        Each choice is drawn within `masker`, which is at the beginning of a text and stays there: a choice takes a copy when
        its turn comes. Raises Refused when the request could not run
        even alone, its grammar allows nothing, or its stop ids leave nothing for `min_tokens`.
        """
        size, total = self.memory.page_size, self.memory.pool.total
        longest = len(ids) + (sampling.max_tokens if sampling else 0)
        if -(-longest // size) > total:
            raise Refused("too_large", f"{longest} tokens do not fit in the KV cache of {total * size}")
        if sampling is None and len(ids) < 2:
            raise Refused("invalid_token_ids", "one token alone has nothing to score")
        if adapter not in self.versions:
            raise Refused("model_not_found", f"no adapter {adapter!r} is loaded", hint="load it, or ask for the policy")
        if request_id in self.requests:
            raise ValueError(f"request {request_id!r} is under way already")
        allowed = _first_mask(masker, sampling) if masker and sampling else None
        min_tokens = sampling.min_tokens if sampling and sampling.stop_ids else 0
        unstopped = None
        if min_tokens > 0 and sampling and not masker:
            unstopped = all_but(sampling.stop_ids, self.vocab_size)
            if not any(unstopped):
                raise Refused("invalid_sampling", "every id is a stop id: none is left for min_tokens")
        request = Request(request_id, live=n, flow=flow)
        self.requests[request_id] = request
        self.counters.constrained += n if masker else 0
        for index in range(n):
            sequence = Sequence(
                number=next(self._numbers),
                request=request,
                ids=list(ids),
                sampling=sampling,
                index=index,
                priority=priority,
                adapter=adapter,
                prompt_length=len(ids),
                max_tokens=sampling.max_tokens if sampling else 0,
                stop_ids=sampling.stop_ids if sampling else (),
                min_tokens=min_tokens,
                unstopped=unstopped,
                serial=masker is not None or (sampling is not None and sampling.needs_history),
                cost=len(ids) + (self._gate.predictor.remaining(0, sampling.max_tokens) if sampling else 0),
                template=masker,
                allowed=allowed,
            )
            request.choices.append(sequence)
            self.waiting.push(sequence)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Forget a request, or one of its choices. What passes under way sample for it is dropped. Unknown ones are ignored."""
        request = self.requests.get(request_id)
        if request is None:
            return
        for sequence in list(request.choices):
            if sequence.ended or index not in (None, sequence.index):
                continue
            self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        """It has ended: nothing holds it any longer but the passes that it is in."""
        request = sequence.request
        sequence.ended = True
        sequence.template = sequence.masker = None
        self._late.pop(sequence.number, None)
        if sequence.slot >= 0:
            self._leave(sequence)
        else:
            self.waiting.discard(sequence)
        request.live -= 1
        if not request.live:
            del self.requests[request.request_id]
            request.choices.clear()

    @property
    def idle(self) -> bool:
        return not self.requests and not self.in_flight

    # weights, pauses --------------------------------------------------------------------------------------------------

    def update(self, adapter: str, version: int, *, base: bool, running: m.Running) -> list[m.Failed]:
        """New weights are live: of one adapter (`""`: the policy's own), or the base below all. Nothing may be in flight.

        Returns the requests that fail under `abort`.
        """
        self._require_quiet()
        affected: Callable[[Sequence], bool] = lambda sequence: base or sequence.adapter == adapter  # noqa: E731
        failed = self._abort(affected, f"the weights changed to version {version}") if running == "abort" else []
        for root in self.memory.tree.roots():
            if base or root[1] == adapter:
                self.memory.drop(root)
        for sequence in [s for s in self.running if affected(s)]:
            if running == "keep" and sequence.sampling is not None:
                sequence.private = True
                sequence.leaf = sequence.tail = None
                sequence.in_tree = 0
            else:
                self._requeue(sequence, remember=False)
        self.versions["" if base else adapter] = version
        return failed

    def unload(self, adapter: str) -> list[m.Failed]:
        """Forget a named adapter; all its requests fail. Nothing may be in flight."""
        self._require_quiet()
        failed = self.fail(
            [r for r in self.requests.values() if r.choices[0].adapter == adapter], f"adapter {adapter!r} was unloaded"
        )
        self.memory.drop((self.versions.pop(adapter), adapter))
        return failed

    def pause(self, running: m.Running) -> list[m.Failed]:
        """Plan nothing more until `resume`. Nothing may be in flight. Returns the requests that fail under `abort`."""
        self._require_quiet()
        self.paused = True
        if running == "abort":
            return self._abort(lambda sequence: True, "the engine was paused")
        if running == "reprefill":
            for sequence in list(self.running):
                self._requeue(sequence, remember=True)
        return []

    def resume(self) -> None:
        self.paused = False

    def sleep(self) -> None:
        """Give up all keys and values. Nothing may be in flight."""
        self._require_quiet()
        self.paused = self.asleep = True
        for sequence in list(self.running):
            self._requeue(sequence, remember=False)
        for root in self.memory.tree.roots():
            self.memory.drop(root)

    def wake(self) -> None:
        self.paused = self.asleep = False

    def recover(self) -> list[m.Failed]:
        """The worker has died, and with it all passes under way and all keys and values, on the device and in the host tier.

        Who ran goes on from the ids that are known, in its place in the queue. Whoever was under way may be what killed it, and
        runs beside no other such sequence until it has got further. Returns the requests that fail: it was under way at a death
        once more before that.
        """
        under_way = [sequence for sequence in self.running if self._pass(sequence.last_step) is not None]
        deadly = {id(sequence.request): sequence.request for sequence in under_way if sequence.suspect}
        for sequence in under_way:
            sequence.died_at = len(sequence.ids)
        while self.in_flight:
            plan = self.in_flight.popleft()
            self.memory.release(plan.pages)
            self.free_slots += plan.slots
        for sequence in list(self.running):
            sequence.drawn = sequence.sampled if sequence.sampling is not None else 0
            self._requeue(sequence, remember=False)
        for root in self.memory.tree.roots():
            self.memory.drop(root)
        self._stalled = False
        return self.fail(list(deadly.values()), "the worker died twice while it computed this request", "worker_failed")

    def _require_quiet(self) -> None:
        if self.in_flight:
            raise RuntimeError("passes are under way")

    def _abort(self, affected: Callable[[Sequence], bool], why: str) -> list[m.Failed]:
        """Fail the requests that are under way: a choice runs, or has sampled."""
        return self.fail(
            [
                request
                for request in self.requests.values()
                if any(
                    affected(choice) and (choice.slot >= 0 or choice.sampled > 0 or choice.ended)
                    for choice in request.choices
                )
            ],
            why,
        )

    def fail(self, requests: list[Request], why: str, code: str = "aborted") -> list[m.Failed]:
        """Forget them, and say so."""
        for request in requests:
            self.cancel(request.request_id)
        return [m.Failed(request_id=request.request_id, code=code, message=why) for request in requests]

    # planning ---------------------------------------------------------------------------------------------------------

    def plan(self) -> m.Forward | None:
        """The next pass; None when there is nothing to do, or nothing before results of earlier passes are applied."""
        if self.paused or self.asleep or len(self.in_flight) > self.lookahead:
            return None
        if self._stalled and self.in_flight:
            return (
                None  # whoever must give way is in a pass under way: more passes without the rest would only delay it
            )
        plan = PassPlan(self.counters.steps + 1)
        self._decode(plan)
        if not plan.stalled:
            self._continue_prefill(plan)
        if not plan.stalled:
            self._admit(plan)
        self.memory.settle()
        self._stalled = plan.stalled
        if not plan.rows:
            return None
        plan.decoding = plan.drawing()
        self.in_flight.append(plan)
        counters = self.counters
        counters.steps = plan.step
        counters.copied_pages += len(plan.copies)
        counters.offloaded_pages += len(plan.offloads)
        counters.restored_pages += len(plan.restores)
        counters.evicted_pages = self.memory.evicted
        return plan.forward()

    def _decode(self, plan: PassPlan) -> None:
        step, prefilling = plan.step, self.prefilling
        add_row, add_sequence = plan.rows.append, plan.decoding.append
        for sequence in self.running:
            drawn = sequence.drawn
            if drawn >= sequence.max_tokens or sequence is prefilling:
                continue
            ids, at = sequence.ids, sequence.planned
            known = len(ids)
            if sequence.serial and (at >= known or sequence.number in self._late):
                continue
            if at >= sequence.room:
                if not self._make_room(sequence, plan):
                    if plan.stalled:
                        return
                    continue
                self.memory.extend(sequence, 1, plan)
            if sequence.serial or drawn < sequence.min_tokens:
                draw = sequence.draw()
            else:
                draw = m.Draw(slot=sequence.slot, at=drawn)
            token = LAST_DRAWN if at >= known else [ids[at]]
            sent = sequence.sent
            if sent == len(sequence.pages):
                add_row(m.Row(slot=sequence.slot, ids=token, start=at, draws=[draw]))
            else:
                pages = sequence.pages[sent:]
                add_row(m.Row(slot=sequence.slot, ids=token, start=at, pages=pages, first_page=sent, draws=[draw]))
                sequence.sent = len(sequence.pages)
            sequence.planned = at + 1
            sequence.drawn = drawn + 1
            sequence.last_step = step
            add_sequence(sequence)

    def _make_room(self, sequence: Sequence, plan: PassPlan) -> bool:
        """See that one more page is available, if need be at the cost of the youngest.

        False when there is none: for this pass (`plan.stalled`), or because the sequence itself had to give way.
        """
        while not self.memory.available:
            victim = self.running[-1]
            if self.in_flight or victim.last_step == plan.step:
                plan.stalled = True
                return False
            self.counters.preemptions += 1
            self._requeue(victim, remember=True)
            self._gate.close(None, plan.step)
            if victim is sequence:
                return False
        return True

    def _continue_prefill(self, plan: PassPlan) -> None:
        sequence = self.prefilling
        budget = self.max_step_tokens - len(plan.rows)
        if sequence is None or budget <= 0:
            return
        if sequence.planned >= sequence.room and not self._make_room(sequence, plan):
            return
        room = sequence.room + self.memory.available * self.memory.page_size
        count = min(budget, sequence.target - sequence.planned, room - sequence.planned)
        self._prefill(sequence, count, plan)

    def _prefill(self, sequence: Sequence, count: int, plan: PassPlan) -> None:
        start = sequence.planned
        end = start + count
        missing = -(-end // self.memory.page_size) - len(sequence.pages)
        if missing > 0:
            self.memory.extend(sequence, missing, plan)
        row = m.Row(
            slot=sequence.slot,
            ids=sequence.ids[start:end],
            start=start,
            pages=sequence.pages[sequence.sent :],
            first_page=sequence.sent,
            targets=sequence.ids[start + 1 : end + 1] if sequence.sampling is None else [],
        )
        plan.rows.append(row)
        sequence.sent = len(sequence.pages)
        sequence.planned = end
        sequence.last_step = plan.step
        self._count_prefill(sequence, start, end)
        complete = end == sequence.target
        self.prefilling = None if complete else sequence
        if sequence.sampling is None:
            plan.scored.append((sequence, complete))
            return
        plan.pages += self.memory.remember(sequence, plan.step)
        if complete:
            self.memory.remember_tail(sequence, plan.step)
            completion = Completion(sequence, row, [])
            plan.completions.append(completion)
            self._join(sequence, completion)

    def _join(self, sequence: Sequence, completion: Completion) -> None:
        """Draw from the logits of the completed prompt."""
        completion.row.draws.append(sequence.draw())
        completion.drawing.append(sequence)
        sequence.drawn += 1

    def _count_prefill(self, sequence: Sequence, start: int, end: int) -> None:
        if sequence.sampling is None:
            self.counters.scored_tokens += end - start
            return
        reached = sequence.reached
        self.counters.recomputed_tokens += max(0, min(end, reached) - start)
        self.counters.prefill_tokens += max(0, min(end, sequence.prompt_length) - max(start, reached))

    # admission --------------------------------------------------------------------------------------------------------

    def _admit(self, plan: PassPlan) -> None:
        """Start sequences from the head of the queue until one does not fit."""
        if self._gate.is_closed(self.waiting.head(), self.running, plan.step):
            return
        budget = self.max_step_tokens - sum(len(row.ids) for row in plan.rows) if len(self.waiting) else 0
        while self.free_slots and (head := self.waiting.head()) is not None:
            if head.suspect and any(sequence.suspect for sequence in self.running):
                break
            if head.number in self._late:
                break
            completion = plan.completion_of(head)
            if completion is not None:
                if not self._fits_beside(head, completion.sequence, plan.step):
                    break
                self._open(self.waiting.pop(), plan)
                self.memory.fork(head, completion.sequence)
                self._start_counting(head, head.planned, len(head.ids), completion.sequence)
                head.last_step = plan.step
                self._join(head, completion)
                continue
            if budget <= 0 or self.prefilling is not None:
                break
            match = self._fitting_match(head, plan)
            if match is None:
                break
            self._open(self.waiting.pop(), plan)
            self.memory.attach(head, match, self._root(head), plan)
            self._start_counting(head, head.planned, match.known, None)
            count = min(budget, head.target - head.planned)
            budget -= count
            self._prefill(head, count, plan)

    def _root(self, sequence: Sequence) -> Root:
        return (self.versions[sequence.adapter], sequence.adapter)

    def _fitting_match(self, head: Sequence, plan: PassPlan) -> Match | None:
        """What is known of the head's ids; None when it cannot start in this pass."""
        match = NO_MATCH if head.sampling is None else self.memory.tree.match(self._root(head), head.ids)
        if match.partial is not None and match.partial.step >= plan.step:
            return None  # the page that it will copy is computed in this very pass
        if self.memory.newly_needed(match, len(head.ids)) <= self.memory.available:
            on_device = [node.page for node in match.nodes if node.page >= 0]
            return match if self._gate.fits(head, on_device, self.running, plan.step) else None
        if self.running or self.in_flight or plan.rows:
            self._gate.close(head, plan.step)
            return None
        return match._replace(partial=None, partial_tokens=0)  # without a page to copy from, it fits alone

    def _fits_beside(self, head: Sequence, leader: Sequence, step: int) -> bool:
        whole = len(leader.ids) // self.memory.page_size
        return self.memory.available > 0 and self._gate.fits(head, leader.pages[:whole], self.running, step)

    def _open(self, sequence: Sequence, plan: PassPlan) -> None:
        sequence.slot = self.free_slots.pop()
        if sequence.template is not None:
            sequence.masker, sequence.template = sequence.template.fork(), None
        plan.opens.append(
            m.Open(slot=sequence.slot, sampling=sequence.sampling, index=sequence.index, adapter=sequence.adapter)
        )
        insort(self.running, sequence, key=_rank)
        sequence.private = sequence.sampling is None

    def _start_counting(self, sequence: Sequence, found: int, known: int, leader: Sequence | None) -> None:
        self.counters.cached_tokens += found
        sequence.reached = max(sequence.reached, known)
        if sequence.drawn == 0:
            siblings = leader is not None and leader.request is sequence.request
            sequence.cached_tokens = leader.cached_tokens if leader is not None and siblings else found

    # leaving ----------------------------------------------------------------------------------------------------------

    def _requeue(self, sequence: Sequence, *, remember: bool) -> None:
        """A running sequence gives up its pages and its slot, and waits for its turn again."""
        self._leave(sequence, remember=remember)
        sequence.scores = []
        self.waiting.put_back(sequence)

    def _leave(self, sequence: Sequence, *, remember: bool = True) -> None:
        """Out of the batch. Its pages and its slot stay held until the passes that it is in are applied."""
        del self.running[bisect_left(self.running, _rank(sequence), key=_rank)]
        if self.prefilling is sequence:
            self.prefilling = None
        doubles: list[int] = []
        if remember:
            doubles = self.memory.remember(sequence, self.counters.steps)
            self.memory.remember_tail(sequence, self.counters.steps)
        pages = sequence.pages + ([sequence.source] if sequence.source >= 0 else []) + doubles
        last = self._pass(sequence.last_step)
        if last is not None:
            last.pages += pages
            last.slots.append(sequence.slot)
        else:
            self.memory.release(pages)
            self.free_slots.append(sequence.slot)
        self._gate.left += 1
        sequence.reached = max(sequence.reached, min(sequence.planned, len(sequence.ids)))
        sequence.slot, sequence.pages, sequence.room, sequence.sent = -1, [], 0, 0
        sequence.planned, sequence.in_tree, sequence.leaf, sequence.tail = 0, 0, None, None
        sequence.source = -1
        sequence.private = False

    def _pass(self, step: int) -> PassPlan | None:
        """The pass of that number, if it is in flight."""
        if self.in_flight and step >= self.in_flight[0].step:
            return self.in_flight[step - self.in_flight[0].step]
        return None

    # results ----------------------------------------------------------------------------------------------------------

    def apply(self, results: m.Forwarded) -> list[m.Tokens | m.Scored | m.Failed]:
        """Take in the results of the oldest pass under way. One message a choice that sampled, or finished score; one more
        for a request whose grammar fails.

        Raises RuntimeError when they are not of that pass.
        """
        plan = self.in_flight[0] if self.in_flight else None
        if plan is None or results.step != plan.step or len(results.ids) != len(plan.decoding):
            raise RuntimeError(f"results of pass {results.step} do not belong to the oldest pass under way")
        self.in_flight.popleft()
        until = self._clock() + MASKS_S
        replies: list[m.Tokens | m.Scored | m.Failed] = [*self.catch_up(until)]
        for (sequence, last), scores in zip(plan.scored, results.scores, strict=True):
            if sequence.ended:
                continue
            sequence.scores += scores
            if last:
                version = self.versions[sequence.adapter]
                replies.append(
                    m.Scored(request_id=sequence.request.request_id, logprobs=sequence.scores, version=version)
                )
                self._end(sequence)
        self._take_tokens(plan.decoding, results, replies, until)
        self.memory.release(plan.pages)
        self.free_slots += plan.slots
        return replies

    def _take_tokens(
        self,
        drawing: Iterable[Sequence],
        results: m.Forwarded,
        replies: list[m.Tokens | m.Scored | m.Failed],
        until: float,
    ) -> None:
        size, versions, tops = self.memory.page_size, self.versions, results.top_logprobs
        surplus = sampled = 0
        drawn = zip(drawing, results.ids, results.logprobs, results.entropies, strict=True)
        for at, (sequence, token, logprob, entropy) in enumerate(drawn):
            if sequence.ended:
                surplus += 1
                continue
            ids = sequence.ids
            ids.append(token)
            length = len(ids)
            sampled += 1
            reason = failure = None
            if token in sequence.stop_ids:
                reason = "stop"
            elif length - sequence.prompt_length >= sequence.max_tokens:
                reason = "length"
            if sequence.masker is not None and reason != "stop" and not (reason and sequence.stop_ids):
                try:
                    sequence.masker.take(token)
                    if self._late or self._clock() >= until:
                        self._late[sequence.number] = sequence
                        reason = None
                    else:
                        reason = _look(sequence)
                except GrammarError as error:
                    failure = str(error)
            top = tops[at] if tops and sequence.sampling is not None and sequence.sampling.top_logprobs else None
            replies.append(
                m.Tokens(
                    request_id=sequence.request.request_id,
                    index=sequence.index,
                    ids=[token],
                    logprobs=[logprob],
                    versions=[versions[sequence.adapter]],
                    entropies=[entropy],
                    top_logprobs=[] if top is None else [top],
                    finish_reason=reason,
                    cached_tokens=sequence.cached_tokens,
                )
            )
            if failure is not None:
                replies += self._fail_grammar(sequence, failure)
            elif reason is not None:
                self._end(sequence)
            elif length >= (sequence.in_tree + 1) * size and not sequence.private:
                self._remember(sequence)
        self.counters.sampled_tokens += sampled
        self.counters.surplus_tokens += surplus

    @property
    def waits_for_masks(self) -> bool:
        """There may be nothing to plan before `catch_up`, and no results will come that bring it about."""
        return bool(self._late) and not (self.in_flight or self.paused or self.asleep)

    def catch_up(self, until: float | None = None) -> list[m.Tokens | m.Failed]:
        """Compute masks that are late, oldest first, until that time (None: for `MASKS_S`): at least one, if any is. A message for
        each choice that ends with it, or request that fails."""
        until = self._clock() + MASKS_S if until is None else until
        replies: list[m.Tokens | m.Failed] = []
        while self._late:
            sequence = self._late.pop(next(iter(self._late)))
            try:
                reason = _look(sequence)
            except GrammarError as error:
                replies += self._fail_grammar(sequence, str(error))
                continue
            if reason is not None:
                replies.append(_last_word(sequence, reason))
                self._end(sequence)
            if self._clock() >= until:
                break
        return replies

    def _fail_grammar(self, sequence: Sequence, why: str) -> list[m.Failed]:
        self.counters.grammar_failures += 1
        return self.fail([sequence.request], why, "grammar_failed")

    def _remember(self, sequence: Sequence) -> None:
        doubles = self.memory.remember(sequence, self.counters.steps)
        if doubles:
            last = self._pass(sequence.last_step)
            if last is not None:
                last.pages += doubles
            else:
                self.memory.release(doubles)

    def _end(self, sequence: Sequence) -> None:
        if sequence.sampling is not None:
            self._gate.predictor.finished(sequence.sampled, sequence.max_tokens)
        self.counters.finished += 1
        self._drop(sequence)

    # looking in -------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        memory = self.memory
        return {
            **asdict(self.counters),
            "version": self.versions[""],
            "adapters": len(self.versions) - 1,
            "pages_total": memory.pool.total,
            "pages_free": memory.pool.free,
            "pages_cached": memory.tree.size,
            "host_pages_total": memory.host.total,
            "host_pages_free": memory.host.free,
            "waiting": len(self.waiting),
            "waiting_tokens": self.waiting.tokens,
            "waiting_flows": self.waiting.flows,
            "running": len(self.running),
            "in_flight": len(self.in_flight),
        }

    def check_integrity(self) -> None:
        """Raises AssertionError saying what is inconsistent: pages, references, tree, host tier, slots, queues."""
        check_integrity(self)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.number


def _first_mask(masker: Masker, sampling: m.SamplingParams) -> bytes:
    """What may be drawn first. Raises Refused."""
    try:
        if masker.ended and not sampling.stop_ids:
            raise GrammarError("nothing but the empty text fits the grammar")
        return masker.allowed(sampling.stop_ids, go_on=sampling.min_tokens > 0)
    except GrammarError as error:
        raise Refused("grammar_failed", str(error)) from error


def _look(sequence: Sequence) -> str | None:
    """See what may follow its last token: the reason to finish, if there is one. Raises GrammarError."""
    masker = sequence.masker
    assert masker is not None
    if not sequence.stop_ids and masker.ended:
        return "stop"
    if sequence.sampled >= sequence.max_tokens:
        return "length"
    sequence.allowed = masker.allowed(sequence.stop_ids, go_on=sequence.sampled < sequence.min_tokens)
    return None


def _last_word(sequence: Sequence, reason: str) -> m.Tokens:
    return m.Tokens(
        request_id=sequence.request.request_id,
        index=sequence.index,
        ids=[],
        logprobs=[],
        versions=[],
        finish_reason=reason,
        cached_tokens=sequence.cached_tokens,
    )
