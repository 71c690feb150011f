"""Follow-up prompts extend what was sampled, token for token, whatever was sampled; and nothing else is extended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout_server.api.rendering.conversation import ConversationIndex, fingerprints
from rollout_server.api.rendering.render import Renderer
from rollout_server.api.rendering.tool_prompt import Message, call_text
from rollout_server.api.replies.reply import gather
from rollout_server.api.replies.tool_formats import FORMATS
from tests.unit.test_render import TOOL

END = 2
QUESTION: Message = {"role": "user", "content": "How much?"}

CALL = st.builds(lambda e: call_text("calculator", {"expression": e}), st.text(max_size=10))
BROKEN_CALL = st.sampled_from(
    [
        "<tool_call>",
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": "calculator"',
        "</tool_call><tool_call>\n</tool_call>",
    ]
)
SAID = st.one_of(st.text(max_size=20), CALL, BROKEN_CALL, st.tuples(st.text(max_size=9), CALL).map("".join))
RAW_IDS = st.lists(st.integers(17, 49151), min_size=1, max_size=12)
TURN = st.tuples(st.one_of(SAID, RAW_IDS), st.booleans(), st.text(max_size=20))
CALM = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def renderer(tiny_llama: Path) -> Renderer:
    return Renderer(tiny_llama)


def reply_message(text: str, call_id: str) -> Message:
    reader = FORMATS["hermes"].parser(call_id, [TOOL])
    return gather([*reader.feed(text), *reader.finish()]).as_message()


def answers(reply: Message, text: str) -> list[Message]:
    calls = reply.get("tool_calls") or []
    if not calls:
        return [{"role": "user", "content": text}]
    return [{"role": "tool", "tool_call_id": c["id"], "content": text} for c in calls]


def as_a_framework_returns_it(reply: Message) -> Message:
    """Key order, white space and ids of tool calls change on the way; None becomes empty."""
    returned: Message = {"content": reply["content"] or "", "role": "assistant"}
    if reply.get("tool_calls"):
        returned["tool_calls"] = [
            {
                "id": "other",
                "type": "function",
                "function": {
                    "name": c["function"]["name"],
                    "arguments": json.dumps(json.loads(c["function"]["arguments"]), indent=1),
                },
            }
            for c in reply["tool_calls"]
        ]
    return returned


@CALM
@given(turns=st.lists(TURN, min_size=1, max_size=4), with_tools=st.booleans(), system=st.booleans())
def test_follow_ups_extend(renderer: Renderer, turns: list[Any], with_tools: bool, system: bool) -> None:
    index = ConversationIndex(renderer)
    tools = [TOOL] if with_tools else []
    messages: list[Message] = [{"role": "system", "content": "S"}] if system else []
    messages.append(QUESTION)
    so_far: list[int] = []
    parent: str | None = None
    same_text = True
    for n, (said, ends, answer) in enumerate(turns):
        prompt = index.prompt("e", messages, tools)
        assert prompt.ids[: len(so_far)] == so_far
        assert prompt.parent_id == parent
        if same_text:
            assert renderer.decode(prompt.ids, special=True) == renderer.text(messages, tools)
        sampled = renderer.encode(said) if isinstance(said, str) else said
        sampled = [i for i in sampled if i > 16] + ([END] if ends else [])
        if not sampled:
            return
        parent = f"call-{n}"
        text = renderer.decode(sampled)
        reply = reply_message(text, parent)
        said_as_rendered = renderer.text([QUESTION, reply], []).removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        same_text = (
            same_text
            and said_as_rendered.endswith(f"<|im_start|>assistant\n{text}")
            and renderer.decode(renderer.encode(answer)) == answer
        )
        so_far = prompt.ids + sampled
        index.remember("e", messages, reply, tools, so_far, parent)
        messages = [*messages, as_a_framework_returns_it(reply), *answers(reply, answer)]
    assert index.prompt("e", messages, tools).ids[: len(so_far)] == so_far


def test_what_was_not_sampled_of_the_turn_is_added_once(renderer: Renderer) -> None:
    for sampled in ([100, END], [100]):
        index = ConversationIndex(renderer)
        prompt = index.prompt("", [QUESTION], [])
        reply = reply_message(renderer.decode(sampled), "c")
        index.remember("", [QUESTION], reply, [], prompt.ids + sampled, "c")
        follow_up = index.prompt("", [QUESTION, reply, QUESTION], [])
        assert follow_up.ids == renderer.prompt([QUESTION, reply, QUESTION], [])
        assert follow_up.parent_id == "c"


@pytest.mark.parametrize("change", ["scope", "tools", "question", "reply"])
def test_what_differs_is_a_fork(renderer: Renderer, change: str) -> None:
    index = ConversationIndex(renderer)
    reply = {"role": "assistant", "content": "Two."}
    index.remember("e", [QUESTION], reply, [], [7, 8, END], "c")
    question = {"role": "user", "content": "How many?"} if change == "question" else QUESTION
    said = {"role": "assistant", "content": "Three."} if change == "reply" else reply
    scope, tools = "f" if change == "scope" else "e", [TOOL] if change == "tools" else []
    prompt = index.prompt(scope, [question, said, QUESTION], tools)
    assert prompt.parent_id is None
    assert prompt.ids == renderer.prompt([question, said, QUESTION], tools)


def test_the_longest_known_reply_is_extended(renderer: Renderer) -> None:
    index = ConversationIndex(renderer)
    said = {"role": "assistant", "content": "A"}
    index.remember("", [QUESTION], said, [], [7, END], "first")
    index.remember("", [QUESTION, said, QUESTION], said, [], [7, END, 8, END], "second")
    assert index.prompt("", [QUESTION, said, QUESTION, said, QUESTION], []).ids[:4] == [7, END, 8, END]
    other = {"role": "assistant", "content": "B"}
    forked = index.prompt("", [QUESTION, said, QUESTION, other, QUESTION], [])
    assert forked.parent_id == "first"  # the part that we said is extended, what the agent put in is rendered
    assert forked.ids[:2] == [7, END]


def test_the_oldest_is_forgotten_first(renderer: Renderer) -> None:
    index = ConversationIndex(renderer, max_tokens=10)
    said = {"role": "assistant", "content": "A"}
    for scope in ("a", "b", "c"):
        index.remember(scope, [QUESTION], said, [], [7, 8, 9, END], scope)
    parents = [index.prompt(scope, [QUESTION, said, QUESTION], []).parent_id for scope in ("a", "b", "c")]
    assert parents == [None, "b", "c"]


def test_fingerprints_do_not_confuse_borders() -> None:
    one = fingerprints("", [{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}], [])
    two = fingerprints("", [{"role": "user", "content": "a"}, {"role": "user", "content": "bc"}], [])
    assert one[1] != two[1]
