"""All episodes of a store in memory, in columns: about 100 bytes each beside their ids. Rows are added and change, none goes.

What repeats (tasks, groups, phases, agents) is there once and has a number. Rewards are pairs of row and value by name, so that a
run with many names costs no more than its rewards. Not safe for threads: `EpisodeIndex` has the lock.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from lightning_rl.episode import Outcome
from lightning_rl.store.browsing import Listing

H = TypeVar("H", bound=Hashable)
Rows = NDArray[np.int64]
RUNNING = "running"
TRAIN = "train"
_TYPES: dict[str, Any] = {
    "phase": np.int32,
    "task": np.int32,
    "group": np.int32,
    "outcome": np.int32,
    "agents": np.int32,
    "step": np.int64,
    "sample": np.int64,
    "attempt": np.int64,
    "started_at": np.float64,
    "ended_at": np.float64,
    "counted": np.bool_,
    "calls": np.int64,
    "tokens": np.int64,
    "low": np.int64,
    "high": np.int64,
    "document": np.int64,
    "calls_read": np.int64,
    "is_read": np.bool_,
}
"""`low` and `high`: policy versions, 1 and 0 if there are none. `document`: what it is found by (`cache`), 0 if it was not read."""
_CODED = ("phase", "task", "group", "outcome", "agents")
_TEXTS = ("id", "phase", "task", "group")
_UNREAD = {"low": 1}
_READ_AGAIN = 1.25
"""An episode that runs is read again when it has so many times the calls: all readings together cost a few times the last."""


class Coded(Generic[H]):
    """Values by number."""

    def __init__(self) -> None:
        self.values: list[H] = []
        self._numbers: dict[H, int] = {}
        self._ranks: NDArray[np.float64] = np.empty(0)

    def number(self, value: H) -> int:
        """A new one for a value that was not there."""
        number = self._numbers.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number

    def known(self, value: H) -> int | None:
        return self._numbers.get(value)

    def numbers(self, values: Iterable[H]) -> list[int]:
        return [self.number(value) for value in values]

    def ranks(self) -> NDArray[np.float64]:
        """By number the place in the order of values; NaN for an empty one, which is none."""
        if len(self._ranks) != len(self.values):
            self._ranks = _ranks(self.values)
        return self._ranks


class Columns:
    def __init__(self) -> None:
        self.ids: list[str] = []
        self.row_of: dict[str, int] = {}
        self.coded: dict[str, Coded[Any]] = {name: Coded() for name in _CODED}
        self.running = self.coded["outcome"].number(RUNNING)
        self.nobody = self.coded["agents"].number(())
        self.revision = 0
        """Another one after each change."""
        self._arrays: dict[str, NDArray[Any]] = {name: np.empty(0, kind) for name, kind in _TYPES.items()}
        self._rewards: dict[str, tuple[array[int], array[float]]] = {}
        self._rewards_of_running: dict[int, dict[str, float]] = {}
        """By row: they may change."""
        self._rows_of_documents: Rows = np.full(1, -1)
        self._id_ranks: NDArray[np.float64] = np.empty(0)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """A column; of one that is coded the numbers."""
        return self._arrays[name][: len(self.ids)]

    @property
    def reward_names(self) -> list[str]:
        return list(self._rewards)

    def reward(self, name: str) -> NDArray[np.float64]:
        """NaN for episodes without it."""
        values = np.full(len(self.ids), np.nan)
        if name in self._rewards:
            rows, given = self._rewards[name]
            values[np.frombuffer(rows, dtype=np.int64)] = np.frombuffer(given, dtype=np.float64)
        return values

    def rewards_of(self, rows: Rows) -> list[dict[str, float]]:
        found: list[dict[str, float]] = [{} for _ in rows]
        for name in self._rewards:
            for of_row, value in zip(found, self.reward(name)[rows].tolist(), strict=True):
                if value == value:
                    of_row[name] = value
        return found

    def id_ranks(self) -> NDArray[np.float64]:
        if len(self._id_ranks) != len(self.ids):
            self._id_ranks = _ranks(self.ids)
        return self._id_ranks

    def values(self, name: str, rows: Rows) -> list[Any]:
        found = self._arrays[name][rows].tolist()
        return [self.coded[name].values[number] for number in found] if name in self.coded else found

    def put(self, listing: Listing) -> None:
        """Add what is new and write what has changed of those that run: of one that is over nothing changes.

        Raises ValueError or TypeError, before anything is changed, for what no episode has.
        """
        if not listing.id:
            return
        columns = self._columns(listing)
        rewards = [{name: value for name, value in given.items() if value == value} for given in listing.rewards]
        fresh = [at for at, id in enumerate(listing.id) if id not in self.row_of]
        for at, id in enumerate(listing.id):
            row = self.row_of.get(id)
            if row is not None and self._arrays["outcome"][row] == self.running:
                self._change(row, {name: column[at] for name, column in columns.items()}, rewards[at])
        if fresh:
            self._append([listing.id[at] for at in fresh], {name: column[fresh] for name, column in columns.items()})
            for at in fresh:
                row = self.row_of[listing.id[at]]
                self._put_rewards(row, rewards[at])
                if self._arrays["outcome"][row] == self.running:
                    self._rewards_of_running[row] = rewards[at]
            self.revision += 1

    def listing(self, ids: Sequence[str]) -> Listing:
        """Of episodes that are here, as it was put."""
        rows = self.rows(ids)
        phases = self.values("phase", rows)
        named = {name: self.values(name, rows) for name in Listing.__struct_fields__ if name in _TYPES}
        named["step"] = [step - (phase == TRAIN) for step, phase in zip(named["step"], phases, strict=True)]
        named["outcome"] = [None if outcome == RUNNING else outcome for outcome in named["outcome"]]
        return Listing(id=list(ids), rewards=self.rewards_of(rows), **named)

    def unread(self, most: int) -> list[str]:
        """Ids of those that are to be read: the latest."""
        return [self.ids[row] for row in np.flatnonzero(~self["is_read"])[: -most - 1 : -1]]

    def ids_running(self) -> list[str]:
        return [self.ids[row] for row in np.flatnonzero(self["outcome"] == self.running)]

    def number_read(self) -> int:
        return int(np.count_nonzero(self["document"]))

    def is_over(self, id: str) -> bool:
        return bool(self._arrays["outcome"][self.row_of[id]] != self.running)

    def put_read(
        self,
        ids: Sequence[str],
        *,
        agents: Sequence[Sequence[str]],
        low: Sequence[int],
        high: Sequence[int],
        documents: Sequence[int],
        is_last: bool,
    ) -> None:
        """What was read of episodes that are here; `is_last`: when they were over."""
        if not ids:
            return
        rows, arrays, new = self.rows(ids), self._arrays, np.array(documents, dtype=np.int64)
        if len(self._rows_of_documents) <= max(documents):
            more = np.full(max(documents) * 5 // 4 + 1024, -1)
            more[: len(self._rows_of_documents)] = self._rows_of_documents
            self._rows_of_documents = more
        self._rows_of_documents[arrays["document"][rows]] = -1
        self._rows_of_documents[new] = rows
        arrays["document"][rows] = new
        arrays["agents"][rows] = self.coded["agents"].numbers(map(tuple, agents))
        arrays["low"][rows], arrays["high"][rows] = low, high
        done = rows if is_last else rows[arrays["outcome"][rows] == self.running]
        arrays["is_read"][done] = True
        arrays["calls_read"][done] = arrays["calls"][done]
        self.revision += 1

    def forget_read(self) -> None:
        """What was read is lost: it is to be read again."""
        self["document"][:] = 0
        self["is_read"][:] = False
        self._rows_of_documents[:] = -1
        self.revision += 1

    def has_any(self, documents: Rows) -> NDArray[np.bool_]:
        """For each row whether one of these documents is its."""
        mask = np.zeros(len(self.ids), dtype=np.bool_)
        rows = self._rows_of_documents[documents[documents < len(self._rows_of_documents)]]
        mask[rows[rows >= 0]] = True
        return mask

    def rows(self, ids: Iterable[str]) -> Rows:
        return np.array([self.row_of[id] for id in ids], dtype=np.int64)

    def _columns(self, listing: Listing) -> dict[str, NDArray[Any]]:
        columns = {}
        for name in Listing.__struct_fields__:
            values = getattr(listing, name)
            if name == "outcome":
                values = [RUNNING if value is None else Outcome(value).value for value in values]
            if name in _TEXTS and not all(isinstance(value, str) for value in values):
                raise TypeError(f"{name} is no text")
            if name in _TYPES:
                numbers = self.coded[name].numbers(values) if name in self.coded else values
                columns[name] = np.array(numbers, dtype=_TYPES[name])
        columns["step"] += columns["phase"] == self.coded["phase"].known(TRAIN)
        return columns

    def _append(self, ids: Sequence[str], columns: dict[str, NDArray[Any]]) -> None:
        start, end = len(self.ids), len(self.ids) + len(ids)
        for name, known in self._arrays.items():
            if len(known) < end:
                self._arrays[name] = np.zeros(max(1024, end + end // 4), known.dtype)
                self._arrays[name][:start] = known[:start]
            self._arrays[name][start:end] = columns.get(name, _UNREAD.get(name, 0))
        self._arrays["agents"][start:end] = self.nobody
        self.ids.extend(ids)
        self.row_of.update(zip(ids, range(start, end), strict=True))

    def _change(self, row: int, values: dict[str, Any], rewards: dict[str, float]) -> None:
        has_changed = False
        for name, value in values.items():
            if self._arrays[name][row] != value:
                self._arrays[name][row] = value
                has_changed = True
        before = self._rewards_of_running[row]
        if before != rewards:
            self._put_rewards(row, dict.fromkeys(before, np.nan) | rewards)
            self._rewards_of_running[row] = rewards
            has_changed = True
        if has_changed:
            enough = self._arrays["calls_read"][row] * _READ_AGAIN
            if self._arrays["outcome"][row] != self.running or self._arrays["calls"][row] > enough:
                self._arrays["is_read"][row] = False
            if self._arrays["outcome"][row] != self.running:
                del self._rewards_of_running[row]
            self.revision += 1

    def _put_rewards(self, row: int, rewards: dict[str, float]) -> None:
        for name, value in rewards.items():
            if name not in self._rewards:
                self._rewards[name] = (array("q"), array("d"))
            rows, values = self._rewards[name]
            rows.append(row)
            values.append(value)


def _ranks(values: Sequence[Any]) -> NDArray[np.float64]:
    ranks = np.empty(len(values))
    ranks[sorted(range(len(values)), key=values.__getitem__)] = np.arange(len(values))
    ranks[[at for at, value in enumerate(values) if not value]] = np.nan
    return ranks
