"""Requests that wait for their grammars, alone and in the manager's loop."""

from __future__ import annotations

import select
import threading
from pathlib import Path

import msgspec
import pytest

from rollout_server import messages as m
from rollout_server.grammar import Grammars, Matcher
from rollout_server.manager.compiling import LEAST_TEXT, Compiled, Compiling
from rollout_server.manager.masking import GrammarError
from tests.unit.test_manager import staged

GRAMMAR = 'start: "yes" | "no"'


def request(key: str, grammar: str = GRAMMAR, *, n: int = 1) -> m.Submit:
    return m.Submit(request_id=key, prompt_ids=[1, 2, 3], sampling=m.SamplingParams(max_tokens=4), n=n, grammar=grammar)


def next_finished(compiling: Compiling) -> list[Compiled]:
    assert select.select([compiling.pipe], [], [], 20)[0], "nothing woke up"
    return compiling.finished()


@pytest.fixture(scope="module")
def vocabulary(tiny_llama: Path) -> Path:
    return tiny_llama


def test_a_grammar_is_compiled_meanwhile_and_known_afterwards(vocabulary: Path) -> None:
    compiling = Compiling(Grammars(vocabulary, 49_152))
    assert compiling.begin(request("a")) is None
    assert len(compiling) == 1
    (done,) = next_finished(compiling)
    assert done.submit.request_id == "a"
    assert isinstance(done.grammar, Matcher)
    assert isinstance(compiling.begin(request("b")), Matcher)
    assert not compiling.finished()
    assert not len(compiling)
    assert not select.select([compiling.pipe], [], [], 0)[0], "the manager would wake up for nothing"


def test_a_request_that_is_cancelled_meanwhile_is_forgotten(vocabulary: Path) -> None:
    """As a whole, choice by choice, or in part; what is not here is somebody else's."""
    grammars = Grammars(vocabulary, 49_152)
    compiling, busy = Compiling(grammars), threading.Event()
    assert grammars.check('start: "a"') is None
    assert grammars._thread is not None
    grammars._thread.submit(busy.wait, 20)
    for key in ("whole", "each", "part"):
        assert compiling.begin(request(key, f'start: "{key}"', n=2)) is None
    assert compiling.cancel("whole", None)
    assert compiling.cancel("each", 0)
    assert compiling.cancel("each", 1)
    assert compiling.cancel("part", 1)
    assert not compiling.cancel("whole", None)
    assert not compiling.cancel("another", None)
    busy.set()
    done: list[Compiled] = []
    while not done:
        done = next_finished(compiling)
    assert [(each.submit.request_id, each.cancelled) for each in done] == [("part", {1})]


def test_a_grammar_that_is_refused_is_an_answer(vocabulary: Path) -> None:
    compiling = Compiling(Grammars(vocabulary, 49_152))
    assert compiling.begin(request("a", "start: /(/")) is None
    (done,) = next_finished(compiling)
    assert isinstance(done.grammar, GrammarError)
    with pytest.raises(GrammarError):
        compiling.begin(request("b", "start: /(/"))


def test_what_waits_with_grammars_is_bounded(vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal grammars are one object; beyond the limit requests wait as text, whatever their flow, and flows take turns."""
    monkeypatch.setattr("rollout_server.manager.compiling.HELD_TEXT", 3 * LEAST_TEXT)
    compiling = Compiling(Grammars(vocabulary, 49_152))
    waiting: dict[str, object] = {}

    def take() -> None:
        while any(pending.future is not None for pending in compiling._pending.values()):
            for done in next_finished(compiling):
                assert isinstance(done.grammar, Matcher)
                waiting[done.submit.request_id] = done.grammar

    def ask(key: str, flow: str) -> None:
        assert compiling.begin(msgspec.structs.replace(request(key, f'start: "{key}"'), flow=flow)) is None

    for number in range(6):
        ask(f"flood {number}", "flood")
    take()
    assert set(waiting) == {"flood 0", "flood 1", "flood 2"}
    again = compiling.begin(request("again", 'start: "flood 1"'))
    assert again is waiting["flood 1"]
    ask("other 0", "other")
    ask("gone", "gone")
    assert compiling.cancel("gone", None)
    compiling.resume()
    take()
    assert len(waiting) == 3
    del waiting["flood 1"], again
    compiling.resume()
    take()
    assert "other 0" in waiting
    assert len(waiting) == 3
    del waiting["flood 0"], waiting["flood 2"]
    compiling.resume()
    take()
    assert set(waiting) == {"other 0", "flood 3", "flood 4"}
    waiting.clear()
    compiling.resume()
    take()
    waiting.clear()
    assert not len(compiling)
    assert not compiling._text, "something is held for nobody"


@pytest.mark.parametrize("masks_s", [0.0, 1.0])
def test_the_manager_admits_those_it_held_back(
    tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch, masks_s: float
) -> None:
    """Also when there is time for one mask a pass, and nothing but masks to wait for."""
    monkeypatch.setattr("rollout_server.manager.scheduler.MASKS_S", masks_s)
    monkeypatch.setattr("rollout_server.manager.compiling.HELD_TEXT", LEAST_TEXT)
    with staged(tmp_path) as stage:
        manager = stage.manager
        manager.compiling = Compiling(Grammars(vocabulary, 50))
        stage.tell(*(request(str(number), f"start: /[0-9]{{2,{number + 3}}}/") for number in range(5)))
        heard: list[m.FromManager] = []
        while len(heard) < 20 and len({x.request_id for x in heard if isinstance(x, m.Tokens) and x.finish_reason}) < 5:
            if len(manager.compiling):
                select.select([manager.compiling.pipe], [], [], 0.2)
                manager.turn()
            heard += stage.heard()
        assert {x.request_id for x in heard if isinstance(x, m.Tokens) and x.finish_reason} == set("01234")
        manager.turn()
        assert not manager.compiling._text


def test_the_manager_serves_others_while_a_grammar_is_compiled(tmp_path: Path, vocabulary: Path) -> None:
    with staged(tmp_path) as stage:
        grammars = Grammars(vocabulary, 50)
        stage.manager.compiling = Compiling(grammars)
        assert grammars.check('start: "0"') is None
        assert grammars._thread is not None
        busy = threading.Event()
        grammars._thread.submit(busy.wait, 20)
        stage.tell(request("masked", "start: /[0-9]+/", n=2), request("bad", "start: /(/"), request("gone"))
        free = m.Submit(request_id="free", prompt_ids=[1, 2, 3], sampling=m.SamplingParams(max_tokens=4))
        stage.tell(m.Cancel(request_id="masked", index=1), m.Cancel(request_id="gone"), free)
        assert {reply.request_id for reply in stage.heard()} == {"free"}
        busy.set()
        while len(stage.manager.compiling):
            assert select.select([stage.manager.compiling.pipe], [], [], 20)[0]
            stage.manager.turn()
        assert [choice.ended for choice in stage.manager.scheduler.requests["masked"].choices] == [False, True]
        assert stage.worker.poll(5000)
        forward = m.decode_to_worker(stage.worker.recv())
        assert isinstance(forward, m.Forward)
        assert [draw.allowed is not None for row in forward.rows for draw in row.draws] == [True]
        assert stage.web.poll(5000)
        failed = m.decode_from_manager(stage.web.recv())
        assert isinstance(failed, m.Failed)
        assert (failed.request_id, failed.code) == ("bad", "invalid_grammar")
