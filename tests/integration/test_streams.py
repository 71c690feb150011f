"""A streamed chat, concatenated, is the whole one: text, reasoning, calls, ids, log-probs, finish reason and usage.

For every tool parser, with reasoning and without, whatever was sampled and however its tokens arrive.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout_server import messages as m
from rollout_server.api.rendering.render import Renderer
from rollout_server.api.replies.tool_formats import FORMATS
from tests.integration.scripted_manager import tokens
from tests.integration.served_web import Served, served
from tests.unit.test_render import TOOL

FRAGMENTS = (
    '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>',
    '<tool_call>{"name": "calculator", "arguments": {}}',
    "<tool_call>\n<function=calculator>\n<parameter=expression>\n1+1\n</parameter>\n</function>\n</tool_call>",
    '{"name": "calculator", "parameters": {"expression": "2"}}',
    '[TOOL_CALLS][{"name": "calculator", "arguments": {"expression": "3"}}]',
    '[TOOL_CALLS]calculator[ARGS]{"expression": "4"}',
    '[calculator(expression="5"), calculator(expression="6")]',
    "<think>",
    "</think>",
    "Let me see. ",
    "Grüße 世界 🙂",
    "\n\n",
    " stop here ",
    "[",
    "{",
    "</tool_call>",
)
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=5).map("".join)
RAW = st.lists(st.integers(17, 49151), max_size=8)
Pieces = list[list[int]]


@st.composite
def cut(draw: st.DrawFn, ids: list[int]) -> Pieces:
    """The ids as messages of one token or more."""
    pieces, at = [], 0
    while at < len(ids):
        size = draw(st.integers(1, 4))
        pieces.append(ids[at : at + size])
        at += size
    return pieces


@pytest.fixture(scope="module", params=[(form, think) for form in FORMATS for think in (None, "think")], ids=str)
def web(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[Served]:
    form, think = request.param
    with served(tiny_llama, tool_parser=form, reasoning_parser=think) as running:
        yield running


@pytest.fixture(scope="module")
def renderer(tiny_llama: Path) -> Renderer:
    return Renderer(tiny_llama)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_streamed_chat_equals_the_whole_one(web: Served, renderer: Renderer, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 2))
    said = [renderer.encode(data.draw(TEXTS)) + data.draw(RAW) + [100] for _ in range(n)]
    pieces = [data.draw(cut(ids)) for ids in said]
    reason = data.draw(st.sampled_from(["stop", "length"]))

    def script(submit: m.Submit) -> list[m.FromManager]:
        return [
            tokens(submit, ids, reason if at == len(pieces[index]) - 1 else None, index=index)
            for at in range(max(map(len, pieces)))
            for index in range(n)
            if at < len(pieces[index])
            for ids in [pieces[index][at]]
        ]

    web.manager.script = script
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello"}],
        "tools": [TOOL] if data.draw(st.booleans()) else [],
        "n": n,
        "logprobs": True,
        "return_token_ids": True,
        "stop": data.draw(st.sampled_from([[], ["stop"], ["here", "6*7"]])),
        "stream_options": {"include_usage": True},
    }
    whole = httpx.post(f"{web.url}/v1/chat/completions", json=body, timeout=30).json()
    with httpx.stream("POST", f"{web.url}/v1/chat/completions", json={**body, "stream": True}, timeout=30) as reply:
        events = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    for choice in whole["choices"]:
        assert joined(chunks, choice["index"]) == choice | {"message": without_ids(choice["message"])}


def joined(chunks: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """A choice of the whole reply, from its chunks."""
    text, reasoning, calls, ids, logprobs = "", "", [], [], []
    last: dict[str, Any] = {}
    for entry in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        delta = entry["delta"]
        text += delta.get("content") or ""
        reasoning += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls") or []:
            assert call["index"] == len(calls)
            calls.append({"type": call["type"], "function": call["function"]})
        ids += entry.get("token_ids", [])
        logprobs += (entry.get("logprobs") or {"content": []})["content"]
        assert entry["finish_reason"] is None or entry["delta"] == {}
        last = entry
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "finish_reason": last["finish_reason"],
        "stop_reason": last["stop_reason"],
        "logprobs": {"content": logprobs, "refusal": None},
        "token_ids": ids,
        "weight_versions": last["weight_versions"],
    }


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Ids of calls differ from request to request."""
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [{"type": c["type"], "function": c["function"]} for c in message["tool_calls"]]}
