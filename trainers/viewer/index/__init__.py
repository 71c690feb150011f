"""The list of a store's episodes, of which there may be a hundred thousand: filtered, sorted and searched at once, and live.

Columns in memory answer (`columns`, `query`); a thread fills them and reads on in the background (`reading`) what it keeps in a
file of its own (`cache`). The store is only read. While the columns are not full yet the latest episodes are there already, and
everything else waits for them; agents, versions and words of episodes that were not read yet match nothing, which `Indexing` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lightning_rl.errors import LightningError
from lightning_rl.store import Store
from trainers.viewer.index.columns import Columns, Rows
from trainers.viewer.index.query import REWARD, SORTS, is_sort, matching, ordered, rows_of
from trainers.viewer.index.reading import EARLY, Reader
from trainers.viewer.index.words import words_of
from trainers.viewer.records import EpisodePage, EpisodeQuery, Facets, Indexing, Range

__all__ = ["EpisodeIndex"]

_PATIENCE_S = 0.15
"""For so long the first page waits for all episodes."""
_ANSWERS = 8
"""So many queries are remembered, for the pages that follow."""
_ORDER = ("task", "sample", "attempt")
"""In a step, before ids: as the store has it."""


class EpisodeIndex:
    """Used by many threads. Methods raise StoreError for a store that cannot be read."""

    def __init__(self, store: Store, cache_dir: Path | None, is_current: Callable[[], bool] = lambda: True) -> None:
        """Without a folder, what is read is kept for as long as the index is open. A store that is not current any more, since its
        file was opened as one that stays and somebody writes to it now, is not read on."""
        self._reader = Reader(store, cache_dir, is_current)
        self._answers: dict[str, tuple[int, Rows]] = {}
        self._facets: Facets | None = None

    def stop(self) -> None:
        """Read no more: whoever waits for what was not read yet gets a StoreError at once. To be closed all the same."""
        self._reader.stop()

    def close(self) -> None:
        self._reader.close()

    def page(self, query: EpisodeQuery) -> EpisodePage:
        """Raises LightningError for a sort that is none."""
        if not is_sort(query.sort):
            raise LightningError(
                f"episodes cannot be sorted by {query.sort!r}", hint=f"by {', '.join(SORTS)} or {REWARD}NAME"
            )
        return self._early(query) or self._page(query)

    def facets(self) -> Facets:
        with self._columns() as columns:
            if self._facets is None or self._facets.revision != columns.revision:
                self._facets = _facets(columns)
            return self._facets

    def neighbours(self, episode_id: str) -> tuple[str | None, str | None]:
        """Ids of the episodes before and after it, in the order of the store within its phase."""
        with self._columns() as columns:
            row = columns.row_of.get(episode_id)
            if row is None:
                return None, None
            in_phase = columns["phase"] == columns["phase"][row]
            steps, step = columns["step"], columns["step"][row]
            order = _in_order(columns, in_phase & (steps == step), _ORDER)
            at = order.index(row)
            before = order[at - 1] if at > 0 else None
            after = order[at + 1] if at + 1 < len(order) else None
            if before is None and (earlier := in_phase & (steps < step)).any():
                before = _in_order(columns, earlier & (steps == steps[earlier].max()), _ORDER)[-1]
            if after is None and (later := in_phase & (steps > step)).any():
                after = _in_order(columns, later & (steps == steps[later].min()), _ORDER)[0]
            return (None if before is None else columns.ids[before], None if after is None else columns.ids[after])

    def group(self, name: str) -> list[str]:
        """Ids of its episodes, in the order of sample and attempt; none for a group that is not there."""
        with self._columns() as columns:
            number = columns.coded["group"].known(name)
            if number is None or not name:
                return []
            return [columns.ids[row] for row in _in_order(columns, columns["group"] == number, ("sample", "attempt"))]

    def _early(self, query: EpisodeQuery) -> EpisodePage | None:
        """The first page of all, while the rest is still read."""
        reader = self._reader
        reader.wait(reader.has_early)
        is_first = msgspec.structs.replace(query, limit=EARLY) == EpisodeQuery(limit=EARLY)
        if reader.early is None or not is_first or query.limit > EARLY or reader.has_all.wait(_PATIENCE_S):
            return None
        columns = reader.early
        rows = ordered(columns, np.arange(len(columns)), query.sort, query.descending)[: query.limit]
        return EpisodePage(
            rows=rows_of(columns, rows),
            offset=0,
            matched=reader.total,
            total=reader.total,
            revision=-1,
            indexing=Indexing(done=0, total=reader.total),
        )

    def _page(self, query: EpisodeQuery) -> EpisodePage:
        key = repr(msgspec.structs.replace(query, offset=0, limit=0))
        with self._columns() as columns:
            asked_at = columns.revision
            if key in self._answers and self._answers[key][0] == asked_at:
                return _page_of(columns, self._answers[key][1], query)
        words = words_of(query.text)
        documents = self._reader.find(words) if words else None
        with self._reader.lock:
            rows = ordered(columns, matching(columns, query, documents), query.sort, query.descending)
            self._answers[key] = (asked_at, rows)
            if len(self._answers) > _ANSWERS:
                del self._answers[next(iter(self._answers))]
            return _page_of(columns, rows, query)

    @contextmanager
    def _columns(self) -> Iterator[Columns]:
        """With all that the store has now."""
        self._reader.wait(self._reader.has_all)
        self._reader.refresh()
        with self._reader.lock:
            yield self._reader.columns


def _page_of(columns: Columns, rows: Rows, query: EpisodeQuery) -> EpisodePage:
    return EpisodePage(
        rows=rows_of(columns, rows[query.offset : query.offset + query.limit]),
        offset=query.offset,
        matched=len(rows),
        total=len(columns),
        revision=columns.revision,
        indexing=_indexing(columns),
    )


def _in_order(columns: Columns, mask: NDArray[np.bool_], names: Sequence[str]) -> list[int]:
    rows = np.flatnonzero(mask)
    fields = (columns.values(name, rows) for name in names)
    return [row for *_, row in sorted(zip(*fields, [columns.ids[row] for row in rows], rows.tolist(), strict=True))]


def _facets(columns: Columns) -> Facets:
    agents: dict[str, int] = {}
    for names, count in _counts(columns, "agents").items():
        for name in names:
            agents[name] = agents.get(name, 0) + count
    is_versioned = columns["low"] <= columns["high"]
    versions = columns["low"][is_versioned], columns["high"][is_versioned]
    rewards = {name: columns.reward(name) for name in columns.reward_names}
    return Facets(
        phases=_counts(columns, "phase"),
        outcomes=_counts(columns, "outcome"),
        agents=dict(sorted(agents.items(), key=lambda entry: -entry[1])),
        rewards={name: _range(values[~np.isnan(values)]) for name, values in rewards.items()},
        steps=_range(columns["step"]),
        versions=Range(low=float(versions[0].min()), high=float(versions[1].max())) if is_versioned.any() else None,
        calls=_range(columns["calls"]),
        tokens=_range(columns["tokens"]),
        revision=columns.revision,
        indexing=_indexing(columns),
    )


def _counts(columns: Columns, name: str) -> dict[Any, int]:
    values = columns.coded[name].values
    counts = np.bincount(columns[name], minlength=len(values)).tolist()
    return {value: count for value, count in zip(values, counts, strict=True) if count}


def _range(values: NDArray[Any]) -> Range:
    return Range(low=float(values.min()), high=float(values.max())) if len(values) else Range(low=0.0, high=0.0)


def _indexing(columns: Columns) -> Indexing:
    return Indexing(done=columns.number_read(), total=len(columns))
