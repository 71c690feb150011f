"""Reading text that is still arriving: small generators that consume from a cursor and pause where it ends.

Each `yield` asks for more text; whoever drives the generator calls `Cursor.refill` and resumes it. A scan consumes
every character once, leaves at most a few unconsumed when it pauses, and gives up (returns None) at the first
character that cannot belong to what it looks for. Nothing here judges meaning: whether brackets that match are JSON
is found out by parsing them.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

MAX_DEPTH = 128
"""Brackets within brackets; what is deeper is no call."""

MAX_NAME = 256
"""Characters of a name outside JSON; what is longer is no call."""

T = TypeVar("T")
Scan = Generator[None, None, T]

_SPACE = re.compile(r"\s*")


class Cursor:
    """A place in the text so far. What lies before it may be forgotten."""

    __slots__ = ("at", "text")

    def __init__(self, text: str, at: int) -> None:
        self.text = text
        self.at = at

    def refill(self, text: str) -> None:
        self.text = self.text[self.at :] + text
        self.at = 0


@dataclass(frozen=True)
class Lexis:
    """What may stand between brackets: `outside` matches a run of characters outside strings, `strings` has, for each
    quotation mark, the run of characters that stand for themselves inside."""

    outside: re.Pattern[str]
    strings: dict[str, re.Pattern[str]]


JSON = Lexis(re.compile(r"[ \t\r\n0-9,:+\-.aeflnrstuE]*"), {'"': re.compile(r'[^"\\\x00-\x1f]*')})
PYTHON = Lexis(re.compile(r"[\s\w,:=+\-.]*"), {'"': re.compile(r'[^"\\\n]*'), "'": re.compile(r"[^'\\\n]*")})

_CLOSERS = {"{": "}", "[": "]", "(": ")"}


def spaces(cursor: Cursor) -> Scan[str]:
    """The white space here; done at the first other character."""
    pieces = []
    while True:
        match = _SPACE.match(cursor.text, cursor.at)
        assert match is not None
        pieces.append(match.group())
        cursor.at = match.end()
        if cursor.at < len(cursor.text):
            return "".join(pieces)
        yield


def one_of(cursor: Cursor, literals: Sequence[str]) -> Scan[str | None]:
    """The literal that stands here; nothing is consumed if none does. None may begin another."""
    size = max(len(literal) for literal in literals)
    while True:
        here = cursor.text[cursor.at : cursor.at + size]
        for literal in literals:
            if here.startswith(literal):
                cursor.at += len(literal)
                return literal
        if not any(literal.startswith(here) for literal in literals):
            return None
        yield


def until(cursor: Cursor, literals: tuple[str, ...]) -> Scan[tuple[str, str]]:
    """The text before the first of the literals, and which one it is; both are consumed."""
    pattern = any_of(literals)
    pieces = []
    while True:
        match = pattern.search(cursor.text, cursor.at)
        if match is not None:
            pieces.append(cursor.text[cursor.at : match.start()])
            cursor.at = match.end()
            return "".join(pieces), match.group()
        cut = max(cursor.at, len(cursor.text) - overlap(cursor.text, literals))
        pieces.append(cursor.text[cursor.at : cut])
        cursor.at = cut
        yield


def name(cursor: Cursor, pattern: re.Pattern[str]) -> Scan[str | None]:
    """A run of characters that `pattern` matches, done at the first other one; None if it is empty or too long."""
    found = ""
    while True:
        match = pattern.match(cursor.text, cursor.at)
        assert match is not None
        found += match.group()[: MAX_NAME + 1]
        if len(found) > MAX_NAME:
            return None
        cursor.at = match.end()
        if cursor.at < len(cursor.text):
            return found or None
        yield


def bracketed(cursor: Cursor, lexis: Lexis) -> Scan[str | None]:
    """The text from the bracket here to the one that closes it; brackets in strings do not count."""
    pieces: list[str] = []
    closers: list[str] = []
    quote = ""
    while True:
        start = cursor.at
        at = _advance(cursor.text, start, lexis, closers, quote)
        if at is None:
            return None
        cursor.at, quote = at
        pieces.append(cursor.text[start : cursor.at])
        if not closers:
            return "".join(pieces)
        yield


def _advance(text: str, at: int, lexis: Lexis, closers: list[str], quote: str) -> tuple[int, str] | None:
    """Where reading stops and in which string, with `closers` brought up to date: at the end of the text (before a
    backslash that ends it), or behind the last bracket. None where nothing of the kind can follow."""
    end = len(text)
    while at < end:
        if quote:
            match = lexis.strings[quote].match(text, at)
            assert match is not None
            at = match.end()
            if at == end:
                break
            if text[at] == quote:
                quote = ""
                at += 1
            elif text[at] != "\\":
                return None
            elif at + 1 == end:
                break
            else:
                at += 2
            continue
        match = lexis.outside.match(text, at)
        assert match is not None
        at = match.end()
        if at == end:
            break
        char = text[at]
        at += 1
        if char in lexis.strings:
            quote = char
        elif char in _CLOSERS and len(closers) < MAX_DEPTH:
            closers.append(_CLOSERS[char])
        elif closers and closers[-1] == char:
            closers.pop()
            if not closers:
                break
        else:
            return None
    return at, quote


@cache
def any_of(literals: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(literal) for literal in literals))


def overlap(text: str, literals: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of one of the literals."""
    longest = 0
    for literal in literals:
        at = text.find(literal[0], max(0, len(text) - len(literal) + 1))
        while at >= 0:
            if literal.startswith(text[at:]):
                longest = max(longest, len(text) - at)
                break
            at = text.find(literal[0], at + 1)
    return longest
