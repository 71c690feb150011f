"""What the text search finds an episode by: its words, folded, each once. Pure.

Queries and texts go through the same `words_of`, so that whatever is a word here is one there: runs of letters and digits, in
lower case, without accents; scripts that are written without spaces, character by character. Of JSON the frame that every message
has (keys, roles, ids) is left out, and escapes are undone, those in strings within strings too.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

from lightning_rl.agents import callers
from lightning_rl.episode import Call, Episode, EpisodeStart, Span, Task
from lightning_rl.store.browsing import Said, SaidCall, SaidSpan
from lightning_rl.store.deltas import Texts
from lightning_rl.store.rows import unpack_ids

LONGEST_TEXT = 20_000
"""So many characters of a text are read; of an episode `LONGEST_EPISODE`."""
LONGEST_EPISODE = 500_000
_LONGEST_WORD = 40
_SPOKEN = ("messages", "input", "system", "instructions", "prompt")
"""Keys of requests, in all dialects, that say something; the others say how to answer."""
_FRAME = re.compile(r'"(?:role|type|id|tool_call_id|call_id)": ?"[\w-]*"|"[a-z_]{1,24}":')
_ESCAPE = re.compile(r"(\\+)(?:u([0-9a-fA-F]{4})|([a-zA-Z])(\w*))?")
_ALONE = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff])")
_PLAIN, _ANY = re.compile("[a-z0-9]+"), re.compile(r"[^\W_]+")
_END, _START = re.compile(r"[\w\\]*\Z"), re.compile(r"\w*")


def words_of(text: str) -> set[str]:
    if text.isascii():
        found = set(_PLAIN.findall(text.lower()))
    else:
        folded = unicodedata.normalize("NFKD", text.casefold())
        folded = "".join(letter for letter in folded if not unicodedata.combining(letter))
        found = set(_ANY.findall(_ALONE.sub(r" \1 ", unicodedata.normalize("NFC", folded))))
    longest = max(map(len, found), default=0)
    return found if longest <= _LONGEST_WORD else {word[:_LONGEST_WORD] for word in found}


def words_in_json(text: str) -> set[str]:
    """Of JSON, or a piece of it."""
    text = _FRAME.sub(" ", text)
    return words_of(_ESCAPE.sub(_unescaped, text) if "\\" in text else text)


def _unescaped(found: re.Match[str]) -> str:
    slashes, code, letter, rest = found.groups()
    if code is not None:
        return chr(int(code, 16))
    if letter is None:
        return " "
    if len(slashes) == 1:  # \n and its like
        return f" {rest}"
    return f" {letter}{rest} {rest}"  # a backslash, or an escape within a string within a string


class Requests:
    """What each request of an episode says that the ones before it did not. `add` takes the calls in order."""

    def __init__(self) -> None:
        self._whole: dict[str, Texts] = {}

    def add(self, call: SaidCall) -> str:
        if call.request.startswith("{"):  # as stores of version 2 and before have it
            return call.request
        base = self._whole.get(call.base_id or "", {})
        header, _, own = call.request.partition("\n")
        pieces, texts, at = [], {}, 0
        for key, start, end, length in _places(header):
            if key in _SPOKEN:
                known, new = base.get(key, ""), own[at : at + length]
                if len(known) >= start + end and len(new) == length:
                    before, behind = known[:start], known[len(known) - end :]
                    texts[key] = before + new + behind
                    new = _whole_words(before, new, behind)
                pieces.append(new)
            at += length
        if sum(map(len, texts.values())) <= 50 * LONGEST_TEXT:
            self._whole[call.id] = texts
        return " ".join(pieces)


def _places(header: str) -> list[tuple[str, int, int, int]]:
    try:
        return [(str(key), int(start), int(end), int(length)) for key, start, end, length in json.loads(header)]
    except (ValueError, TypeError):  # damaged: whoever opens the episode is told
        return []


def _whole_words(before: str, new: str, behind: str) -> str:
    """What is new may begin and end within a word."""
    if not new:
        return ""
    head, tail = _END.search(before[-_LONGEST_WORD:]), _START.match(behind[:_LONGEST_WORD])
    assert head is not None
    assert tail is not None
    return head[0] + new + tail[0]


class Read(NamedTuple):
    """What is known of an episode only after all of it was read."""

    agents: list[str]
    """By name, in the order of their first calls."""
    low: int
    """Lowest and highest policy version; 1 and 0 if there is none."""
    high: int
    words: set[str]


def read(said: Said) -> Read:
    texts = [said.task_input, said.answer or "", *(span.attributes for span in said.spans)]
    plain = [
        said.task,
        said.error or "",
        *(span.name for span in said.spans),
        *(span.error or "" for span in said.spans),
    ]
    left = LONGEST_EPISODE - sum(map(len, texts)) - sum(map(len, plain))
    makers: dict[tuple[str | None, str], None] = {}
    low, high = 1, 0
    requests = Requests()
    for call in said.calls:
        makers[call.span_id, call.agent] = None
        if versions := unpack_ids(call.versions):
            lowest, highest = min(versions), max(versions)
            low, high = (lowest, highest) if low > high else (min(low, lowest), max(high, highest))
        if left > 0:
            texts += (requests.add(call), call.response)
            left -= len(texts[-1]) + len(texts[-2])
    found = words_in_json("\n".join(texts)) | words_of("\n".join(plain))
    return Read(_agents(said.id, makers, said.spans), low, high, found)


def _agents(episode_id: str, makers: Iterable[tuple[str | None, str]], spans: Iterable[SaidSpan]) -> list[str]:
    """As `callers` has them."""
    calls = [
        Call(
            id=str(at),
            episode_id=episode_id,
            index=at,
            model="",
            prompt_ids=[],
            sampled_ids=[],
            logprobs=[],
            versions=[],
            temperature=0.0,
            finish_reason="",
            span_id=span_id,
            agent=agent,
        )
        for at, (span_id, agent) in enumerate(makers)
    ]
    around = [
        Span(
            id=span.id,
            episode_id=episode_id,
            name=span.name,
            kind=span.kind,
            parent_id=span.parent_id,
            started_at=span.started_at,
        )
        for span in spans
    ]
    start = EpisodeStart(id=episode_id, task=Task(id="", input={}), phase="")
    found = callers(Episode(start=start, calls=calls, spans=around))
    return list(dict.fromkeys(caller.agent for caller in found.values() if caller.agent is not None))
