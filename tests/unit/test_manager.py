"""The manager process's loop over real sockets, between a web and a worker that the test plays.

The worker's process is real too, so that it can die: it does nothing, and the test speaks in its place.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout_server import messages as m
from rollout_server.config import EngineConfig
from rollout_server.manager.control import is_base
from rollout_server.manager.kept_weights import KeptWeights
from rollout_server.manager.process import Manager
from rollout_server.manager.worker_process import RESTARTS, STEADY_S, RestartBudget, WorkerLost, WorkerProcess
from tests.unit.shadow_worker import ShadowWorker, expected, expected_scores

PAGE, PAGES, VOCABULARY = 4, 40, 50
READY = m.Ready(
    num_pages=PAGES, page_size=PAGE, host_pages=0, max_positions=60, vocab_size=VOCABULARY, eos_ids=[0], checksum="base"
)
IDLE = ["sh", "-c", "exec sleep 300"]


@dataclass
class Stage:
    manager: Manager
    web: zmq.Socket[bytes]
    worker: zmq.Socket[bytes]
    shadow: ShadowWorker = field(default_factory=lambda: ShadowWorker(PAGES, PAGE))
    orders: list[m.ToWorker] = field(default_factory=list)
    """What the worker was told besides passes."""
    refuse: str | None = None
    checksums: dict[str, str] = field(default_factory=dict)
    """By a source's path, of what a worker loads from there; otherwise it says the version."""

    def tell(self, *messages: m.ToManager) -> None:
        for message in messages:
            self.web.send(m.encode(message))
        self.manager.turn()

    def queued(self) -> int:
        """Let the manager look; how many messages the worker has not taken yet."""
        self.manager.turn()
        return len(self.manager.scheduler.in_flight)

    def work(self) -> bool:
        """Carry out the worker's next message, if there is one."""
        manager = self.manager
        if not (manager.scheduler.in_flight or manager.control.under_way or manager._orders):
            return False
        assert self.worker.poll(60_000)
        message = m.decode_to_worker(self.worker.recv())
        match message:
            case m.Forward():
                answer: m.FromWorker = self.shadow.execute(message)
            case m.Load(version=version, adapter=adapter):
                self.orders.append(message)
                if self.refuse is None:
                    self.shadow.versions[adapter] = version
                checksum = f"sum {version}"
                if isinstance(message.source, m.Directory):
                    checksum = self.checksums.get(content(message.source), checksum)
                answer = m.Loaded(version=version, checksum=checksum, error=self.refuse)
            case _:
                self.orders.append(message)
                answer = m.Acknowledged(error=self.refuse)
        self.worker.send(m.encode(answer))
        assert manager.worker.socket.poll(60_000)
        manager.turn()
        return True

    def heard(self) -> list[m.FromManager]:
        """Work until nothing is left; all that the web has heard since it last listened."""
        while self.work():
            pass
        frames = []
        while self.web.poll(5):
            frames.append(m.decode_from_manager(self.web.recv()))
        return frames

    def die(self) -> None:
        """Kill the worker's process, and let the manager start another, which is not ready yet."""
        self.worker.close(0)
        os.kill(int((self.manager.worker._directory / "worker.pid").read_text()), signal.SIGKILL)
        self.manager.replace_worker()

    def rise(self, ready: m.Ready = READY) -> None:
        """The new worker is ready."""
        self.shadow = ShadowWorker(PAGES, PAGE, step=self.manager.scheduler.counters.steps)
        self.orders.clear()
        self.worker = self.manager.worker._context.socket(zmq.PAIR)
        self.worker.connect(self.manager.worker.address)
        self.worker.send(m.encode(ready))
        assert self.manager.worker.socket.poll(60_000)
        self.manager.turn()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staged(tmp_path) as made:
        yield made


