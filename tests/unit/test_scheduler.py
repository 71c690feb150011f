"""The scheduler without a model, against a worker that keeps track of what every page holds (`shadow_worker`)."""

from __future__ import annotations

import gc
import itertools
import random
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server import messages as m
from rollout_server.manager.masking import GrammarError, all_but
from rollout_server.manager.refusal import Refused
from rollout_server.manager.scheduler import MASKS_S, Scheduler
from rollout_server.manager.sequence import Request, Sequence
from rollout_server.manager.waiting import SLACK
from tests.unit.shadow_worker import VOCABULARY, ShadowWorker, expected, expected_scores

PAGE = 4


@dataclass(frozen=True)
class Steps:
    """At least `least` and at most `most` ids, each `step` or less beyond the one before where that is no stop id.

    After `fails` of them it is too much work.
    """

    step: int = 3
    least: int = 0
    most: int = 1000
    fails: int = 1000
    taken: list[int] = field(default_factory=list)

    def allowed(self, stop_ids: Collection[int], *, go_on: bool = False) -> bytes:
        if len(self.taken) >= self.fails:
            raise GrammarError("too much work")
        before = self.taken[-1] if self.taken else 0
        words = set(range(1, VOCABULARY + 1)) - set(stop_ids)
        following = {(before + by) % VOCABULARY + 1 for by in range(self.step)} & words or words
        if self.ended:
            following = set()
        if len(self.taken) >= self.least and not (go_on and following):
            following |= set(stop_ids)
        return bytes([sum(1 << token for token in following)])

    def take(self, token: int) -> None:
        self.taken.append(token)

    @property
    def ended(self) -> bool:
        return len(self.taken) >= self.most

    def fork(self) -> Steps:
        return replace(self, taken=list(self.taken))


@dataclass
class Asked:
    prompt: list[int]
    sampling: m.SamplingParams | None
    n: int = 1
    masker: Steps | None = None
    outputs: dict[int, list[int]] = field(default_factory=dict)
    versions: list[int] = field(default_factory=list)
    finished: set[int] = field(default_factory=set)
    scores: list[float] | None = None
    cancelled: set[int] = field(default_factory=set)
    gone: bool = False
    """Cancelled or failed."""


