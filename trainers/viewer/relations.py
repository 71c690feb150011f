"""Which earlier call of its episode a call goes on with, and which of its prompt's tokens were sampled by which. By ids alone."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from lightning_rl.episode import Call
from lightning_rl.store.deltas import ID_BYTES, shared_start
from lightning_rl.store.outlines import Outline


class Part(Struct, frozen=True):
    """Prompt tokens [start, end), sampled by an earlier call; None: they came from outside."""

    start: int
    end: int
    call: Call | None


def earlier_call(outline: Outline, call: Call) -> str | None:
    """The call that it extends, branches from or edits; None if it does none of these, or that call is not known.

    A server names the call that is extended token for token. The prompt of a fork may have been asked before, and an edit
    parts inside of a call: these are found by their tokens.
    """
    known = outline.tokens
    named = call.parent_id if call.parent_id in known else None
    asked_again = call.relation == "fork" and call.parted_at == known[call.id].prompt
    if call.relation != "edit" and not asked_again:
        return named
    prompt = known[call.id].sequence[: ID_BYTES * (call.parted_at or 0)]
    alike = [
        other.id
        for other in _before(outline, call)
        if known[other.id].total >= (call.parted_at or 0) and known[other.id].sequence.startswith(prompt)
    ]
    if asked_again:
        return next((id for id in alike if known[id].prompt == call.parted_at), named)
    inside = (id for id in alike if known[id].prompt <= (call.parted_at or 0) < known[id].total)
    return next(inside, next(iter(alike), named))


def prompt_parts(outline: Outline, call: Call) -> list[Part]:
    """All of the prompt, in order."""
    parts: list[Part] = []
    at = 0
    for part in reversed(list(_sampled_before(outline, call))):
        if part.start > at:
            parts.append(Part(at, part.start, None))
        parts.append(part)
        at = part.end
    end = outline.tokens[call.id].prompt
    return [*parts, Part(at, end, None)] if at < end else parts


def _sampled_before(outline: Outline, call: Call) -> Iterator[Part]:
    """From the end of the prompt to its beginning: each call's share ends where that of the one before begins."""
    calls = {one.id: one for one in outline.episode.calls}
    tokens = outline.tokens[call.id]
    prompt, limit = tokens.sequence[: tokens.prompt * ID_BYTES], tokens.prompt
    seen = {call.id}
    at = call
    while (id := earlier_call(outline, at)) is not None and id not in seen:
        seen.add(id)
        at, before = calls[id], outline.tokens[id]
        end = min(limit, shared_start(prompt, before.sequence) // ID_BYTES)
        if before.prompt < end:
            yield Part(before.prompt, end, at)
        limit = min(limit, before.prompt)


def _before(outline: Outline, call: Call) -> list[Call]:
    return [other for other in outline.episode.calls if (other.index, other.id) < (call.index, call.id)]
