"""Responses that clients may come back to: by id, within one episode, as long as there is room.

What is kept is bytes: nobody can change it afterwards, and its size is what it says. The least recently used go first;
whatever is forgotten is answered as if it had never been.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgspec

from rollout_server.api.turn import Message

_ENTRY_BYTES = 512
"""Of an entry beside its content, about."""


class Stored(msgspec.Struct, frozen=True):
    response: dict[str, Any]
    messages: list[Message]
    """The conversation up to and including the reply, without the instructions."""


class ResponseStore:
    """Holds at most `max_bytes`; what is larger alone is not kept. `scope` is the episode, or empty without one."""

    def __init__(self, max_bytes: int = 64 * 1024 * 1024) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def used_bytes(self) -> int:
        return self._bytes

    def keep(self, scope: str, response: dict[str, Any], messages: list[Message]) -> None:
        """`response` has its id under `id`."""
        self.forget(scope, response["id"])
        content = msgspec.json.encode(Stored(response, messages))
        if len(content) + _ENTRY_BYTES > self._max_bytes:
            return
        self._kept[scope, response["id"]] = content
        self._bytes += len(content) + _ENTRY_BYTES
        while self._bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= len(oldest) + _ENTRY_BYTES

    def get(self, scope: str, response_id: str) -> Stored | None:
        content = self._kept.get((scope, response_id))
        if content is None:
            return None
        self._kept.move_to_end((scope, response_id))
        return msgspec.json.decode(content, type=Stored)

    def forget(self, scope: str, response_id: str) -> bool:
        """Whether it was there."""
        content = self._kept.pop((scope, response_id), None)
        if content is None:
            return False
        self._bytes -= len(content) + _ENTRY_BYTES
        return True