class Engine:
    """Scheduler and shadow worker; passes are executed in order, and results applied, when the test says so."""

    def __init__(self, *, tick: float = 0.0, **given: int) -> None:
        """`tick`: seconds by which the clock goes on with each look at it."""
        options = {
            "pages": 64,
            "page_size": PAGE,
            "vocab_size": VOCABULARY + 1,
            "max_batch": 8,
            "max_step_tokens": 32,
            **given,
        }
        self.scheduler = Scheduler(**options, clock=itertools.count(0.0, tick).__next__)  # type: ignore[arg-type]
        self.worker = ShadowWorker(options["pages"], options["page_size"], options.get("host_pages", 0))
        self.asked: dict[str, Asked] = {}
        self.queue: deque[m.Forward] = deque()
        self.finish_order: list[str] = []

    def submit(
        self,
        key: str,
        prompt: list[int],
        sampling: m.SamplingParams | None = None,
        *,
        new: int = 4,
        masker: Steps | None = None,
        **more: int | str,
    ) -> None:
        sampling = sampling or m.SamplingParams(max_tokens=new)
        self.asked[key] = Asked(prompt, sampling, int(more.get("n", 1)), masker)
        self.scheduler.submit(key, prompt, sampling, masker=masker, **more)  # type: ignore[arg-type]

    def score(self, key: str, ids: list[int]) -> None:
        self.asked[key] = Asked(ids, None)
        self.scheduler.submit(key, ids, None)

    def plan(self) -> bool:
        forward = self.scheduler.plan()
        if forward is None:
            return False
        assert forward.rows
        assert sum(len(row.ids) for row in forward.rows) <= self.scheduler.max_step_tokens
        assert len({row.slot for row in forward.rows}) == len(forward.rows)
        self.queue.append(m.decode_to_worker(m.encode(forward)))  # type: ignore[arg-type]
        return True

    def apply(self) -> bool:
        if not self.queue:
            return False
        self.take(self.scheduler.apply(self.worker.execute(self.queue.popleft())))
        return True

    def take(self, replies: Iterable[m.Tokens | m.Scored | m.Failed]) -> None:
        for reply in replies:
            asked = self.asked[reply.request_id]
            assert not asked.gone, "an answer to a request that is gone"
            if isinstance(reply, m.Failed):
                assert reply.code == "grammar_failed"
                asked.gone = True
                continue
            assert not isinstance(reply, m.Tokens) or reply.index not in asked.cancelled, "a cancelled choice sampled"
            if isinstance(reply, m.Scored):
                asked.scores = reply.logprobs
                self.finish_order.append(reply.request_id)
                continue
            assert reply.index not in asked.finished
            asked.outputs.setdefault(reply.index, []).extend(reply.ids)
            asked.versions += reply.versions
            if reply.finish_reason:
                asked.finished.add(reply.index)
                self.finish_order.append(reply.request_id)

    def drain(self) -> None:
        while self.apply():
            pass

    def run(self, *, check: bool = True) -> None:
        while True:
            while self.plan():
                pass
            if self.scheduler.waits_for_masks:
                self.take(self.scheduler.catch_up())
                continue
            if not self.apply():
                break
            if check:
                self.scheduler.check_integrity()
        assert self.scheduler.paused or self.scheduler.idle, "a request starved"

    def verify(self) -> None:
        for key, asked in self.asked.items():
            if asked.gone:
                continue
            if asked.sampling is None:
                assert asked.scores == expected_scores(asked.prompt), key
                continue
            for index in set(range(asked.n)) - asked.cancelled:
                masker = asked.masker.fork() if asked.masker else None
                assert asked.outputs.get(index) == expected(asked.prompt, asked.sampling, index, masker), (key, index)
                assert index in asked.finished

    def verify_no_leak(self) -> None:
        scheduler = self.scheduler
        scheduler.check_integrity()
        assert not scheduler.running
        assert len(scheduler.free_slots) == scheduler.slots
        for root in scheduler.memory.tree.roots():
            scheduler.memory.drop(root)
        assert scheduler.memory.pool.free == scheduler.memory.pool.total, "pages leaked"
        assert scheduler.memory.host.free == scheduler.memory.host.total, "host pages leaked"

    # weights and pauses, as the manager process does them

    def update(self, adapter: str, version: int, *, base: bool = False, running: m.Running = "reprefill") -> None:
        self.drain()
        if base:
            for name in self.worker.versions:
                self.worker.versions[name] += 0 if name == "" else 1000  # other weights under the same version
            self.worker.versions[""] = version
        else:
            self.worker.versions[adapter] = version
        if running == "keep":
            self.worker.keep(None if base else adapter)
        self._fail(self.scheduler.update(adapter, version, base=base, running=running))

    def unload(self, adapter: str) -> None:
        self.drain()
        del self.worker.versions[adapter]
        self._fail(self.scheduler.unload(adapter))

    def pause(self, running: m.Running) -> None:
        self.drain()
        self._fail(self.scheduler.pause(running))

    def sleep(self) -> None:
        self.drain()
        self.scheduler.sleep()
        self.worker.clear()

    def cancel(self, key: str, index: int | None = None) -> None:
        self.scheduler.cancel(key, index)
        asked = self.asked[key]
        asked.cancelled |= {i for i in range(asked.n) if index in (None, i)} - asked.finished
        asked.gone |= (asked.sampling is None or index is None) and bool(asked.cancelled) and asked.scores is None

    def _fail(self, failed: list[m.Failed]) -> None:
        for failure in failed:
            assert failure.code == "aborted"
            self.asked[failure.request_id].gone = True


def prompt_of(rng: random.Random, engine: Engine) -> list[int]:
    """Two ids only: many shared prefixes. Some go on from where an earlier request ended."""
    tail = [rng.randint(1, 2) for _ in range(rng.randint(1, 14))]
    ended = [asked for asked in engine.asked.values() if asked.outputs.get(0)]
    if ended and rng.random() < 0.5:
        before = rng.choice(ended)
        return ([*before.prompt, *before.outputs[0]][: rng.choice([None, -1])] + tail)[:40]
    return tail


