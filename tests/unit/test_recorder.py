"""The recorder: what is handed in together is written together, and none suffers for another."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from lightning_rl.episode import Call, EpisodeStart, Span, Task
from lightning_rl.errors import StoreError
from lightning_rl.redact import Redactor
from lightning_rl.store import Store
from lightning_rl.tool_uses import tool_uses
from rollout_server.api.recorder import EpisodeLog, Recorder
from rollout_server.api.redaction import Redaction

NOTHING = Redaction(Redactor([], []), Tokenizer(WordLevel({"a": 0}, unk_token="a")), 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Store.open(tmp_path / "episodes.db") as store:
        store.begin(EpisodeStart(id="e", task=Task(id="t", input={}), phase="train"))
    return tmp_path / "episodes.db"


class Counting(Store):
    """Notes how many calls each transaction has."""

    def add_calls(self, calls: Sequence[Call], spans: Sequence[Span] = ()) -> None:
        self.__dict__.setdefault("batches", []).append(len(calls))
        super().add_calls(calls, spans)


def call(number: int, **fields: Any) -> Call:
    whole: dict[str, Any] = {
        "id": f"call-{number}",
        "episode_id": "e",
        "index": number,
        "model": "m",
        "prompt_ids": [1],
        "sampled_ids": [2],
        "logprobs": [-0.5],
        "versions": [0],
        "temperature": 1.0,
        "finish_reason": "stop",
    }
    return Call(**{**whole, **fields})


def span(call_id: str) -> Span:
    return Span(id=f"tool-{call_id}", episode_id="e", name="t", kind="tool")


def run(path: Path, work: Callable[[Recorder, EpisodeLog], Awaitable[None]]) -> list[int]:
    """The sizes of the transactions."""
    store = Counting.open(path)
    recorder = Recorder(store, NOTHING)

    async def main() -> None:
        await work(recorder, await recorder.episode("e"))

    asyncio.run(main())
    recorder.close()
    return store.__dict__["batches"]


def test_calls_that_come_while_one_is_written_share_a_transaction(path: Path) -> None:
    async def work(recorder: Recorder, log: EpisodeLog) -> None:
        log.reserve(200)

        async def durable(number: int) -> None:
            await recorder.record(log, call(number), [span(f"call-{number}")])
            with sqlite3.connect(path) as reader:
                query = "select count(*) from calls where id = ?"
                assert reader.execute(query, (f"call-{number}",)).fetchone() == (1,)

        await asyncio.gather(*(durable(number) for number in range(200)))
        assert log.in_flight == 0

    batches = run(path, work)
    assert (sum(batches), max(batches)) == (200, 128)
    assert len(batches) <= 4
    with Store.open(path) as store:
        found = store.episode("e")
    assert len(found.calls) == len(found.spans) == 200


def test_a_call_that_cannot_be_written_fails_alone(path: Path) -> None:
    async def work(recorder: Recorder, log: EpisodeLog) -> None:
        log.reserve(10)
        bad = {3: call(3, logprobs=[]), 5: call(5, episode_id="nobody"), 7: call(7, response={"not": object()})}
        made = [bad.get(number, call(number)) for number in range(10)]
        ended = await asyncio.gather(*(recorder.record(log, each, []) for each in made), return_exceptions=True)
        failed = {number for number, error in enumerate(ended) if error is not None}
        assert failed == set(bad)
        assert all(isinstance(ended[number], StoreError) for number in bad)
        assert log.in_flight == 0
        await recorder.record(log, call(10), [])

    run(path, work)
    with Store.open(path) as store:
        assert {made.index for made in store.episode("e").calls} == {*range(11)} - {3, 5, 7}


def test_a_store_that_is_gone_fails_everybody_and_nobody_waits(path: Path) -> None:
    class Broken(Counting):
        def add_calls(self, calls: Sequence[Call], spans: Sequence[Span] = ()) -> None:
            raise StoreError("the disk is full")

    recorder = Recorder(Broken.open(path), NOTHING)

    async def main() -> None:
        log = await recorder.episode("e")
        ended = await asyncio.gather(*(recorder.record(log, call(n), []) for n in range(5)), return_exceptions=True)
        assert [str(error) for error in ended] == ["the disk is full"] * 5

    asyncio.run(main())
    recorder.close()


def asking(number: int, *asked: tuple[str, str], **fields: Any) -> Call:
    """A call whose reply asks for tools: (tool call id, argument)."""
    tool_calls = [{"id": id, "function": {"name": "look_up", "arguments": f'{{"q": "{q}"}}'}} for id, q in asked]
    return call(number, response={"content": None, "tool_calls": tool_calls}, ended_at=float(number), **fields)


def answering(of: Call, *results: str) -> list[dict[str, Any]]:
    """The history that ends with the results of a call's tools."""
    tool_calls = of.response["tool_calls"]
    told = [
        {"role": "tool", "tool_call_id": made["id"], "content": result}
        for made, result in zip(tool_calls, results, strict=True)
    ]
    return [{"role": "assistant", "content": "", "tool_calls": tool_calls}, *told]


def told_tools(path: Path, rounds: list[tuple[Call, list[dict[str, Any]]]], order: list[int]) -> list[tuple[Any, Any]]:
    """Which call's arguments met which result, when all calls are made and then answered in this order, the spans once stored."""

    async def work(recorder: Recorder, log: EpisodeLog) -> None:
        log.reserve(len(rounds) + 1)
        for made, _ in rounds:
            await recorder.record(log, made, [])
        spans = [one for at in order for one in log.answered_tools(rounds[at][1], 9.0, f"agent-{at}")]
        await recorder.record(log, call(len(rounds), started_at=9.0), spans)
        assert log.open_tools == {}

    run(path, work)
    with Store.open(path) as store:
        uses = tool_uses(store.episode("e"))
    assert all(use.ran for use in uses)
    return [(use.arguments["q"], use.result) for use in uses]


def test_tools_of_a_provider_that_counts_from_zero_in_each_reply_are_all_told_apart(path: Path) -> None:
    """Three agents of one episode at once, each with a `call_0`; the last two ask the same."""
    made = [asking(at, ("call_0", q), span_id=f"agent-{at}") for at, q in enumerate(("a", "b", "b"))]
    rounds = [(one, answering(one, f"result {at}")) for at, one in enumerate(made)]
    assert told_tools(path, rounds, [2, 0, 1]) == [("a", "result 0"), ("b", "result 1"), ("b", "result 2")]


def test_parallel_tool_calls_without_ids_are_told_apart_by_their_place(path: Path) -> None:
    made = asking(0, ("", "a"), ("", "b"), ("", "a"))
    told = told_tools(path, [(made, answering(made, "first", "second", "third"))], [0])
    assert told == [("a", "first"), ("b", "second"), ("a", "third")]


def test_a_history_that_repeats_a_result_takes_nobody_elses_tool(path: Path) -> None:
    async def work(recorder: Recorder, log: EpisodeLog) -> None:
        log.reserve(2)
        one, other = asking(0, ("call_0", "a")), asking(1, ("call_0", "b"))
        await recorder.record(log, one, [])
        await recorder.record(log, other, [])
        assert len(log.answered_tools(answering(one, "1"), 9.0)) == 1
        assert log.answered_tools(answering(one, "1"), 9.0) == []
        assert len(log.answered_tools(answering(other, "2"), 9.0)) == 1

    run(path, work)
