"""Pieces of llguidance's Lark dialect: literals, regular expressions, JSON schemas, special tokens, and the frame of
formats whose calls may stand anywhere in a reply. Texts from requests get into a grammar only through here,
escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

COMPACT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""JSON as `json.dumps` writes it, or without the spaces: white space without limit is where small models get lost."""

_SLASH = re.compile(r"\\.|/|\n", re.DOTALL)


def literal(text: str) -> str:
    """The expression that matches this text; the empty text too."""
    return json.dumps(text)


def regex(pattern: str) -> str:
    """A terminal that matches the whole of this pattern, in the syntax of Rust's `regex` without look-around."""
    if not pattern:
        return literal("")
    escaped = _SLASH.sub(lambda found: {"/": r"\/", "\n": r"\n"}.get(found.group(), found.group()), pattern)
    return f"/{escaped}/"


def json_value(schema: Mapping[str, Any]) -> str:
    """JSON text that fits the schema."""
    return "%json " + json.dumps({**schema, "x-guidance": COMPACT})


def either(expressions: list[str]) -> str:
    return f"({' | '.join(expressions)})"


@dataclass(frozen=True)
class Vocabulary:
    """Which texts are special tokens: those are matched by id, never by their characters."""

    special: Mapping[str, int] = field(default_factory=dict)

    def token(self, text: str) -> str:
        return f"<[{self.special[text]}]>" if text in self.special else literal(text)

    def through(self, name: str, before: str, text: str) -> str:
        """A rule that matches the terminal `before` up to the first place where the text, or its token, stands, and
        that."""
        if text in self.special:
            return f"{name}: {before}? {self.token(text)}\n"
        return f"{name}[lazy]: {before} {literal(text)}\n"


def calls_anywhere(trigger: str, rest: str, gap: str, *, many: bool, free: bool, vocabulary: Vocabulary) -> str:
    """The rule `calls` of a format whose calls begin with a text of their own. `rest` is what follows it in a call,
    `gap` stands between calls."""
    if not free:
        call = f"{vocabulary.token(trigger)} {rest}"
        return f"calls: {call}" + (f" ({gap} {call})*\n" if many else "\n")
    head = vocabulary.through("to_call", "TEXT", trigger)
    return head + (f"calls: (to_call {rest})* TEXT?\n" if many else f"calls: to_call {rest} | TEXT?\n")