def random_event(rng: random.Random, engine: Engine, number: int) -> None:
    scheduler = engine.scheduler
    live = [key for key, asked in engine.asked.items() if not asked.gone]
    event = rng.choices(
        [
            "submit",
            "plan",
            "apply",
            "cancel",
            "score",
            "update",
            "base",
            "adapter",
            "unload",
            "pause",
            "resume",
            "sleep",
            "catch up",
        ],
        [20, 30, 25, 3, 2, 2, 1, 2, 0.5, 1, 3, 0.7, 1],
    )[0]
    modes: list[m.Running] = ["keep", "reprefill", "abort"]
    key = str(number)
    if event == "submit":
        sampling = m.SamplingParams(
            max_tokens=rng.choice([rng.randint(1, 9), 24]),
            stop_ids=rng.choice([(), (1, 2, 3), (1, 2, 3, 4, 5)]),
            min_tokens=rng.choice([0, 0, 1, 5]),
            presence_penalty=rng.choice([0.0, 0.0, 0.5]),
        )
        adapter = rng.choice(list(scheduler.versions))
        prompt, n, priority = prompt_of(rng, engine), rng.choice([1, 1, 2, 5]), rng.choice([0, 0, 1])
        least, flow = rng.randint(0, 5), rng.choice("xyz")
        masker = rng.choice([None, None, Steps(2, least, least + 3), Steps(1), Steps(3, fails=least + 1)])
        engine.submit(key, prompt, sampling, n=n, priority=priority, adapter=adapter, flow=flow, masker=masker)
    elif event == "score":
        engine.score(key, [rng.randint(1, 2) for _ in range(rng.randint(2, 30))])
    elif event == "plan":
        engine.plan()
    elif event == "apply":
        engine.apply()
    elif event == "cancel" and live:
        engine.cancel(rng.choice(live), rng.choice([None, 0, 1, 4]))
    elif event == "update":
        adapter = rng.choice(list(scheduler.versions))
        engine.update(adapter, scheduler.versions[adapter] + 1, running=rng.choice(modes))
    elif event == "base":
        engine.update("", scheduler.versions[""] + 1, base=True, running=rng.choice(modes))
    elif event == "adapter":
        engine.update(rng.choice("ab"), number, running=rng.choice(modes))
    elif event == "unload" and len(scheduler.versions) > 1:
        engine.unload(rng.choice([name for name in scheduler.versions if name]))
    elif event == "pause":
        engine.pause(rng.choice(modes))
    elif event == "resume":
        scheduler.wake()
    elif event == "sleep":
        engine.sleep()
    elif event == "catch up":
        engine.take(scheduler.catch_up())


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    pages=st.integers(17, 40),
    host_pages=st.sampled_from([0, 0, 3, 30]),
    max_batch=st.integers(1, 6),
    max_step_tokens=st.integers(2, 40),
    lookahead=st.integers(0, 3),
    tick=st.sampled_from([0.0, MASKS_S / 3, MASKS_S]),
)
def test_random_interleavings(
    seed: int, pages: int, host_pages: int, max_batch: int, max_step_tokens: int, lookahead: int, tick: float
) -> None:
    rng = random.Random(seed)
    engine = Engine(
        pages=pages,
        host_pages=host_pages,
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        lookahead=lookahead,
        tick=tick,
    )
    for number in range(rng.randint(20, 120)):
        random_event(rng, engine, number)
        engine.scheduler.check_integrity()
    engine.scheduler.wake()
    engine.run()
    engine.verify()
    engine.verify_no_leak()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_outputs_do_not_depend_on_the_way(seed: int) -> None:
    """The same requests, whatever the look-ahead, the chunks, the batch and the memory."""

    def run(**options: int) -> dict[str, dict[int, list[int]]]:
        rng = random.Random(seed)
        engine = Engine(**options)
        for number in range(25):
            sampling = m.SamplingParams(
                max_tokens=rng.randint(1, 9), stop_ids=rng.choice([(), (1,)]), min_tokens=rng.choice([0, 3])
            )
            prompt = [rng.randint(1, 2) for _ in range(rng.randint(1, 30))]
            engine.submit(str(number), prompt, sampling, n=rng.choice([1, 3]))
            if rng.random() < 0.3:
                engine.plan()
        engine.run()
        engine.verify()
        engine.verify_no_leak()
        return {key: asked.outputs for key, asked in engine.asked.items()}

    alone = run(max_batch=1, pages=200)
    for options in (
        {"lookahead": 1},
        {"lookahead": 3, "max_step_tokens": 5},
        {"max_step_tokens": 3, "pages": 11},
        {"lookahead": 2, "pages": 12, "host_pages": 6},
        {"lookahead": 1, "pages": 300, "max_batch": 64, "max_step_tokens": 1000},
    ):
        assert run(**options) == alone


