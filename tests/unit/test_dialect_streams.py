"""A stream that is closed half-way closes what it reads from at once, not when somebody collects the garbage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from rollout_server.api.choice import Choice, Piece
from rollout_server.api.dialects import chat, completions, generate, messages, responses
from rollout_server.api.dialects.chat_request import parse_chat
from rollout_server.api.dialects.completions import parse_completion
from rollout_server.api.dialects.fields import parse
from rollout_server.api.dialects.generate import GenerateRequest
from rollout_server.api.dialects.messages_request import parse_messages
from rollout_server.api.dialects.responses_request import parse_responses
from rollout_server.api.front.wire import event_stream
from rollout_server.api.turn_run import Step, TurnRun, Usage
from rollout_server.messages import SamplingParams

HELLO = [{"role": "user", "content": "hi"}]
PIECE = Piece("a", [7], [-0.5], [], [1])
STEP = Step(0, ["a"], PIECE, None)
PLAN: Any = SimpleNamespace(index=0, call_id="c", choice=Choice([1], SamplingParams()))
SERVICES: Any = SimpleNamespace(renderer=SimpleNamespace(tokenizer=None))
RUN: Any = SimpleNamespace(
    id="r", response_id="r", created=0, model="m", prompt_ids=[1], usage=lambda: Usage(1, 1, 0, 0)
)
Chunks = AsyncGenerator[Any, None]


def chat_chunks(rest: Chunks) -> Chunks:
    return chat._Writer(SERVICES, parse_chat({"model": "m", "messages": HELLO}), RUN).chunks(STEP, rest)


def completion_chunks(rest: Chunks) -> Chunks:
    exchange: Any = SimpleNamespace(response_id="r", created=0, model="m", plans=[PLAN], services=SERVICES)
    writer = completions._Writer(exchange, parse_completion({"model": "m", "prompt": "hi"}), [[1]], [])
    return writer.chunks((PLAN, PIECE), rest)


def generate_chunks(rest: Chunks) -> Chunks:
    exchange: Any = SimpleNamespace(id="r")
    return generate._chunks(parse(GenerateRequest, {"input_ids": [1]}), exchange, (PLAN, PIECE), rest)


def response_events(rest: Chunks) -> Chunks:
    request = parse_responses({"model": "m", "input": "hi"})
    return responses._Reply(SERVICES, request, RUN, "", []).events(STEP, rest)


def message_events(rest: Chunks) -> Chunks:
    return messages._events(parse_messages({"model": "m", "max_tokens": 9, "messages": HELLO}), RUN, STEP, rest)


def turn_steps(rest: Chunks) -> Chunks:
    reader: Any = SimpleNamespace(feed=lambda text: [text])
    exchange = SimpleNamespace(plans=[PLAN], events=lambda reads_along: rest)
    run: Any = SimpleNamespace(_exchange=exchange, _reader=lambda call_id: reader, _told={})
    return TurnRun.steps(run)


@pytest.mark.parametrize(
    ("made", "read"),
    [
        (chat_chunks, STEP),
        (completion_chunks, (PLAN, PIECE)),
        (generate_chunks, (PLAN, PIECE)),
        (response_events, STEP),
        (message_events, STEP),
        (turn_steps, (PLAN, PIECE)),
    ],
)
@pytest.mark.parametrize("after", [1, 12])
def test_a_stream_closes_what_it_reads(made: Callable[[Chunks], Chunks], read: Any, after: int) -> None:
    closed: list[bool] = []

    async def endless() -> Chunks:
        try:
            while True:
                yield read
        finally:
            closed.append(True)

    async def talk() -> None:
        rest = endless()
        await anext(rest)  # as the first step is awaited before a status is sent
        chunks = made(rest)
        for _ in range(after):
            await anext(chunks)
        await chunks.aclose()
        assert closed == [True]
        await rest.aclose()

    asyncio.run(talk())


def test_a_client_that_leaves_while_it_is_written_to_ends_the_whole_chain() -> None:
    closed: list[bool] = []
    kept: list[Any] = []
    """Alive, as in a traceback: nothing here is closed for being garbage."""

    async def endless() -> Chunks:
        try:
            while True:
                yield STEP
        finally:
            closed.append(True)

    async def talk() -> None:
        writing = asyncio.Event()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                writing.set()
                await asyncio.Event().wait()

        async def receive() -> Any:
            await writing.wait()
            return {"type": "http.disconnect"}

        rest = endless()
        await anext(rest)
        chunks = chat_chunks(rest)
        kept.extend([rest, chunks])
        await event_stream(chunks)({"type": "http"}, receive, send)
        assert closed == [True]

    asyncio.run(talk())
