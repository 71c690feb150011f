"""The latest calls of the episodes that this process records, as bases for what comes next (see `store.deltas`).

Of each conversation only the last call is kept, since it repeats the ones before it. What has been forgotten is read back
from the store, so the bound on memory costs time and never space.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from lightning_rl.store.deltas import Base, Texts, overlap

MAX_BYTES = 256 * 2**20
KEPT_PER_EPISODE = 64
COMPARED = 4
"""So many of the latest calls are compared with a prompt of which nobody knows what it extends."""


class Bases:
    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._episodes: OrderedDict[str, dict[str, Base]] = OrderedDict()
        self._lock = threading.Lock()

    def latest(self, episode_id: str) -> dict[str, Base]:
        """By call id, the oldest first; empty if the episode is not known here."""
        with self._lock:
            if episode_id not in self._episodes:
                return {}
            self._episodes.move_to_end(episode_id)
            return dict(self._episodes[episode_id])

    def add(self, episode_id: str, base: Base, repeats: str | None = None) -> None:
        """`repeats`: the call whose whole content is in this one."""
        with self._lock:
            kept = self._episodes.setdefault(episode_id, {})
            self._episodes.move_to_end(episode_id)
            for gone in (repeats, base.id):
                self._drop(kept, gone)
            kept[base.id] = base
            self._bytes += base.size
            if len(kept) > KEPT_PER_EPISODE:
                self._drop(kept, next(iter(kept)))
            while self._bytes > self._max_bytes:
                _, bases = self._episodes.popitem(last=False)
                self._bytes -= sum(other.size for other in bases.values())

    def forget(self, episode_id: str) -> None:
        with self._lock:
            for base in self._episodes.pop(episode_id, {}).values():
                self._bytes -= base.size

    def _drop(self, kept: dict[str, Base], call_id: str | None) -> None:
        if call_id in kept:
            self._bytes -= kept.pop(call_id).size


def best(latest: dict[str, Base], prompt: bytes, request: Texts) -> Base | None:
    """The one of the newest that saves most; None if none saves anything."""
    compared = list(latest.values())[: -COMPARED - 1 : -1]
    saved = [(overlap(prompt, request, base), base) for base in compared]
    most, base = max(saved, key=lambda entry: entry[0], default=(0, None))
    return base if most > 0 else None