def unique_tokens(engine: Engine) -> None:
    """Every prompt token was computed once, and none that had been computed before."""
    counters = engine.scheduler.counters
    assert counters.evicted_pages == counters.preemptions == 0
    assert engine.worker.twice == counters.recomputed_tokens


@pytest.mark.parametrize("lookahead", [0, 1, 3])
@pytest.mark.parametrize("step_tokens", [7, 64, 1000])
def test_a_group_computes_its_prompt_once(lookahead: int, step_tokens: int) -> None:
    """16 tasks with a common prefix, 16 choices each; then 16 separate but equal requests."""
    rng = random.Random(0)
    engine = Engine(pages=4000, max_batch=300, max_step_tokens=step_tokens, lookahead=lookahead)
    common = [rng.randint(1, 9) for _ in range(50)]
    prompts = [common + [task] + [rng.randint(1, 9) for _ in range(rng.randint(5, 12))] for task in range(16)]
    for task, prompt in enumerate(prompts):
        engine.submit(str(task), prompt, new=9, n=16)
    for twin in range(16):
        engine.submit(f"twin {twin}", [7, *common], new=9)
    engine.run()
    engine.verify()
    unique = len({tuple(p[:i]) for p in [*prompts, [7, *common]] for i in range(1, len(p) + 1)})
    assert engine.scheduler.counters.prefill_tokens == unique
    if step_tokens > 7:  # there are fewer slots than choices otherwise
        assert engine.scheduler.counters.recomputed_tokens == 0
    unique_tokens(engine)


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_conversations_and_documents_compute_each_prefix_once(lookahead: int) -> None:
    """Turns extend what was sampled before them; documents share what they share, in the middle of pages too."""
    rng = random.Random(1)
    engine = Engine(pages=8000, max_batch=24, max_step_tokens=50, lookahead=lookahead)
    system = [rng.randint(1, 9) for _ in range(33)]
    histories = [system + [rng.randint(1, 9) for _ in range(rng.randint(6, 20))] + [c] for c in range(24)]
    prompts: list[list[int]] = []
    for turn in range(5):
        for c, history in enumerate(histories):
            prompts.append(list(history))
            engine.submit(f"{c} {turn}", list(history), m.SamplingParams(max_tokens=11, stop_ids=(5,)))
        engine.run()
        for c, history in enumerate(histories):
            history += engine.asked[f"{c} {turn}"].outputs[0]
            history += [8] + [rng.randint(1, 9) for _ in range(rng.randint(0, 30))]  # no id that is sampled
    engine.verify()
    unique_tokens(engine)
    assert engine.scheduler.counters.recomputed_tokens == 0
    sampled = {tuple(asked.prompt + asked.outputs[0][:i]) for asked in engine.asked.values() for i in range(1, 12)}
    nodes = {tuple(p[:i]) for p in prompts for i in range(1, len(p) + 1)}
    computed = engine.scheduler.counters.prefill_tokens
    # The last sampled token of a turn is computed with it only where a pass ahead of its results did so.
    assert len(nodes - sampled) <= computed <= len(nodes - sampled) + len(engine.asked)


