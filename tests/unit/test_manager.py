"""The manager process's loop over real sockets, between a web and a worker that the test plays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zmq

from rollout_server import messages as m
from rollout_server.config import EngineConfig
from rollout_server.manager.control import is_base
from rollout_server.manager.process import Manager
from tests.unit.shadow_worker import ShadowWorker, expected, expected_scores

PAGE, PAGES, VOCABULARY = 4, 40, 50


@dataclass
class Stage:
    manager: Manager
    web: zmq.Socket[bytes]
    worker: zmq.Socket[bytes]
    shadow: ShadowWorker = field(default_factory=lambda: ShadowWorker(PAGES, PAGE))
    orders: list[m.ToWorker] = field(default_factory=list)
    """What the worker was told besides passes."""
    refuse: str | None = None

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
        if not self.worker.poll(5):
            return False
        message = m.decode_to_worker(self.worker.recv())
        match message:
            case m.Forward():
                answer: m.FromWorker = self.shadow.execute(message)
            case m.Load(version=version, adapter=adapter):
                self.orders.append(message)
                if self.refuse is None:
                    self.shadow.versions[adapter] = version
                answer = m.Loaded(version=version, checksum=f"sum {version}", error=self.refuse)
            case _:
                self.orders.append(message)
                answer = m.Acknowledged(error=self.refuse)
        self.worker.send(m.encode(answer))
        self.manager.turn()
        return True

    def heard(self) -> list[m.FromManager]:
        """Work until nothing is left; all that the web has heard since it last listened."""
        while self.work():
            pass
        frames = []
        while self.web.poll(5):
            frames.append(m.decode_from_manager(self.web.recv()))
        return frames


@pytest.fixture
def stage() -> Iterator[Stage]:
    context = zmq.Context()
    sockets = [context.socket(zmq.PAIR) for _ in range(4)]
    for number, name in enumerate(("web", "worker")):
        sockets[number].bind(f"inproc://{name}")
        sockets[number + 2].connect(f"inproc://{name}")
    ready = m.Ready(
        num_pages=PAGES,
        page_size=PAGE,
        host_pages=0,
        max_positions=60,
        vocab_size=VOCABULARY,
        eos_ids=[0],
        checksum="",
    )
    sockets[3].send(m.encode(ready))
    engine = EngineConfig(ipc_dir="", model_dir="", parent_pid=0, max_batch=8, max_step_tokens=32, lookahead=1)
    yield Stage(Manager(engine, sockets[0], sockets[1]), sockets[2], sockets[3])
    for socket in sockets:
        socket.close(0)
    context.term()


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
