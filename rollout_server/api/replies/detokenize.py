"""Text out of tokens as they come: never half a character, and cut at the first stop string.

`Detokenizer` turns ids into text piece by piece; the pieces together are the text of all ids. `StopFinder` passes text
on, holds back what may be the beginning of a stop string, and says when one is complete. `token_bytes` is for
log-probs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from functools import cache, lru_cache

from tokenizers import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_PATIENCE = 32
"""Tokens that may wait for the rest of a character: after so many it is none."""


class Detokenizer:
    """Special tokens have no text, those in `shown` excepted.

    Tokens are decoded behind those that gave the last text, since some decoders drop the space before a first word.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._shown = shown
        self._ids: list[int] = []
        self._emitted_ids = 0
        """How many of them have given their text: the group that did so last."""
        self._emitted = ""
        """The text of these."""

    def feed(self, token_id: int) -> str:
        if token_id in self._shown:
            return self._flush() + self._tokenizer.decode([token_id], skip_special_tokens=False)
        self._ids.append(token_id)
        text = self._decode()
        if text == self._emitted:  # it has no text
            self._ids.pop()
            return ""
        whole = not text.endswith(_BROKEN) and text.startswith(self._emitted)
        if not whole and len(self._ids) - self._emitted_ids < _PATIENCE:
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """What was held back; bytes that never became a character come out as U+FFFD."""
        return self._flush()

    def _flush(self) -> str:
        return self._emit(self._decode()) if len(self._ids) > self._emitted_ids else ""

    def _emit(self, text: str) -> str:
        new = text[len(self._emitted) :]
        self._ids = self._ids[self._emitted_ids :]
        self._emitted_ids, self._emitted = len(self._ids), self._decode()
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)


class StopFinder:
    """Passes text on up to the stop string that is complete first, which is cut off."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = _automaton(tuple(stops)) if stops else None
        self._state = 0
        self._held = ""
        self.found: str | None = None
        """The stop that was complete first; of several that end together, the longest."""

    def feed(self, text: str) -> str:
        stops = self._stops
        if stops is None:
            return text
        before = len(self._held)
        self._held += text
        state = self._state
        for at, char in enumerate(text, before + 1):
            state = stops.step(state, char)
            found = stops.complete[state]
            if found is not None:
                self.found = found
                rest, self._held = self._held[: at - len(found)], ""
                return rest
        self._state = state
        cut = len(self._held) - stops.depth[state]
        settled, self._held = self._held[:cut], self._held[cut:]
        return settled

    def finish(self) -> str:
        rest, self._held = self._held, ""
        return rest


class _Automaton:
    """Of all stops at once (Aho and Corasick, 1975): a state is the longest end of the text that may begin one of them."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self.depth = [0]
        """Characters of the beginning that a state stands for."""
        self.complete: list[str | None] = [None]
        """The longest stop that a state ends with."""
        for stop in stops:
            state = 0
            for char in stop:
                if char not in self._next[state]:
                    self._next[state][char] = len(self._next)
                    self._next.append({})
                    self.depth.append(self.depth[state] + 1)
                    self.complete.append(None)
                state = self._next[state][char]
            self.complete[state] = stop
        self._shorter = [0] * len(self._next)
        """The state of the longest beginning that is an end of this one."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for char, after in self._next[state].items():
                self._shorter[after] = self.step(self._shorter[state], char)
                self.complete[after] = self.complete[after] or self.complete[self._shorter[after]]
                waiting.append(after)

    def step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(char, 0)


@lru_cache(maxsize=32)
def _automaton(stops: tuple[str, ...]) -> _Automaton:
    return _Automaton(stops)


@cache
def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: these are which."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The very bytes of a token, also when they are only part of a character."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    piece = tokenizer.id_to_token(token_id)
    alphabet = _byte_alphabet()
    if _BROKEN in text and piece is not None and all(char in alphabet for char in piece):
        return bytes(alphabet[char] for char in piece)
    return text.encode()