def test_what_a_pass_computes_is_not_copied_in_that_pass() -> None:
    engine = Engine(lookahead=2)
    engine.submit("a", [1, 2, 3, 4, 5, 6, 7])
    engine.submit("b", [1, 2, 3, 4, 5, 6, 8])
    assert engine.plan()
    assert len(engine.scheduler.running) == 1
    assert engine.plan()
    assert len(engine.scheduler.running) == 2
    assert engine.queue[1].copies
    engine.run()
    engine.verify()
    assert engine.scheduler.counters.prefill_tokens == 8


@pytest.mark.parametrize("lookahead", [0, 2])
def test_scoring_what_another_request_prefills(lookahead: int) -> None:
    """Equal ids in one pass: the score draws no token from them."""
    engine = Engine(lookahead=lookahead)
    ids = list(range(11))
    engine.submit("a", ids)
    engine.score("s", ids)
    engine.submit("b", ids)
    engine.run()
    engine.verify()
    engine.verify_no_leak()


def test_choices_beyond_the_slots_come_later() -> None:
    engine = Engine(max_batch=3)
    engine.submit("a", [1, 2, 3, 4, 5, 6, 7], n=8)
    engine.run()
    engine.verify()
    assert engine.scheduler.counters.prefill_tokens == 7


def test_first_come_first_served_within_a_priority() -> None:
    engine = Engine(max_batch=1)
    for i in range(6):
        engine.submit(str(i), [i + 1] * (9 - i), new=2, priority=1 - i % 2)
    engine.run()
    assert engine.finish_order == ["1", "3", "5", "0", "2", "4"]


def test_a_flood_of_one_flow_does_not_delay_another() -> None:
    """Three flows of 100 requests each, and then one request of a fourth: it is among the next few."""
    engine = Engine(max_batch=1)
    for i in range(100):
        for flow in "abc":
            engine.submit(f"{flow} {i}", [1, 2], new=1, flow=flow)
    for _ in range(30):
        engine.plan()
        engine.apply()
    engine.submit("late", [1, 2], new=1, flow="d")
    engine.run()
    assert engine.finish_order.index("late") <= 30 + 4
    assert [key for key in engine.finish_order if key[0] == "a"] == [f"a {i}" for i in range(100)]


def test_choices_of_two_floods_stay_together() -> None:
    """Choices of a request draw from one row's logits: they must not take turns with those of another flow."""
    engine = Engine(max_batch=16, max_step_tokens=200, pages=400)
    for i in range(6):
        for flow in "ab":
            engine.submit(f"{flow} {i}", [1, 2, 3, ord(flow), i], new=3, n=8, flow=flow)
    engine.run()
    engine.verify()
    assert engine.scheduler.counters.recomputed_tokens == 0
    unique_tokens(engine)


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("stop_ids", [(), (1, 2)])
def test_what_is_drawn_fits_the_grammar(lookahead: int, stop_ids: tuple[int, ...]) -> None:
    """Beside sequences without one, in too little memory, and with equal prompts under other grammars."""
    engine = Engine(pages=24, lookahead=lookahead)
    sampling = m.SamplingParams(max_tokens=20, stop_ids=stop_ids)
    for i in range(6):
        engine.submit(f"free {i}", [1, 2, 3, 4, 5], sampling)
        engine.submit(f"masked {i}", [1, 2, 3, 4, 5], sampling, n=3, masker=Steps(2, least=i, most=2 * i + 3))
    engine.run()
    engine.verify()
    engine.verify_no_leak()


def test_a_grammar_that_has_ended_ends_the_choice_without_another_draw() -> None:
    engine = Engine(lookahead=1)
    engine.submit("a", [1, 2, 3], new=9, masker=Steps(most=4))
    engine.run()
    assert len(engine.asked["a"].outputs[0]) == 4
    assert engine.scheduler.counters.steps == 4
    engine.verify_no_leak()