@contextmanager
def staged(directory: Path) -> Iterator[Stage]:
    context = zmq.Context()
    web, own_web, own_worker = (context.socket(zmq.PAIR) for _ in range(3))
    web.bind("inproc://web")
    own_web.connect("inproc://web")
    worker = WorkerProcess(context, directory, IDLE)
    worker.start()
    own_worker.connect(worker.address)
    own_worker.send(m.encode(READY))
    engine = EngineConfig(
        ipc_dir=str(directory), model_dir="", parent_pid=0, max_batch=8, max_step_tokens=32, lookahead=1
    )
    made = Stage(Manager(engine, web, worker), own_web, own_worker)
    yield made
    worker.stop()
    for socket in (web, own_web, made.worker):
        socket.close(0)
    context.term()


def content(source: m.Directory) -> str:
    file = Path(source.path) / "adapter_model.safetensors"
    return file.read_text() if file.is_file() else ""


def submit(key: str, ids: list[int], *, new: int = 6, n: int = 1, adapter: str = "") -> m.Submit:
    return m.Submit(request_id=key, prompt_ids=ids, sampling=m.SamplingParams(max_tokens=new), n=n, adapter=adapter)


def ids_of(heard: list[m.FromManager], key: str, index: int = 0) -> list[int]:
    tokens = [x for x in heard if isinstance(x, m.Tokens) and x.request_id == key and x.index == index]
    assert tokens[-1].finish_reason == "length"
    return [token for each in tokens for token in each.ids]


def source(path: str = "/nowhere") -> m.Directory:
    return m.Directory(path=path)


def test_passes_are_queued_ahead_and_choices_are_answered(stage: Stage) -> None:
    stage.tell(submit("a", [1, 2, 3], n=2), submit("b", [1, 2, 4]))
    assert stage.queued() == 2
    heard = stage.heard()
    for key, prompt, index in (("a", [1, 2, 3], 0), ("a", [1, 2, 3], 1), ("b", [1, 2, 4], 0)):
        assert ids_of(heard, key, index) == expected(prompt, m.SamplingParams(max_tokens=6), index)
    assert stage.queued() == 0


def test_an_update_waits_for_passes_and_holds_later_ones(stage: Stage) -> None:
    stage.tell(submit("a", [1, 2, 3], new=9))
    stage.work()
    update = m.UpdateWeights(request_id="u", source=source(), version=7)
    stage.tell(update, submit("b", [1, 2, 3]))
    assert stage.queued() == 2
    assert not stage.orders
    heard = stage.heard()
    assert stage.orders == [m.Load(source=source(), version=7)]
    assert m.Updated(request_id="u", version=7, checksum="sum 7") in heard
    versions = {x.request_id: x.versions for x in heard if isinstance(x, m.Tokens)}
    assert versions == {"a": [7], "b": [7]}  # of the last token of each
    assert ids_of(heard, "a") == expected([1, 2, 3], m.SamplingParams(max_tokens=9))


def test_rejected_weights_change_nothing(stage: Stage) -> None:
    stage.refuse = "no such file"
    stage.tell(m.UpdateWeights(request_id="u", source=source(), version=7))
    (answer,) = stage.heard()
    assert answer == m.Failed(request_id="u", code="weights_rejected", message="no such file")
    assert stage.manager.scheduler.versions == {"": 0}


