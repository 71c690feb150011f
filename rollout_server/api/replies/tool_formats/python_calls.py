"""A Python list of calls whose arguments are literals, parsed without Python: `[f(a=1, b="x"), g()]`.

A parser of our own rather than `ast`, whose time, memory and stack no limit on the length of the text bounds well
enough for what a model may write. This one reads each token once and nests no deeper than `scan.MAX_DEPTH`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from rollout_server.api.replies.tool_formats.reader import as_float
from rollout_server.api.replies.tool_formats.scan import MAX_DEPTH

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<string>"[^"\\\n]*(?:\\.[^"\\\n]*)*"|'[^'\\\n]*(?:\\.[^'\\\n]*)*')
  | (?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.-]))
  | (?P<name>[\w.-]+)
  | (?P<mark>[\[\](){},:=])
  | (?P<end>$)
    )""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{1,3})|(.))", re.DOTALL)
_ESCAPED = {
    "\n": "",
    "\\": "\\",
    "'": "'",
    '"': '"',
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
}
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}

Token = tuple[str, str]


def parse_calls(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    """Names and arguments of the calls, None if the text is anything but a list of at least one."""
    try:
        parser = _Parser(text)
        calls = parser.calls()
        parser.expect("")
    except ValueError:
        return None
    return calls or None


def _tokens(text: str) -> Iterator[Token]:
    at = 0
    while True:
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError("no token")
        kind = match.lastgroup or ""
        yield kind, match.group(kind)
        if kind == "end":
            return
        at = match.end()


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._kind, self._text = next(self._tokens)

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        self.expect("[")
        found = []
        while not self._comes("]"):
            found.append(self._call())
            if not self._comes("]"):
                self.expect(",")
        self.expect("]")
        return found

    def expect(self, mark: str) -> None:
        """Raises ValueError if something else comes; the empty mark is the end."""
        if not self._comes(mark):
            raise ValueError(f"expected {mark!r}")
        self._next()

    def _comes(self, mark: str) -> bool:
        return self._kind == ("mark" if mark else "end") and self._text == mark

    def _next(self) -> str:
        text = self._text
        self._kind, self._text = next(self._tokens, ("end", ""))
        return text

    def _call(self) -> tuple[str, dict[str, Any]]:
        if self._kind not in ("name", "number"):
            raise ValueError("expected a name")
        name = self._next()
        self.expect("(")
        arguments: dict[str, Any] = {}
        while not self._comes(")"):
            if self._kind != "name" or not self._text.isidentifier():
                raise ValueError("expected an argument by keyword")
            key = self._next()
            self.expect("=")
            arguments[key] = self._value(0)
            if not self._comes(")"):
                self.expect(",")
        self.expect(")")
        return name, arguments

    def _value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        match self._kind:
            case "string":
                return _unescaped(self._next()[1:-1])
            case "number":
                text = self._next()
                return int(text) if text.lstrip("+-").isdecimal() else as_float(text)
            case "name" if self._text in _WORDS:
                return _WORDS[self._next()]
        if self._comes("["):
            return self._list(depth)
        if self._comes("{"):
            return self._dictionary(depth)
        raise ValueError("expected a literal")

    def _list(self, depth: int) -> list[Any]:
        self.expect("[")
        values = []
        while not self._comes("]"):
            values.append(self._value(depth + 1))
            if not self._comes("]"):
                self.expect(",")
        self.expect("]")
        return values

    def _dictionary(self, depth: int) -> dict[str, Any]:
        self.expect("{")
        values = {}
        while not self._comes("}"):
            if self._kind != "string":
                raise ValueError("expected a string as key")
            key = _unescaped(self._next()[1:-1])
            self.expect(":")
            values[key] = self._value(depth + 1)
            if not self._comes("}"):
                self.expect(",")
        self.expect("}")
        return values


def _unescaped(text: str) -> str:
    """What a Python string with these characters between its quotes says; escapes that Python does not know say
    themselves. Pairs of surrogates, which JSON has, are joined; half a pair raises ValueError."""
    if "\\" not in text:
        return text
    plain = _ESCAPE.sub(_character, text)
    return plain.encode("utf-16", "surrogatepass").decode("utf-16")


def _character(found: re.Match[str]) -> str:
    for group, base in ((1, 16), (2, 16), (3, 16), (4, 8)):
        if found[group] is not None:
            return chr(int(found[group], base))
    return _ESCAPED.get(found[5], found[0])
