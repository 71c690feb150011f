"""What a chat template does to a conversation that goes on, found out on a handful of small ones when it is loaded.

Two things are asked. Does the template append only, or does it show otherwise what was said, once something follows it?
And which stand-ins can be trusted for a reply that calls tools: does the same text follow them as follows the reply?
What cannot be rendered at all is no finding: the server refuses it in the template's own words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rollout_server.api.rendering.stand_ins import StandIns, said
from rollout_server.api.rendering.tool_prompt import Message

Render = Callable[[list[Message], list[dict[str, Any]]], str | None]
"""A conversation with the opening of the next reply; None if the template refuses it."""

_SHOWN = 24
"""Characters of a difference that are quoted."""

_TOOL = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}
_CALL = {"id": "probe1234", "type": "function", "function": {"name": "probe", "arguments": '{"a": 1}'}}
_HI: Message = {"role": "user", "content": "Hi"}
_NEXT: Message = {"role": "user", "content": "And then"}
_CALLING: Message = {**said(""), "tool_calls": [_CALL]}
_RESULT: Message = {"role": "tool", "tool_call_id": "probe1234", "name": "probe", "content": "Result 7"}

_CONVERSATIONS: list[tuple[str, list[Message], list[dict[str, Any]], int]] = [
    ("a next question", [_HI, said("Hello"), _NEXT], [], 1),
    ("a next question when there are tools", [_HI, said("Hello"), _NEXT], [_TOOL], 1),
    ("a tool's result", [_HI, _CALLING, _RESULT], [_TOOL], 1),
    ("a question after a tool's result", [_HI, _CALLING, _RESULT, said("Hello"), _NEXT], [_TOOL], 3),
    ("white space around a reply", [_HI, said(" Hello \n"), _NEXT], [], 1),
    ("reasoning in a reply", [_HI, said("<think>\nWell\n</think>\n\nHello"), _NEXT], [], 1),
]
"""What is tried: a name, the conversation, its tools, and the reply that must stay as it was."""


@dataclass(frozen=True)
class Findings:
    rewrites: dict[str, str]
    """What was tried and did not stay as it was, with what changed; empty if the template appends only."""
    for_calls: tuple[bool, ...]
    """Stand-ins for calls of tools that can be trusted, in the order to try them: True with calls, False without."""
    whole: tuple[str, ...]
    """After what follow-up prompts have to be rendered whole."""

    @property
    def append_only(self) -> bool:
        return not self.rewrites and not self.whole

    def in_words(self) -> str:
        handled = "follow-up prompts keep what was sampled and append what the template puts after it"
        if self.whole:
            handled += f"; not with {', '.join(self.whole)}: they are rendered whole then, and labelled as edits"
        first, *others = self.rewrites or [""]
        reasons = f" ({first}: {self.rewrites[first]}{''.join(f'; {name}' for name in others)})" if first else ""
        return f"the chat template rewrites earlier turns{reasons}: {handled}"


def probe(render: Render, stand_ins: StandIns) -> Findings:
    rewrites: dict[str, str] = {}
    whole = []
    for_calls = tuple(kind for kind in (True, False) if _stands_in_for_calls(render, stand_ins, kind))
    for what, messages, tools, at in _CONVERSATIONS:
        before, after = render(messages[:at], tools), render(messages, tools)
        if before is None or after is None:
            continue
        before += messages[at]["content"]
        if not after.startswith(before):
            rewrites[what] = _difference(before, after)
        calls = "tool_calls" in messages[at]
        if not (for_calls if calls else _tail(render, stand_ins, messages, tools, at, with_calls=False)):
            whole.append(what)
    return Findings(rewrites, for_calls, tuple(whole))


def _stands_in_for_calls(render: Render, stand_ins: StandIns, with_calls: bool) -> bool:
    """Whether the same text follows the stand-in as follows the call itself."""
    longer = [_HI, _CALLING, _RESULT, said("Hello"), _NEXT]
    for messages in (longer[:3], longer):
        whole, tail = render(messages, [_TOOL]), _tail(render, stand_ins, messages, [_TOOL], 1, with_calls)
        if whole is not None and (tail is None or not whole.endswith(tail) or _RESULT["content"] not in tail):
            return False
    return True


def _tail(
    render: Render,
    stand_ins: StandIns,
    messages: list[Message],
    tools: list[dict[str, Any]],
    at: int,
    with_calls: bool,
) -> str | None:
    text = render(stand_ins.place(messages, [at], with_calls=with_calls, head=False), tools)
    pieces = None if text is None else stand_ins.cut(text, [with_calls], head=False)
    return None if pieces is None else pieces[1]


def _difference(before: str, after: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    return f"{before[at : at + _SHOWN]!r} became {after[at : at + _SHOWN]!r}"
