"""A query's filters and order, on columns: rows in, rows out. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lightning_rl.episode import Outcome
from trainers.viewer.index.columns import RUNNING, Columns, Rows
from trainers.viewer.records import EpisodeQuery, EpisodeRow

Mask = NDArray[np.bool_]
Ends = tuple[float | None, float | None]
SORTS = ("id", *(name for name in EpisodeRow.__struct_fields__ if name not in ("id", "rewards")))
REWARD = "reward."
_MEASURED = ("step", "calls", "tokens", "seconds")


def is_sort(name: str) -> bool:
    return name in SORTS or name.startswith(REWARD)


def matching(columns: Columns, query: EpisodeQuery, documents: Rows | None) -> Rows:
    """`documents`: what the query's text was found in; None without one."""
    mask = np.ones(len(columns), dtype=np.bool_)
    for name, chosen in (("phase", query.phase), ("outcome", query.outcome), ("group", (query.group,))):
        if any(chosen):
            mask &= _is_one_of(columns, name, chosen)
    if query.counted is not None:
        mask &= columns["counted"] == query.counted
    if query.agent:
        wanted = set(query.agent)
        mask &= _where(columns, "agents", (not wanted.isdisjoint(names) for names in columns.coded["agents"].values))
    if query.task:
        part = query.task.casefold()
        mask &= _where(columns, "task", (part in task.casefold() for task in columns.coded["task"].values))
    for name in _MEASURED:
        ends = getattr(query, name)
        if ends != (None, None):
            mask &= _within(_measure(columns, name), ends)
    if query.version != (None, None):
        low, high = query.version
        mask &= columns["low"] <= columns["high"]
        mask &= (True if low is None else columns["high"] >= low) & (True if high is None else columns["low"] <= high)
    for name, ends in query.reward.items():
        if ends != (None, None):
            mask &= _within(columns.reward(name), ends)
    if documents is not None:
        mask &= columns.has_any(documents)
    return np.flatnonzero(mask)


def ordered(columns: Columns, rows: Rows, sort: str, descending: bool) -> Rows:
    """Those without a value come last; of equals the one that was recorded first is the first."""
    keys = _keys(columns, sort)[rows]
    return rows[np.argsort(-keys if descending else keys, kind="stable")]


def rows_of(columns: Columns, rows: Rows) -> list[EpisodeRow]:
    names = ("phase", "step", "task", "sample", "attempt", "group", "counted", "calls", "tokens", "started_at")
    taken = {name: columns.values(name, rows) for name in (*names, "outcome", "agents", "low", "high", "ended_at")}
    rewards = columns.rewards_of(rows)
    return [
        EpisodeRow(
            id=columns.ids[row],
            outcome=None if taken["outcome"][at] == RUNNING else Outcome(taken["outcome"][at]),
            agents=list(taken["agents"][at]),
            versions=[taken["low"][at], taken["high"][at]] if taken["low"][at] <= taken["high"][at] else [],
            rewards=rewards[at],
            seconds=None if taken["outcome"][at] == RUNNING else taken["ended_at"][at] - taken["started_at"][at],
            **{name: taken[name][at] for name in names},
        )
        for at, row in enumerate(rows.tolist())
    ]


def _measure(columns: Columns, name: str) -> NDArray[np.float64]:
    """NaN where there is no value."""
    if name == "seconds":
        is_running = columns["outcome"] == columns.running
        return np.where(is_running, np.nan, columns["ended_at"] - columns["started_at"])
    return columns[name].astype(np.float64)


def _keys(columns: Columns, sort: str) -> NDArray[np.float64]:
    if sort.startswith(REWARD):
        return columns.reward(sort.removeprefix(REWARD))
    if sort == "id":
        return columns.id_ranks()
    if sort == "outcome":
        ranks = columns.coded["outcome"].ranks()[columns["outcome"]]
        return np.where(columns["outcome"] == columns.running, np.nan, ranks)
    if sort in columns.coded:
        return columns.coded[sort].ranks()[columns[sort]]
    if sort == "versions":
        return np.where(columns["low"] <= columns["high"], columns["high"].astype(np.float64), np.nan)
    return _measure(columns, sort)


def _within(values: NDArray[np.float64], ends: Ends) -> Mask:
    low, high = ends
    mask = ~np.isnan(values)
    if low is not None:
        mask &= values >= low
    if high is not None:
        mask &= values <= high
    return mask


def _is_one_of(columns: Columns, name: str, values: Iterable[str]) -> Mask:
    known = [columns.coded[name].known(value) for value in values]
    return np.isin(columns[name], [number for number in known if number is not None])


def _where(columns: Columns, name: str, is_wanted: Iterable[bool]) -> Mask:
    """`is_wanted` for each value of a coded column."""
    mask: Mask = np.fromiter(is_wanted, dtype=np.bool_)[columns[name]]
    return mask
