"""Text out of tokens as they come: never half a character, and cut at the first stop string.

`Detokenizer` turns ids into text piece by piece; the pieces together are the text of all ids. `StopFinder` passes text
on, holds back what may be the beginning of a stop string, and says when one is complete. `token_bytes` is for
log-probs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache

from tokenizers import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_PATIENCE = 32
"""Tokens that may wait for the rest of a character: after so many it is none."""


class Detokenizer:
    """Special tokens have no text, those in `shown` excepted."""

    def __init__(self, tokenizer: Tokenizer, shown: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._shown = shown
        self._ids: list[int] = []  # the last emitted token and what came since
        self._emitted = ""  # the text of the part of _ids that was emitted

    def feed(self, token_id: int) -> str:
        if token_id in self._shown:
            held = self.finish()
            self._ids, self._emitted = [], ""
            return held + self._tokenizer.decode([token_id], skip_special_tokens=False)
        self._ids.append(token_id)
        text = self._decode()
        if text == self._emitted:  # it has no text
            self._ids.pop()
            return ""
        whole = not text.endswith(_BROKEN) and text.startswith(self._emitted)
        if not whole and len(self._ids) < _PATIENCE:
            return ""
        new = text[len(self._emitted) :]
        if new:
            self._ids = [token_id]
            self._emitted = self._decode()
            if self._emitted.startswith(_BROKEN):  # it ends a character that an earlier token began
                self._ids, self._emitted = [], ""
        return new

    def finish(self) -> str:
        """What was held back; bytes that never became a character come out as U+FFFD."""
        text = self._decode()
        return text[len(self._emitted) :]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)


class StopFinder:
    """`inclusive` stops stay in the text, the others are cut off."""

    def __init__(self, stops: Sequence[str], inclusive: Sequence[str] = ()) -> None:
        self._stops = [(stop, 0) for stop in stops] + [(stop, len(stop)) for stop in inclusive]
        self._held = ""
        self.found: str | None = None
        """The stop that was completed first."""

    def feed(self, text: str) -> str:
        if not self._stops:
            return text
        self._held += text
        hits = [(at, at + keep, stop) for stop, keep in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            _, cut, self.found = min(hits)
            rest, self._held = self._held[:cut], ""
            return rest
        cut = len(self._held) - max(_overlap(self._held, stop) for stop, _ in self._stops)
        settled, self._held = self._held[:cut], self._held[cut:]
        return settled

    def finish(self) -> str:
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


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
