"""Ids of earlier calls, kept so that the one nearest to a prompt is found at once, however many there are.

Calls that extend one another share one strand of ids. The strands of a scope are sorted, so that the one with the longest
common prefix stands next to where a prompt would stand: two comparisons at the speed of memory, never one for each call.
What calls mean, and how long they are kept, is left to `conversation.py`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

_WIDTH = 4
"""Bytes of an id."""


def pack(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()


def unpack(data: bytes) -> list[int]:
    ids = array("i")
    ids.frombytes(data)
    return ids.tolist()


@dataclass(eq=False)
class KnownCall:
    """One call: the first `end` ids of its strand, sampled from `start` on (None where that is not known)."""

    id: str
    strand: Strand = field(repr=False)
    start: int | None
    end: int
    continued: int = 0
    """Prompts that have extended it."""

    @property
    def ids(self) -> list[int]:
        return unpack(self.strand.data[: self.end * _WIDTH])

    @property
    def sampled_ids(self) -> list[int]:
        return [] if self.start is None else unpack(self.strand.data[self.start * _WIDTH : self.end * _WIDTH])

    def begins(self, data: bytes) -> bool:
        return data.startswith(self.strand.data[: self.end * _WIDTH])


@dataclass(eq=False)
class Strand:
    scope: str
    data: bytes = field(repr=False)
    calls: list[KnownCall] = field(repr=False)
    """Whose ids are a prefix of these, shortest first; forgotten ones too."""
    users: int = 0


@dataclass(frozen=True)
class Nearest:
    """The strand that shares most with a prompt."""

    strand: Strand
    shared: int
    """Length of the common prefix, in tokens."""

    def contained(self) -> KnownCall | None:
        """The longest call that the prompt begins with."""
        return max((call for call in self.strand.calls if call.end <= self.shared), key=_end, default=None)

    def asked_for(self, length: int) -> bool:
        """Whether a prompt of this length that is shared as a whole is one of the calls' own."""
        return self.shared == length and any(call.start == length for call in self.strand.calls)

    def parts_in_sampled(self) -> bool:
        """Whether the prompt leaves the strand, or ends, inside of what was sampled."""
        calls = self.strand.calls
        return any(call.start is not None and call.start <= self.shared < call.end for call in calls)


class Sequences:
    def __init__(self) -> None:
        self.tokens = 0
        """In all strands together."""
        self._scopes: dict[str, list[Strand]] = {}

    def nearest(self, scope: str, data: bytes) -> Nearest | None:
        """None if there is nothing in this scope that begins as these ids do."""
        strands = self._scopes.get(scope, [])
        at = bisect_left(strands, data, key=_data)
        found = [Nearest(strand, _shared(strand.data, data)) for strand in strands[max(0, at - 1) : at + 1]]
        best = max(found, key=lambda nearest: nearest.shared, default=None)
        return best if best is not None and best.shared else None

    def add(self, scope: str, call_id: str, data: bytes, start: int | None, base: KnownCall | None) -> KnownCall:
        """`base` is a call that this one is thought to extend; release what is returned, once."""
        if base is None or not base.begins(data):
            nearest = self.nearest(scope, data)
            base = nearest.contained() if nearest else None
        if base is not None and base.strand.users and len(base.strand.data) == base.end * _WIDTH:
            strand = base.strand
            self._remove(strand)
            strand.data = data
        else:
            calls = [] if base is None else [call for call in base.strand.calls if call.end <= base.end]
            strand = Strand(scope, data, calls)
        self._insert(strand)
        call = KnownCall(call_id, strand, start, len(data) // _WIDTH)
        strand.calls.append(call)
        strand.users += 1
        return call

    def release(self, call: KnownCall) -> None:
        """A strand is forgotten with the last of its calls."""
        call.strand.users -= 1
        if not call.strand.users:
            self._remove(call.strand)

    def _insert(self, strand: Strand) -> None:
        strands = self._scopes.setdefault(strand.scope, [])
        strands.insert(bisect_left(strands, strand.data, key=_data), strand)
        self.tokens += len(strand.data) // _WIDTH

    def _remove(self, strand: Strand) -> None:
        strands = self._scopes[strand.scope]
        at = bisect_left(strands, strand.data, key=_data)
        while strands[at] is not strand:  # others of the same ids
            at += 1
        del strands[at]
        if not strands:
            del self._scopes[strand.scope]
        self.tokens -= len(strand.data) // _WIDTH


def _shared(one: bytes, other: bytes) -> int:
    """Tokens at the beginning that are the same, by bisection: slices are compared at the speed of memory."""
    low, high = 0, min(len(one), len(other)) // _WIDTH
    while low < high:
        middle = (low + high + 1) // 2
        if one[low * _WIDTH : middle * _WIDTH] == other[low * _WIDTH : middle * _WIDTH]:
            low = middle
        else:
            high = middle - 1
    return low


def _data(strand: Strand) -> bytes:
    return strand.data


def _end(call: KnownCall) -> int:
    return call.end
