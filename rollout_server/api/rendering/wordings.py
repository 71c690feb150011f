"""How a reply was worded: what fingerprints look through, kept so that replies of one fingerprint can be told apart.

Several replies of one conversation may say the same and have other ids: other reasoning, other ids of tool calls, white
space at the end, an earlier turn that was another choice. What a client sends back is compared with what it got, from
what is never the same by accident to what frameworks like to change. Pure; 16 bytes for each thing compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from rollout_server.api.rendering.tool_prompt import Message


@dataclass(frozen=True)
class Wording:
    """Digests of one message of the assistant, and of what it said before."""

    call_ids: bytes
    thought: bytes | None
    """Its reasoning without white space around it; None where it is not known."""
    raw_thought: bytes
    before: bytes
    """All this of the assistant's messages before it."""
    text: bytes
    """With white space around it."""


def wording(before: Sequence[Message], message: Message, *, thought_known: bool = True) -> Wording:
    call_ids, thought, text = _parts(message)
    return Wording(
        _digest(call_ids),
        _digest(thought.strip()) if thought_known else None,
        _digest(thought),
        _digest([_parts(earlier) for earlier in before if earlier["role"] == "assistant"]),
        _digest(text),
    )


def fitting(known: Sequence[Wording], asked: Wording) -> list[int]:
    """Which of the known wordings may be meant: those that fit best, in their order; none whose reasoning is another."""
    found = [at for at, one in enumerate(known) if not _contradicts(one, asked)]
    for part in _BY_WEIGHT:
        found = [at for at in found if part(known[at]) == part(asked)] or found
    return found


def _contradicts(known: Wording, asked: Wording) -> bool:
    """Reasoning that is left out contradicts nothing."""
    return asked.thought != _NO_THOUGHT and known.thought is not None and asked.thought != known.thought


def _parts(message: Message) -> tuple[list[str], str, str]:
    calls = message.get("tool_calls") or []
    return [call.get("id", "") for call in calls], message.get("reasoning_content") or "", message.get("content") or ""


def _digest(value: Any) -> bytes:
    return blake2b(json.dumps(value).encode(), digest_size=16).digest()


_NO_THOUGHT = _digest("")
_BY_WEIGHT: tuple[Callable[[Wording], bytes | None], ...] = (
    lambda worded: worded.call_ids,
    lambda worded: worded.thought,
    lambda worded: worded.raw_thought,
    lambda worded: worded.before,
    lambda worded: worded.text,
)
