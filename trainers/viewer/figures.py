"""A run's `metrics.jsonl` as columns. It grows while a run goes on, ends in half a line when one was killed, and is written anew
when one is resumed: each asking reads what is new, and everything once more where the file is another.

However long a run is, at most `MOST_STEPS` of its steps are kept: when there are more, every other one is let go.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeGuard

import msgspec
from msgspec import Meta, Struct

from trainers.viewer.records import Evaluation

MOST_STEPS = 1000
LARGEST = 2**53 - 1
"""Whole number that a browser reads as it is."""
BLOCK_BYTES = 1 << 22
HISTOGRAM = "advantages"
LEFT_OUT = ("step", HISTOGRAM, "logprob_gap.by_version")
"""The last has a name of its own for every version: more names than steps."""


class Tail:
    """The complete lines of a file that grows, each once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None
        self._offset = 0

    def read(self, on_line: Callable[[bytes], None], on_restart: Callable[[], None]) -> None:
        """`on_restart`: all lines before are void."""
        try:
            file = self._path.open("rb")
        except OSError:
            if self._identity is not None:
                self._identity, self._offset = None, 0
                on_restart()
            return
        with file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if identity != self._identity or status.st_size < self._offset:
                self._identity, self._offset = identity, 0
                on_restart()
            file.seek(self._offset)
            rest = b""
            while block := file.read(BLOCK_BYTES):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    self._offset += len(line) + 1
                    on_line(line)


class Outline:
    """As much of it as a list of runs shows."""

    def __init__(self, path: Path) -> None:
        self._tail, self._lock = Tail(path), threading.Lock()
        self.steps_done = 0
        self.evaluations: list[Evaluation] = []
        self.unreadable = 0
        """Lines."""

    def refresh(self) -> None:
        with self._lock:
            self._tail.read(self._add, self._restart)

    def _restart(self) -> None:
        self.steps_done, self.evaluations, self.unreadable = 0, [], 0

    def _add(self, line: bytes) -> None:
        row = _row(line)
        if row is None:
            self.unreadable += bool(line.strip())
        elif row.evaluation is None:
            self.steps_done = max(self.steps_done, row.step)
        else:
            self.evaluations.append(_evaluation(row))


class Columns(Struct, frozen=True, kw_only=True):
    steps: list[int]
    every: int
    series: dict[str, list[float | None]]
    edges: list[float]
    counts: list[list[float] | None]


class Figures:
    """All of it."""

    def __init__(self, path: Path, most: int = MOST_STEPS) -> None:
        self._tail, self._lock, self._most = Tail(path), threading.Lock(), most
        self._restart()

    def columns(self) -> Columns:
        with self._lock:
            self._tail.read(self._add, self._restart)
            rows = dict(self._rows)
            if self._last is not None:
                rows[self._last[0]] = self._last[1]
            steps = sorted(rows)
            names = list(dict.fromkeys(name for step in steps for name in rows[step].values))
            return Columns(
                steps=steps,
                every=self._every,
                series={name: [rows[step].values.get(name) for step in steps] for name in names},
                edges=self._edges,
                counts=[rows[step].counts for step in steps],
            )

    def _restart(self) -> None:
        self._rows: dict[int, _Kept] = {}
        self._last: tuple[int, _Kept] | None = None
        self._every = 1
        self._edges: list[float] = []

    def _add(self, line: bytes) -> None:
        row = _row(line)
        if row is None or row.evaluation is not None:
            return
        try:
            self._last = (row.step, self._kept(_decoded(line)))
        except (ValueError, TypeError, OverflowError, RecursionError):
            return  # deeper than anything that is a figure
        if (row.step - 1) % self._every == 0:
            self._rows[row.step] = self._last[1]
        while len(self._rows) >= self._most:
            self._every *= 2
            self._rows = {step: kept for step, kept in self._rows.items() if (step - 1) % self._every == 0}

    def _kept(self, values: Mapping[str, Any]) -> _Kept:
        histogram = values.get(HISTOGRAM)
        counts = None
        if isinstance(histogram, dict) and _is_numbers(histogram.get("edges")) and _is_numbers(histogram.get("counts")):
            self._edges, counts = histogram["edges"], histogram["counts"]
        return _Kept(values=flat({k: v for k, v in values.items() if k not in LEFT_OUT}), counts=counts)


class _Kept(Struct, frozen=True):
    values: dict[str, float]
    counts: list[float] | None


class _Row(Struct):
    step: Annotated[int, Meta(ge=0, le=LARGEST)]
    evaluation: str | None = None
    success: float | None = None
    ci95: list[float | None] = []
    n: Annotated[int, Meta(ge=0, le=LARGEST)] = 0


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers in it, by their dotted names."""
    found: dict[str, float] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in LEFT_OUT:
            continue
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        elif isinstance(value, list):
            found |= flat({str(place): each for place, each in enumerate(value)}, f"{name}.")
        elif is_number(value):
            found[name] = float(value)
    return found


def is_number(value: Any) -> TypeGuard[float]:
    """One that a browser can read: whole numbers may have any number of digits here."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _is_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(map(is_number, values))


def _row(line: bytes) -> _Row | None:
    """None for what is no line of ours."""
    try:
        return msgspec.json.decode(line, type=_Row)
    except (ValueError, RecursionError):
        try:
            return msgspec.convert(json.loads(line), type=_Row)  # Python writes NaN, which is no JSON
        except (ValueError, OverflowError, RecursionError):
            return None


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        return dict(msgspec.json.decode(line))
    except (ValueError, RecursionError):
        return dict(json.loads(line))


def _evaluation(row: _Row) -> Evaluation:
    ends = [end for end in row.ci95 if end is not None and math.isfinite(end)]
    success = row.success if row.success is not None and math.isfinite(row.success) else 0.0
    return Evaluation(
        step=row.step, label=row.evaluation or "", success=success, ci95=ends if len(ends) == 2 else [], n=row.n
    )