def test_adapters_come_and_go(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    stage.tell(submit("early", [1, 2, 3], adapter="x"))
    stage.tell(m.UpdateWeights(request_id="u", source=source(str(tmp_path)), version=3, adapter="x"))
    early, updated = stage.heard()
    assert isinstance(early, m.Failed)
    assert early.code == "model_not_found"
    assert isinstance(updated, m.Updated)
    stage.tell(submit("a", [1, 2, 3], adapter="x"), submit("b", [1, 2, 3]))
    heard = stage.heard()
    assert {x.request_id: x.versions for x in heard if isinstance(x, m.Tokens)} == {"a": [3], "b": [0]}
    stage.tell(submit("c", [1, 2, 3], adapter="x"), m.UnloadAdapter(request_id="d", adapter="x"))
    failed, done = [x for x in stage.heard() if not isinstance(x, m.Tokens)]
    assert isinstance(failed, m.Failed)
    assert (failed.request_id, failed.code) == ("c", "aborted")
    assert done == m.Done(request_id="d")
    stage.tell(m.UnloadAdapter(request_id="e", adapter="x"))
    (gone,) = stage.heard()
    assert isinstance(gone, m.Failed)
    assert gone.code == "model_not_found"


def test_pause_and_resume(stage: Stage) -> None:
    stage.tell(submit("a", [1, 2, 3]))
    stage.work()
    stage.tell(m.Pause(request_id="p"))
    heard = stage.heard()
    assert heard[-1] == m.Done(request_id="p")
    assert not any(isinstance(x, m.Tokens) and x.finish_reason for x in heard)
    stage.tell(submit("b", [1, 2, 3]))
    assert not stage.heard()
    stage.tell(m.Resume(request_id="r"))
    heard += stage.heard()
    assert ids_of(heard, "a") == ids_of(heard, "b") == expected([1, 2, 3], m.SamplingParams(max_tokens=6))


def test_sleep_gives_memory_back_and_wake_goes_on(stage: Stage) -> None:
    stage.tell(submit("a", [1, 2, 3]))
    stage.work()
    stage.tell(m.Sleep(request_id="s", level=2), m.UpdateWeights(request_id="u", source=source(), version=1))
    heard = stage.heard()
    assert stage.orders == [m.Release(weights=True)]
    assert m.Done(request_id="s") in heard
    assert any(isinstance(x, m.Failed) and x.code == "weights_rejected" for x in heard)
    stage.shadow.clear()
    stage.tell(m.Resume(request_id="r"))
    assert stage.heard() == [m.Done(request_id="r")]
    assert stage.queued() == 0, "a pass was planned without memory"
    stage.tell(m.Wake(request_id="w"))
    heard += stage.heard()
    assert stage.orders[1:] == [m.Reclaim()]
    assert ids_of(heard, "a") == expected([1, 2, 3], m.SamplingParams(max_tokens=6))


def test_scores(stage: Stage) -> None:
    ids = [1 + i % 9 for i in range(50)]
    stage.tell(m.Score(request_id="s", ids=ids), m.Score(request_id="one", ids=[4]))
    one, scored = stage.heard()
    assert one == m.Scored(request_id="one", logprobs=[], version=0)
    assert scored == m.Scored(request_id="s", logprobs=expected_scores(ids), version=0)


@pytest.mark.parametrize(
    ("ids", "new", "code"),
    [
        ([], 1, "context_length_exceeded"),
        ([1] * 60, 1, "context_length_exceeded"),
        ([VOCABULARY], 1, "invalid_token_ids"),
        ([-1], 1, "invalid_token_ids"),
    ],
)
def test_what_cannot_be_served_is_refused(stage: Stage, ids: list[int], new: int, code: str) -> None:
    stage.tell(submit("a", ids, new=new))
    (failed,) = stage.heard()
    assert isinstance(failed, m.Failed)
    assert failed.code == code


def test_max_tokens_end_at_the_last_position(stage: Stage) -> None:
    stage.tell(submit("a", [1] * 57, new=100))
    assert len(ids_of(stage.heard(), "a")) == 3


def test_stats_and_integrity(stage: Stage) -> None:
    stage.tell(submit("a", [1, 2, 3]), m.GetStats(request_id="s", check=True), m.Cancel(request_id="a"))
    (stats,) = stage.heard()
    assert isinstance(stats, m.Stats)
    assert stats.values["waiting"] == 1
    stage.manager.scheduler.memory.pool.take()
    stage.tell(m.GetStats(request_id="s", check=True))
    (failed,) = stage.heard()
    assert isinstance(failed, m.Failed)
    assert failed.code == "integrity"


def test_base_weights_and_adapters_are_told_apart(tmp_path: Path) -> None:
    assert is_base(source(str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert not is_base(source(str(tmp_path)))
    assert is_base(m.SharedMemory(block="b", tensors=[]))
    assert not is_base(m.SharedMemory(block="b", tensors=[], adapter_config={"r": 8}))


# a worker that dies --------------------------------------------------------------------------------------------------


def publish(directory: Path, text: str) -> m.Directory:
    """An adapter in a directory: what a worker loads from there is known by its text."""
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").unlink(missing_ok=True)
    (directory / "adapter_model.safetensors").write_text(text)
    return m.Directory(path=str(directory))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False))
def test_replies_do_not_tell_that_the_worker_died(tmp_path_factory: pytest.TempPathFactory, rng: random.Random) -> None:
    """Whenever it dies, up to as often as it may: same tokens as ever, whole scores, nothing leaks."""
    asked = {f"r{i}": [rng.randint(1, 3) for _ in range(rng.randint(1, 20))] for i in range(6)}
    with staged(tmp_path_factory.mktemp("stage")) as stage:
        for key, ids in asked.items():
            if key == "r5" and len(ids) > 1:
                stage.tell(m.Score(request_id=key, ids=ids))
            else:
                stage.tell(submit(key, ids, new=9, n=2))
        heard: list[m.FromManager] = []
        for _ in range(RESTARTS):
            for _ in range(rng.randint(1, 6)):
                stage.work()
            stage.die()
            stage.manager.scheduler.check_integrity()
            assert stage.queued() == 0, "a pass was planned for nobody"
            stage.rise()
        heard += stage.heard()
        stage.manager.scheduler.check_integrity()
        assert stage.manager.scheduler.idle
        failed = {x.request_id: x.code for x in heard if isinstance(x, m.Failed)}
        assert set(failed.values()) <= {"worker_failed"}
        for key, ids in asked.items():
            if key in failed:
                continue
            if key == "r5" and len(ids) > 1:
                assert m.Scored(request_id=key, logprobs=expected_scores(ids), version=0) in heard
                continue
            for index in range(2):
                assert ids_of(heard, key, index) == expected(ids, m.SamplingParams(max_tokens=9), index)


def test_what_comes_while_the_worker_is_away_waits_and_what_asks_is_answered(stage: Stage) -> None:
    stage.tell(submit("a", [1, 2, 3]))
    stage.work()
    stage.die()
    stage.tell(submit("b", [1, 2, 3]), m.GetStats(request_id="s", check=True))
    answers = [x for x in stage.heard() if isinstance(x, m.Stats)]
    assert (answers[0].values["worker_up"], answers[0].values["worker_restarts"]) == (0.0, 1.0)
    stage.rise()
    heard = stage.heard()
    assert ids_of(heard, "b") == expected([1, 2, 3], m.SamplingParams(max_tokens=6))


def test_the_manager_does_not_wait_for_a_worker_or_a_web_process_that_has_just_gone(stage: Stage) -> None:
    stage.worker.close(0)
    time.sleep(0.2)
    stage.tell(submit("a", [1, 2, 3]))
    assert stage.queued() == 2
    stage.die()
    stage.rise()
    stage.web.close(0)
    assert stage.work()
    time.sleep(0.2)
    while stage.work():
        pass


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleep_that_fails_leaves_all_as_it_was(stage: Stage, level: int) -> None:
    stage.tell(submit("a", [1, 2, 3]))
    stage.work()
    stage.refuse = "no room"
    stage.tell(m.Sleep(request_id="s", level=level))
    heard = stage.heard()
    assert m.Failed(request_id="s", code="worker_failed", message="no room") in heard
    assert ids_of(heard, "a") == expected([1, 2, 3], m.SamplingParams(max_tokens=6))
    stage.refuse = None
    stage.tell(m.Sleep(request_id="t", level=level), m.Wake(request_id="w"))
    assert [x for x in stage.heard() if isinstance(x, m.Done)] == [m.Done(request_id="t"), m.Done(request_id="w")]


def test_a_deeper_sleep_that_fails_leaves_the_lighter_one(stage: Stage) -> None:
    stage.tell(m.Sleep(request_id="s", level=1), submit("a", [1, 2, 3]))
    assert stage.heard() == [m.Done(request_id="s")]
    stage.refuse = "no room"
    stage.tell(m.Sleep(request_id="t", level=2))
    assert lost_codes(stage.heard()) == {"t": "worker_failed"}
    stage.refuse = None
    assert stage.queued() == 0
    stage.tell(m.Wake(request_id="w"))
    assert ids_of(stage.heard(), "a") == expected([1, 2, 3], m.SamplingParams(max_tokens=6))


def test_a_sleep_over_which_the_worker_dies_twice_is_none(stage: Stage) -> None:
    stage.tell(submit("a", [1, 2, 3]))
    stage.work()
    stage.tell(m.Sleep(request_id="s", level=2))
    while stage.manager.control.under_way is None:
        stage.work()
    stage.die()
    stage.rise()
    assert isinstance(stage.manager.control.under_way, m.Sleep), "it was not repeated"
    stage.die()
    stage.rise()
    heard = stage.heard()
    assert lost_codes(heard) == {"s": "worker_failed"}
    assert not stage.orders
    assert [x.finish_reason for x in heard if isinstance(x, m.Tokens)][-1] == "length"


def test_a_new_worker_that_cannot_put_its_weights_away_sleeps_with_them(stage: Stage) -> None:
    stage.tell(m.Sleep(request_id="s", level=2))
    stage.heard()
    stage.die()
    stage.refuse = "no room"
    stage.rise()
    assert stage.work()
    stage.refuse = None
    assert stage.heard() == []
    assert stage.orders == [m.Release(weights=True), m.Release(weights=False)]
    stage.tell(m.Wake(request_id="w"))
    assert stage.heard() == [m.Done(request_id="w")]
    assert stage.orders[2:] == [m.Reclaim()]


def test_a_request_that_kills_fails_alone_after_two_deaths(stage: Stage) -> None:
    """The worker dies whenever it is given a pass of this request; those that were in the same passes go on."""
    prompts = {key: [1 + number, 2, 3] * 3 for number, key in enumerate(("a", "b", "deadly", "c", "d"))}
    stage.tell(*(submit(key, ids) for key, ids in prompts.items()))
    deaths = 0
    while stage.manager.scheduler.in_flight:
        (request,) = [r for k, r in stage.manager.scheduler.requests.items() if k == "deadly"] or [None]
        slots = {choice.slot for choice in request.choices if choice.slot >= 0} if request is not None else set()
        if any(sequence.slot in slots for sequence in stage.manager.scheduler.in_flight[0].decoding):
            deaths += 1
            stage.die()
            stage.rise()
        else:
            stage.work()
    heard = stage.heard()
    assert deaths == 2
    assert lost_codes(heard) == {"deadly": "worker_failed"}
    for key in ("a", "b", "c", "d"):
        assert ids_of(heard, key) == expected(prompts[key], m.SamplingParams(max_tokens=6))


def test_a_request_that_kills_again_and_again_does_not_end_the_server(stage: Stage) -> None:
    """Whoever sends it once more costs two deaths each time; others are served in between."""
    for number in range(RESTARTS + 1):
        stage.tell(submit(f"deadly {number}", [1, 2, 3]))
        for _ in range(2):
            stage.manager.turn()
            stage.die()
            stage.rise()
        assert lost_codes(stage.heard()) == {f"deadly {number}": "worker_failed"}
    stage.tell(submit("a", [1, 2, 3]))
    assert ids_of(stage.heard(), "a") == expected([1, 2, 3], m.SamplingParams(max_tokens=6))
    for _ in range(RESTARTS):
        stage.die()
    with pytest.raises(WorkerLost):
        stage.die()


def test_a_request_that_gets_on_between_deaths_is_not_blamed(stage: Stage) -> None:
    stage.tell(submit("a", [1, 2, 3], new=20))
    for _ in range(RESTARTS):
        stage.work()
        stage.work()
        stage.die()
        stage.rise()
    assert ids_of(stage.heard(), "a") == expected([1, 2, 3], m.SamplingParams(max_tokens=20))


def test_a_new_worker_gets_the_weights_of_the_old_one_though_their_publisher_deleted_them(
    stage: Stage, tmp_path: Path
) -> None:
    stage.checksums = {"A": "a", "B": "b", "C": "c"}
    for number, (text, name) in enumerate((("A", ""), ("B", "x"), ("C", "x")), start=1):
        source = publish(tmp_path / "published", text)
        stage.tell(m.UpdateWeights(request_id="u", source=source, version=number, adapter=name))
        assert isinstance(stage.heard()[-1], m.Updated)
    for file in (tmp_path / "published").iterdir():
        file.unlink()
    assert len(list((tmp_path / "weights").iterdir())) == 2, "what is superseded is not removed"
    stage.tell(submit("a", [1, 2, 3], new=9))
    stage.work()
    stage.die()
    stage.rise()
    heard = stage.heard()
    loads = [order for order in stage.orders if isinstance(order, m.Load)]
    assert [(load.adapter, load.version) for load in loads] == [("", 1), ("x", 3)]
    assert stage.manager.up
    assert not stage.manager.weights.lost
    assert ids_of(heard, "a") == expected([1, 2, 3], m.SamplingParams(max_tokens=9))
    stage.tell(m.UnloadAdapter(request_id="d", adapter="x"))
    stage.heard()
    assert len(list((tmp_path / "weights").iterdir())) == 1


def lost_codes(heard: list[m.FromManager]) -> dict[str, str]:
    return {x.request_id: x.code for x in heard if isinstance(x, m.Failed)}


def test_weights_that_cannot_be_loaded_again_are_refused_until_they_are_published(stage: Stage, tmp_path: Path) -> None:
    """Broadcast base weights, and an adapter whose kept files were changed: old weights are never served for new ones."""
    broadcast = m.Broadcast(init_method="tcp://x:1", world_size=2, rank=1, backend="gloo", tensors=[])
    adapter = publish(tmp_path / "x", "X")
    stage.checksums = {"X": "x"}
    stage.tell(m.UpdateWeights(request_id="u", source=adapter, version=1, adapter="x"))
    stage.tell(m.UpdateWeights(request_id="u", source=broadcast, version=1))
    stage.heard()
    stage.tell(submit("a", [1, 2, 3]), submit("b", [1, 2, 3], adapter="x"))
    stage.work()
    stage.checksums = {"X": "changed"}
    stage.die()
    stage.rise()
    heard = stage.heard()
    assert lost_codes(heard) == {"a": "weights_lost", "b": "weights_lost"}
    stage.tell(submit("c", [1, 2, 3]), m.Score(request_id="d", ids=[1, 2]), m.GetStats(request_id="s"))
    heard = stage.heard()
    assert lost_codes(heard) == {"c": "weights_lost", "d": "weights_lost"}
    stats = next(x for x in heard if isinstance(x, m.Stats)).values
    assert (stats["weights_lost"], stats["adapters_lost"]) == (1, 1)
    stage.tell(m.UpdateWeights(request_id="u", source=broadcast, version=2))
    stage.heard()
    stage.tell(submit("e", [1, 2, 3]), submit("f", [1, 2, 3], adapter="x"))
    heard = stage.heard()
    assert lost_codes(heard) == {"f": "weights_lost"}
    assert ids_of(heard, "e") == expected([1, 2, 3], m.SamplingParams(max_tokens=6))
    stage.refuse = "no adapter 'x' is loaded"
    stage.tell(m.UnloadAdapter(request_id="g", adapter="x"))
    assert stage.heard() == [m.Done(request_id="g")]


def test_a_checkpoint_that_has_changed_on_disk_is_not_served_for_the_old_one(stage: Stage) -> None:
    stage.tell(submit("a", [1, 2, 3]))
    stage.die()
    stage.rise(msgspec.structs.replace(READY, checksum="other"))
    assert lost_codes(stage.heard()) == {"a": "weights_lost"}
    stage.die()
    with pytest.raises(WorkerLost, match="another model"):
        stage.rise(msgspec.structs.replace(READY, vocab_size=7))


def test_an_update_during_which_the_worker_dies_is_repeated_once(stage: Stage, tmp_path: Path) -> None:
    source = publish(tmp_path / "x", "X")
    update = m.UpdateWeights(request_id="u", source=source, version=5)
    stage.tell(update)
    stage.die()
    stage.rise()
    assert isinstance(stage.heard()[-1], m.Updated)
    stage.tell(msgspec.structs.replace(update, version=6))
    stage.die()
    stage.rise()
    while stage.manager.control.under_way is None:
        stage.work()
    stage.die()
    assert lost_codes(stage.heard()) == {"u": "worker_failed"}
    stage.rise()
    stage.tell(submit("a", [1, 2, 3]))
    tokens = [x for x in stage.heard() if isinstance(x, m.Tokens)]
    assert {version for x in tokens for version in x.versions} == {5}


def test_a_broadcast_is_not_repeated(stage: Stage) -> None:
    source = m.Broadcast(init_method="tcp://x:1", world_size=2, rank=1, backend="gloo", tensors=[])
    stage.tell(m.UpdateWeights(request_id="u", source=source, version=5))
    stage.die()
    assert lost_codes(stage.heard()) == {"u": "worker_failed"}


@pytest.mark.parametrize("level", [1, 2])
def test_a_worker_that_dies_asleep_is_replaced_by_one_that_sleeps(stage: Stage, level: int) -> None:
    stage.tell(submit("a", [1, 2, 3]))
    stage.work()
    stage.tell(m.Sleep(request_id="s", level=level))
    assert m.Done(request_id="s") in stage.heard()
    stage.die()
    stage.rise()
    stage.heard()
    assert stage.orders == [m.Release(weights=level == 2)]
    stage.tell(m.Wake(request_id="w"))
    stage.die()
    stage.rise()
    heard = stage.heard()
    assert stage.orders == [m.Release(weights=level == 2), m.Reclaim()], "waking was not repeated"
    assert m.Done(request_id="w") in heard
    assert [x.finish_reason for x in heard if isinstance(x, m.Tokens)][-1] == "length"


def test_a_worker_that_keeps_dying_is_given_up() -> None:
    now = [0.0]
    budget = RestartBudget(lambda: now[0])
    for _ in range(3):
        budget.ready()
        now[0] += STEADY_S
        assert [budget.spend() for _ in range(RESTARTS + 1)] == [True] * RESTARTS + [False]
    budget.ready()
    now[0] += STEADY_S
    for _ in range(2 * RESTARTS):
        assert budget.spend()
        assert budget.spend(explained=True)
    assert [budget.spend() for _ in range(RESTARTS + 1)] == [True] * RESTARTS + [False]


def test_a_worker_that_dies_before_it_is_ready_is_not_started_again(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    worker = WorkerProcess(context, tmp_path, ["sh", "-c", "exit 3"])
    worker.start()
    engine = EngineConfig(ipc_dir=str(tmp_path), model_dir="", parent_pid=0)
    with context.socket(zmq.PAIR) as web, pytest.raises(WorkerLost, match="code 3 before it was ready"):
        Manager(engine, web, worker)
    context.term()


def test_an_adapter_in_shared_memory_is_kept_as_a_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from rollout_server.models.checksum import checksum
    from rollout_server.weight_sources import open_source, publish_shared_memory

    tensors = {
        "b": torch.randn(3, 5).to(torch.bfloat16),
        "a": torch.randn(7),
        "none": torch.zeros(0, 4),
        "half": torch.randn(2, 2).half(),
    }
    weights = KeptWeights(tmp_path / "weights", "base")
    with publish_shared_memory(tensors, {"r": 2}) as source:
        weights.loaded(source, "x", 3, checksum(tensors))
    ((name, load),) = weights.begin("base")
    assert (name, load.version) == ("x", 3)
    kept = open_source(load.source)
    assert kept.adapter_config == {"r": 2}
    assert checksum(kept.tensors) == checksum(tensors)
