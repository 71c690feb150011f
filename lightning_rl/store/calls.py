"""How calls are written to the episode store: packed, each against a base, before any lock is taken (see `store.deltas`).

The base is the call that the server says is extended, otherwise the latest one that saves most. Whatever is chosen, what is
read is what was written; the choice only costs space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct
from sqlalchemy import Connection

from lightning_rl.episode import Call
from lightning_rl.store.bases import Bases, best
from lightning_rl.store.deltas import ID_BYTES, Base, Delta, Texts, delta
from lightning_rl.store.rows import Values, call_row, delta_columns, pack_ids, texts_of

LoadBase = Callable[[str, str | None], Base | None]
"""Of an episode a certain call, or the latest; from the store."""


class Prepared(Struct, frozen=True):
    """A call that is ready to be written."""

    call: Call
    row: Values
    prompt: bytes
    stored: Delta
    as_base: Base
    repeats: str | None
    """The base, if all of it is in this call."""


class CallWriter:
    """Used by many threads."""

    def __init__(self, load_base: LoadBase) -> None:
        self._load_base = load_base
        self._bases = Bases()

    def prepare(self, batch: Sequence[Call]) -> list[Prepared]:
        """Raises StoreError for a call that cannot be written."""
        staged: dict[str, dict[str, Base]] = {}
        prepared = []
        for call in batch:
            ready = self._prepare(call, staged.setdefault(call.episode_id, {}))
            staged[call.episode_id][call.id] = ready.as_base
            prepared.append(ready)
        return prepared

    def insert(self, connection: Connection, insertion: Any, prepared: Sequence[Prepared]) -> list[Prepared]:
        """Those that were not there before. One whose base turns out to be there in another form is written whole."""
        present: set[str] = set()
        inserted = []
        for ready in prepared:
            stored = ready.stored
            if stored.base_id in present:
                stored = delta(ready.prompt, ready.as_base.request, None)
            row = ready.row | delta_columns(stored)
            if connection.execute(insertion, row, execution_options={"preserve_rowcount": True}).rowcount == 1:
                inserted.append(ready)
            else:
                present.add(ready.call.id)
        return inserted

    def committed(self, inserted: Sequence[Prepared]) -> None:
        for ready in inserted:
            self._bases.add(ready.call.episode_id, ready.as_base, ready.repeats)

    def forget(self, episode_id: str) -> None:
        self._bases.forget(episode_id)

    def _prepare(self, call: Call, staged: dict[str, Base]) -> Prepared:
        row = call_row(call)
        prompt, request = pack_ids(call.prompt_ids, call.id), texts_of(call)
        base = self._base(call, prompt, request, staged)
        stored = delta(prompt, request, base)
        repeats = base is not None and stored.base_tokens * ID_BYTES == len(base.sequence)
        as_base = Base(call.id, prompt + row["sampled_ids"], request)
        return Prepared(call, row, prompt, stored, as_base, stored.base_id if repeats else None)

    def _base(self, call: Call, prompt: bytes, request: Texts, staged: dict[str, Base]) -> Base | None:
        latest = self._bases.latest(call.episode_id) | staged
        latest.pop(call.id, None)
        if call.parent_id in latest:
            return latest[call.parent_id]
        loaded = None
        if call.parent_id is not None:
            loaded = self._load_base(call.episode_id, call.parent_id)
        if loaded is None and call.index > 0 and not latest:
            loaded = self._load_base(call.episode_id, None)
        if loaded is not None and loaded.id != call.id:
            latest[loaded.id] = loaded
        return best(latest, prompt, request)