@pytest.mark.parametrize("stop_ids", [(), (1, 2)])
def test_masks_that_take_long_delay_nobody_else(stop_ids: tuple[int, ...]) -> None:
    """A mask a pass is all there is time for: free sequences get a token a pass, masked ones take turns, and what is drawn
    is the same."""
    engine = Engine(lookahead=1, max_batch=16, tick=MASKS_S)
    engine.submit("free", [1, 2, 3, 4], new=12)
    for i in range(8):
        sampling = m.SamplingParams(max_tokens=6, stop_ids=stop_ids)
        engine.submit(f"masked {i}", [1, 2, i + 1], sampling, masker=Steps(2, most=5))
    for _ in range(14):
        while engine.plan():
            pass
        engine.apply()
    assert len(engine.asked["free"].outputs[0]) >= 12
    masked = [engine.asked[f"masked {i}"] for i in range(8)]
    lengths = [len(asked.outputs[0]) for asked in masked if not asked.finished]
    assert max(lengths) - min(lengths) <= 2, "they do not take turns"
    engine.run()
    engine.verify()
    engine.verify_no_leak()


def test_masks_that_are_late_when_their_requests_go() -> None:
    """Cancelled, preempted by an update, or with nothing else to do: nobody waits for ever."""
    engine = Engine(tick=MASKS_S)
    for i in range(6):
        engine.submit(str(i), [1, 2, 3], new=5, masker=Steps(2, most=3 + i % 2))
    engine.plan()
    engine.apply()
    assert len(engine.scheduler._late) >= 4
    engine.cancel("1")
    engine.update("", 1)
    engine.run()
    engine.verify()
    engine.verify_no_leak()
    assert not engine.scheduler._late


@pytest.mark.parametrize("end", ["cancel", "fail", "cancel each"])
def test_requests_that_end_leave_no_garbage(end: str) -> None:
    """Reference counts free them at once: the manager's garbage is collected rarely."""
    engine = Engine(pages=400)
    gc.collect()
    gc.disable()
    try:
        for number in range(300):
            engine.scheduler.submit(str(number), [1] * 50, m.SamplingParams(max_tokens=4), n=2, masker=Steps())
            if number % 3 == 0:
                engine.scheduler.plan()
                for plan in list(engine.scheduler.in_flight):
                    draws = len(plan.decoding)
                    forwarded = m.Forwarded(
                        step=plan.step,
                        ids=[1] * draws,
                        logprobs=[0.0] * draws,
                        entropies=[0.0] * draws,
                        top_logprobs=[],
                        scores=[],
                        seconds=0.0,
                    )
                    engine.scheduler.apply(forwarded)
            if end == "fail":
                engine.scheduler.fail(list(engine.scheduler.requests.values()), "why")
            for index in (0, 1) if end == "cancel each" else (None,):
                engine.scheduler.cancel(str(number), index)
        alive = [each for each in gc.get_objects() if isinstance(each, Sequence | Request)]
        assert len(alive) <= 2 * SLACK + 2, "more than the queue's own entries"
        assert not any(each.masker or each.template for each in alive if isinstance(each, Sequence))
    finally:
        gc.enable()


@pytest.mark.parametrize("lookahead", [0, 3])
def test_no_choice_stops_before_min_tokens(lookahead: int) -> None:
    """In too little memory; nobody waits for results, as the mask depends on a count only."""
    engine = Engine(pages=24, lookahead=lookahead)
    for i in range(8):
        sampling = m.SamplingParams(max_tokens=20, stop_ids=(1, 2, 3, 4, 6), min_tokens=2 * i)
        engine.submit(f"{i}", [1, 2, 3, 4, 5], sampling, n=3)
    engine.plan()
    engine.plan()
    assert len(engine.queue) == 1 + (lookahead > 0), "it waits for results that it does not need"
    engine.run()
    engine.verify()
    engine.verify_no_leak()
    lengths = {key: {len(ids) for ids in asked.outputs.values()} for key, asked in engine.asked.items()}
    assert all(min(found) > 2 * int(key) for key, found in lengths.items())
    assert 1 in lengths["0"], "it would not have stopped at once anyway"


