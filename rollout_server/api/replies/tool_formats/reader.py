"""The reader that all formats share: text comes out as soon as it cannot be part of a call, a call when it is
complete.

What looks like a call and is none stays text, exactly as sampled: a model must be able to see, and training to
punish, what it got wrong; reading goes on right after the character where the attempt began, so that a good call
behind a broken one is found. White space before the first call, around calls and between them is dropped; without a
call nothing is. How the text is cut into pieces makes no difference. The work is linear in the length of the reply:
no format lets more than a few attempts read the same character.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from typing import Any

from rollout_server.api.replies.reply import ReplyEvent, ToolCall
from rollout_server.api.replies.tool_formats.scan import Cursor, Scan, any_of, overlap

Call = tuple[str, str]
"""A name, and arguments as JSON text of an object."""

_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Syntax:
    """Where calls may begin, and how one is read."""

    read: Callable[[Cursor], Scan[list[Call] | None]]
    """Started before the first character of what may be calls; None: it is none. Nothing comes of an empty list: it
    is dropped."""
    triggers: tuple[str, ...] = ()
    """Texts that begin calls wherever they stand."""
    at_start: str = ""
    """Characters that begin calls at the start of a reply, after white space."""
    after_call: str = ""
    """Characters that begin further calls right after one."""
    call_id: Callable[[bytes], str] = lambda digest: f"call_{digest.hex()}"
    """Made of 12 bytes."""


class CallReader:
    """`reply_id` gives the calls their ids: the n-th call of a reply has the same one whoever reads it."""

    def __init__(self, reply_id: str, syntax: Syntax) -> None:
        self._reply_id = reply_id
        self._syntax = syntax
        self._calls = 0
        self._events: list[ReplyEvent] = []
        self._spaces: list[str] = []  # read, and dropped if a call comes next
        self._after_call = False
        self._openers = syntax.at_start  # characters that begin a call if one is next
        self._partial = ""  # may be the beginning of a trigger
        self._scan: Scan[list[Call] | None] | None = None
        self._cursor = Cursor("", 0)
        self._held: list[str] = []  # the pieces that the scan has seen, from its first character on

    def feed(self, text: str) -> list[ReplyEvent]:
        if not text or self._is_plain(text):
            return [text] if text else []
        place: tuple[str, int] | None
        if self._scan is None:
            place = self._partial + text, 0
            self._partial = ""
        else:
            self._held.append(text)
            self._cursor.refill(text)
            place = self._go_on()
        while place is not None:
            place = self._look(*place)
        return self._take()

    def finish(self) -> list[ReplyEvent]:
        while self._scan is not None:
            place: tuple[str, int] | None = self._give_up("".join(self._held), 0)
            while place is not None:
                place = self._look(*place)
        self._say(self._partial)
        self._partial = ""
        if not self._after_call:
            self._events.extend(self._spaces)
        self._spaces.clear()
        return self._take()

    def _is_plain(self, text: str) -> bool:
        """Whether nothing is held, and nothing of this text has to be: what most pieces of most replies are."""
        if self._scan is not None or self._partial or self._openers or self._after_call or self._spaces:
            return False
        return not text[-1].isspace() and not any(trigger[0] in text for trigger in self._syntax.triggers)

    def _look(self, text: str, at: int) -> tuple[str, int] | None:
        """Say what is text, try what may be a call. Returns where to look next, None when more text is needed."""
        start = self._start(text, at)
        if start is None:
            return None
        self._cursor = Cursor(text, start)
        self._scan = self._syntax.read(self._cursor)
        self._held.clear()
        return self._go_on(start)

    def _start(self, text: str, at: int) -> int | None:
        """Where a call may begin; what comes before it is said."""
        if self._openers:
            match = _SPACE.match(text, at)
            assert match is not None
            self._say(match.group())
            at = match.end()
            if at < len(text) and text[at] in self._openers:
                return at
        if not self._syntax.triggers:
            self._say(text[at:])
            return None
        match = any_of(self._syntax.triggers).search(text, at)
        if match is not None:
            self._say(text[at : match.start()])
            return match.start()
        cut = max(at, len(text) - overlap(text, self._syntax.triggers))
        self._say(text[at:cut])
        self._partial = text[cut:]
        return None

    def _go_on(self, start: int | None = None) -> tuple[str, int] | None:
        assert self._scan is not None
        cursor = self._cursor
        try:
            next(self._scan)
        except StopIteration as end:
            if end.value is None:
                return self._give_up("".join(self._held), 0) if start is None else self._give_up(cursor.text, start)
            self._scan = None
            self._held.clear()
            self._give(end.value)
            return cursor.text, cursor.at
        if start is not None:
            self._held.append(cursor.text[start:])
        return None

    def _give_up(self, text: str, start: int) -> tuple[str, int]:
        self._scan = None
        self._say(text[start])
        return text, start + 1

    def _say(self, text: str) -> None:
        if self._after_call:
            text = text.lstrip()
        body = text.rstrip()
        if body:
            self._events.append("".join([*self._spaces, body]))
            self._spaces.clear()
            self._after_call = False
            self._openers = ""
        if len(body) < len(text):
            self._spaces.append(text[len(body) :])

    def _give(self, calls: list[Call]) -> None:
        self._spaces.clear()
        for name, arguments in calls:
            digest = blake2b(f"{self._reply_id}/{self._calls}".encode(), digest_size=12).digest()
            self._events.append(ToolCall(self._syntax.call_id(digest), name, arguments))
            self._calls += 1
        self._after_call = True
        self._openers = self._syntax.after_call

    def _take(self) -> list[ReplyEvent]:
        """The events so far, with neighbouring texts joined."""
        events, self._events = self._events, []
        if len(events) < 2:
            return events
        joined: list[ReplyEvent] = []
        for kind, run in groupby(events, type):
            if kind is str:
                joined.append("".join(map(str, run)))
            else:
                joined += run
        return joined


def parsed(text: str) -> Any:
    """The value of JSON text; numbers beyond the range of floats are the largest ones. Raises ValueError."""
    try:
        return json.loads(text, parse_constant=_reject, parse_float=as_float)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def as_float(text: str) -> float:
    return min(max(float(text), -sys.float_info.max), sys.float_info.max)


def as_call(name: Any, arguments: Any) -> Call | None:
    """The call that these make, None if they make none. Arguments are written anew, so that they are JSON whatever
    form the model used; halves of surrogate pairs, which no client could be sent, make no call."""
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False)
        (name + text).encode()
    except (ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        return None
    return name, text


def call_in(text: str, key: str, *others: str) -> Call | None:
    """The call in `{"name": …, key: {…}}`; `others` are keys that mean the same."""
    try:
        value = parsed(text)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    return as_call(value.get("name"), next((value[k] for k in (key, *others) if k in value), None))


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
