"""What a call repeats of an earlier one of its episode, left out when it is stored and put back when it is read.

An agent sends its whole history with every request. Stored as it comes, an episode would grow with the square of its turns;
stored as what differs from an earlier call (its base), it grows with what is new. Prompt ids: how many of the base's prompt +
sampled ids they begin with, and the rest. The request: of the JSON text of each of its keys, how much of the beginning and of
the end the base's text has, and what stands between. Texts are compared, not values, so what is put back is what was taken
out, to the character. Which base is a good one, and where it is kept, is left to others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, AnyStr

from msgspec import Struct

from lightning_rl.token_tree import common_prefix

ID_BYTES = 4
Texts = dict[str, str]
"""The keys of a request, each with its value as JSON."""


class Base(Struct, frozen=True):
    """What a later call may repeat of this one."""

    id: str
    sequence: bytes
    """Prompt + sampled ids, packed."""
    request: Texts

    @property
    def size(self) -> int:
        return len(self.sequence) + sum(map(len, self.request.values()))


class Delta(Struct, frozen=True):
    """A call's prompt and request as they are stored."""

    base_id: str | None
    base_tokens: int
    """How many of the base's prompt + sampled ids the prompt begins with."""
    prompt_rest: bytes
    request: str
    """A line of JSON, [key, characters of the base's beginning, of its end, of its own], and behind it all own characters."""


def request_texts(request: Mapping[str, Any]) -> Texts:
    """Raises TypeError, ValueError or RecursionError for what is not JSON."""
    return {key: json.dumps(value, separators=(",", ":")) for key, value in request.items()}


def request_of(texts: Texts) -> dict[str, Any]:
    return {key: json.loads(text) for key, text in texts.items()}


def delta(prompt: bytes, request: Texts, base: Base | None) -> Delta:
    if base is None:
        return Delta(None, 0, prompt, write_request(request, {}))
    tokens = shared_start(prompt, base.sequence) // ID_BYTES
    return Delta(base.id, tokens, prompt[tokens * ID_BYTES :], write_request(request, base.request))


def overlap(prompt: bytes, request: Texts, base: Base) -> int:
    """How many bytes the base saves, about."""
    texts = (shared_start(text, base.request.get(key, "")) for key, text in request.items())
    return shared_start(prompt, base.sequence) + sum(texts)


def write_request(request: Texts, base: Texts) -> str:
    places = []
    own = []
    for key, text in request.items():
        known = base.get(key, "")
        start = shared_start(text, known)
        end = shared_end(text[start:], known[start:])
        own.append(text[start : len(text) - end])
        places.append((key, start, end, len(own[-1])))
    return json.dumps(places, separators=(",", ":")) + "\n" + "".join(own)


def read_request(written: str, base: Texts) -> Texts:
    """Raises ValueError if this cannot have been written against that base."""
    if written.startswith("{"):  # whole, as stores of version 2 and before have it
        return request_texts(json.loads(written))
    header, _, own = written.partition("\n")
    texts = {}
    at = 0
    for key, start, end, length in json.loads(header):
        known = base.get(key, "")
        if start + end > len(known):
            raise ValueError(f"{key!r} needs {start + end} characters of the base's {len(known)}")
        texts[key] = known[:start] + own[at : at + length] + known[len(known) - end :]
        at += length
    if at != len(own):
        raise ValueError(f"{len(own)} characters of its own are there, {at} are spoken of")
    return texts


def shared_start(one: AnyStr, other: AnyStr) -> int:
    """Length of the longest common prefix."""
    return len(other) if one.startswith(other) else common_prefix(one, other)


def shared_end(one: AnyStr, other: AnyStr) -> int:
    """Length of the longest common suffix, by bisection like `common_prefix`."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[len(one) - middle : len(one) - low] == other[len(other) - middle : len(other) - low]:
            low = middle
        else:
            high = middle - 1
    return low