def test_min_tokens_within_a_grammar() -> None:
    """A grammar that has ended leaves nothing but to stop."""
    engine = Engine(lookahead=1)
    sampling = m.SamplingParams(max_tokens=20, stop_ids=(1, 2), min_tokens=6)
    engine.submit("long enough", [1, 2, 3], sampling, n=4, masker=Steps(2))
    engine.submit("ends", [1, 2, 3], sampling, n=4, masker=Steps(2, most=3))
    engine.submit("ends at once", [1, 2, 3], m.SamplingParams(max_tokens=20, min_tokens=6), masker=Steps(2, most=3))
    engine.run()
    engine.verify()
    assert min(len(ids) for ids in engine.asked["long enough"].outputs.values()) > 6
    assert {len(ids) for ids in engine.asked["ends"].outputs.values()} == {4}
    assert len(engine.asked["ends at once"].outputs[0]) == 3


@pytest.mark.parametrize("size", [1, 8, 13, 16])
def test_a_mask_against_ids_allows_all_others(size: int) -> None:
    mask = all_but([0, 3, 11, 99, -1], size)
    assert len(mask) == -(-size // 8)
    allowed = [i for i in range(8 * len(mask)) if mask[i >> 3] >> (i & 7) & 1]
    assert allowed == [i for i in range(size) if i not in (0, 3, 11)]


def test_min_tokens_without_an_id_that_is_no_stop_id_is_refused() -> None:
    scheduler = Engine().scheduler
    with pytest.raises(Refused, match="min_tokens") as refused:
        scheduler.submit("a", [1], m.SamplingParams(max_tokens=4, stop_ids=tuple(range(VOCABULARY + 1)), min_tokens=1))
    assert refused.value.code == "invalid_sampling"
    assert scheduler.idle


def test_a_grammar_that_fails_fails_its_request_and_no_other() -> None:
    engine = Engine(lookahead=1)
    engine.submit("bad", [1, 2, 3], new=9, n=3, masker=Steps(fails=3))
    engine.submit("good", [1, 2, 3], new=9, n=2, masker=Steps())
    engine.run()
    assert engine.asked["bad"].gone
    engine.verify()
    engine.verify_no_leak()
    assert engine.scheduler.stats()["grammar_failures"] == 1
    with pytest.raises(Refused, match="too much work") as refused:
        engine.scheduler.submit("worse", [1], m.SamplingParams(max_tokens=4), masker=Steps(fails=0))
    assert refused.value.code == "grammar_failed"
    assert not engine.scheduler.requests


def test_one_choice_is_cancelled_and_its_pages_are_free_at_once() -> None:
    engine = Engine(lookahead=0)
    engine.submit("a", [1, 2, 3, 4, 5, 6], new=12, n=3)
    for _ in range(7):
        engine.plan()
        engine.apply()
    running = {sequence.index: sequence for sequence in engine.scheduler.running}
    own = running[1].pages[1:]
    engine.cancel("a", 1)
    assert not any(engine.scheduler.memory.pool.holders(page) for page in own)
    assert [sequence.index for sequence in engine.scheduler.running] == [0, 2]
    engine.run()
    engine.verify()
    engine.cancel("a", 0)
    engine.verify_no_leak()
    assert not engine.scheduler.requests


def test_a_request_whose_choices_are_all_cancelled_is_forgotten() -> None:
    engine = Engine(max_batch=1)
    engine.submit("a", [1, 2, 3], n=3)
    engine.plan()
    for index in (2, 0, 1, 7):
        engine.cancel("a", index)
    assert not engine.scheduler.requests
    engine.drain()
    engine.verify_no_leak()
    assert engine.scheduler.stats()["waiting_tokens"] == 0


def test_low_priorities_do_not_starve() -> None:
    engine = Engine(max_batch=1)
    engine.submit("low", [1, 2], new=1, priority=5)
    for number in range(600):
        engine.submit(str(number), [1, 2], new=1)
        engine.plan()
        engine.apply()
    assert engine.finish_order.index("low") <= 257


def test_surplus_of_a_late_stop_is_dropped() -> None:
    ids = expected([1, 2, 3], m.SamplingParams(max_tokens=9))
    engine = Engine(lookahead=3)
    engine.submit("a", [1, 2, 3], m.SamplingParams(max_tokens=9, stop_ids=(ids[2],)))
    engine.run()
    assert engine.asked["a"].outputs[0] == ids[: ids.index(ids[2]) + 1]
    assert engine.scheduler.counters.surplus_tokens == 3


def test_no_pass_is_planned_beyond_max_tokens() -> None:
    engine = Engine(lookahead=3)
    engine.submit("a", [1, 2, 3], new=2)
    engine.run()
    assert engine.scheduler.counters.steps == 2
    assert engine.scheduler.counters.surplus_tokens == 0


def test_preemption_keeps_what_was_sampled() -> None:
    """Short answers were the rule; now they are long, and memory was promised too often."""
    engine = Engine(pages=24, max_batch=8, lookahead=1)
    for i in range(40):
        engine.submit(f"short {i}", [1, 1, 1 + i % 3], m.SamplingParams(max_tokens=40, stop_ids=tuple(range(8))))
    engine.run()
    for i in range(8):
        engine.submit(f"long {i}", [2, i], new=40)
    engine.run()
    engine.verify()
    assert engine.scheduler.counters.preemptions > 0


def test_paused_conversations_go_to_the_host_tier_and_back() -> None:
    rng = random.Random(2)
    engine = Engine(pages=24, host_pages=200, max_batch=2)
    histories = [[c, *(rng.randint(1, 9) for _ in range(20))] for c in range(8)]
    for turn in range(3):
        for c, history in enumerate(histories):
            engine.submit(f"{c} {turn}", list(history), new=5)
        engine.run()
        for c, history in enumerate(histories):
            history += [*engine.asked[f"{c} {turn}"].outputs[0], 1, 2]
    engine.verify()
    counters = engine.scheduler.counters
    assert counters.offloaded_pages == counters.evicted_pages > 0
    assert counters.restored_pages > 0
    assert engine.worker.twice == 0, "something was computed again although the host tier had it"
    engine.verify_no_leak()


@pytest.mark.parametrize("running", ["keep", "reprefill", "abort"])
def test_an_update_while_sequences_run(running: m.Running) -> None:
    engine = Engine(lookahead=1)
    for key in ("a", "b"):
        engine.submit(key, [1, 2, 3, 4, 5], new=8)
    engine.update("other", 3)
    engine.submit("c", [1, 2, 3, 4, 5], new=8, adapter="other")
    for _ in range(3):
        engine.plan()
        engine.apply()
    engine.update("", 1, running=running)
    engine.submit("d", [1, 2, 3, 4, 5], new=3)
    engine.run()
    engine.verify()
    assert engine.asked["c"].versions == [3] * 8
    assert engine.asked["d"].versions == [1] * 3
    if running == "abort":
        assert engine.asked["a"].gone
        assert engine.asked["b"].gone
    else:
        assert sorted(set(engine.asked["a"].versions)) == [0, 1]
    engine.verify_no_leak()


def test_a_request_that_can_never_fit_is_refused() -> None:
    scheduler = Scheduler(pages=4, page_size=PAGE, vocab_size=VOCABULARY, max_batch=1, max_step_tokens=16)
    with pytest.raises(Refused, match="17 tokens") as refused:
        scheduler.submit("a", [1] * 10, m.SamplingParams(max_tokens=7))
    assert refused.value.code == "too_large"
    with pytest.raises(Refused, match="no adapter 'x'") as refused:
        scheduler.submit("a", [1] * 10, m.SamplingParams(max_tokens=1), adapter="x")
    assert refused.value.code == "model_not_found"


def test_a_sequence_as_large_as_the_memory_runs() -> None:
    engine = Engine(pages=4)
    engine.submit("a", [1] * 6, new=10)
    engine.run()
    engine.submit("b", [1] * 7, new=9)  # would start as a copy, which needs a fifth page for a moment
    engine.run()
    engine.verify()


def test_integrity_is_not_vacuous() -> None:
    engine = Engine()
    engine.submit("a", [1] * 10, new=5)
    engine.plan()
    engine.scheduler.check_integrity()
    engine.scheduler.memory.pool.hold(engine.scheduler.running[0].pages[0])
    with pytest.raises(AssertionError, match="2 holds, 1 holders"):
        engine.scheduler.check_integrity()
