"""What this server said, so that the next prompt of the same conversation extends it token for token.

After each call `remember` keeps the ids so far under a fingerprint of the conversation including the reply. For a new
request `prompt` looks for the longest run of its messages that ends in a remembered reply, and appends to those ids
only what the template puts after it. An agent that rewrote history finds nothing and gets a fresh rendering (a fork).
Fingerprints look through what frameworks change on the way back: content as parts or None, key order in arguments, ids
of tool calls.
"""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from rollout_server.api.render import Renderer
from rollout_server.api.tool_prompt import Message, parsed_arguments


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    parent_id: str | None = None
    """The call whose prompt and sampled ids `ids` begins with; None for a conversation rendered whole."""


@dataclass(frozen=True)
class _Remembered:
    ids: array[int]
    call_id: str


class ConversationIndex:
    """Least recently used conversations are forgotten beyond `max_tokens` remembered ids (4 bytes each)."""

    def __init__(self, renderer: Renderer, max_tokens: int = 16_000_000) -> None:
        self._renderer = renderer
        self._max_tokens = max_tokens
        self._tokens = 0
        self._known: OrderedDict[bytes, _Remembered] = OrderedDict()

    def prompt(self, scope: str, messages: list[Message], tools: list[dict[str, Any]]) -> Prompt:
        """`scope` is the episode, or empty without one; only conversations of the same scope are extended."""
        prints = fingerprints(scope, messages, tools)
        for at in reversed(range(len(messages))):
            known = self._known.get(prints[at]) if messages[at]["role"] == "assistant" else None
            if known is None:
                continue
            self._known.move_to_end(prints[at])
            delta = self._renderer.continuation(messages, tools, at, known.ids[-1])
            if delta is None:
                break
            return Prompt([*known.ids, *delta], known.call_id)
        return Prompt(self._renderer.prompt(messages, tools))

    def remember(
        self,
        scope: str,
        messages: list[Message],
        reply: Message,
        tools: list[dict[str, Any]],
        ids: list[int],
        call_id: str,
    ) -> None:
        """`ids` are the prompt's and the sampled ones; `reply` is the message as the client gets it."""
        key = fingerprints(scope, [*messages, reply], tools)[-1]
        replaced = self._known.pop(key, None)
        self._tokens += len(ids) - (len(replaced.ids) if replaced else 0)
        self._known[key] = _Remembered(array("i", ids), call_id)
        while self._tokens > self._max_tokens:
            _, oldest = self._known.popitem(last=False)
            self._tokens -= len(oldest.ids)


def fingerprints(scope: str, messages: list[Message], tools: list[dict[str, Any]]) -> list[bytes]:
    """Entry i identifies messages 0 … i under this scope and these tools."""
    state = blake2b(_dump([scope, tools]), digest_size=16)
    prints = []
    for message in messages:
        state.update(_dump(_essence(message)))
        prints.append(state.copy().digest())
    return prints


def _essence(message: Message) -> list[Any]:
    calls = [[c["function"]["name"], parsed_arguments(c)] for c in message.get("tool_calls") or []]
    return [message["role"], message.get("content") or "", calls]


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"
