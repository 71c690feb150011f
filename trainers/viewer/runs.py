"""Runs in figures: the list, and one in full, from the files of their folders. Nothing is written, no store is opened."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_rl.errors import LightningError
from lightning_rl.store import BROUGHT_UP_TO_DATE
from lightning_rl.store.place import DATABASE
from lightning_rl.store.schema import SCHEMA_VERSION
from trainers.run_directory import RunDirectory
from trainers.viewer.figures import LARGEST, Figures, Outline, is_number
from trainers.viewer.places import Place, shown
from trainers.viewer.plain_yaml import check, plain
from trainers.viewer.records import Evaluation, RunDetail, RunEntry, RunState
from trainers.viewer.texts import LONGEST_NAME

if TYPE_CHECKING:
    from lightning_rl.recipe import Recipe

MOST_FIGURES = 8
"""Of so many runs the figures are kept at a time."""
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    RecursionError,
    yaml.YAMLError,
)
"""What files that somebody else wrote are answered with when they are read."""
_USER_VERSION = slice(60, 64)
"""Where an SQLite file has its `user_version`."""


class Runs:
    """What is known of each run's files, kept between askings. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outlines: dict[Path, Outline] = {}
        self._figures: OrderedDict[Path, Figures] = OrderedDict()
        self._recipes: dict[Path, tuple[int, dict[str, Any], str]] = {}

    def entry(self, place: Place) -> RunEntry:
        """Of a run whose files cannot be read, where it is and what is wrong with them."""
        run = place.directory
        try:
            return _recorded_entry(place) if run is None else self._entry(place, run)
        except (LightningError, *UNREADABLE) as error:
            return _unread_entry(place, f"its files cannot be read: {_in_short(error)}")

    def detail(self, place: Place) -> RunDetail:
        run, entry = place.directory, self.entry(place)
        if run is None:
            return _without_figures(entry)
        columns = self._figures_of(run).columns()
        values, _ = self._recipe_values(run)
        recipe, note = readable_recipe(run)
        return RunDetail(
            entry=_noted(entry, note),
            steps=columns.steps,
            series=columns.series,
            every=columns.every,
            advantage_edges=columns.edges,
            advantage_counts=columns.counts,
            evaluations=self._outline_of(run).evaluations,
            stages=_stages(run, columns.series),
            recipe=fields((recipe.model_dump(mode="json") if recipe else {}), values),
            formula=_formula(recipe) if recipe else "",
        )

    def _entry(self, place: Place, run: RunDirectory) -> RunEntry:
        outline = self._outline_of(run)
        outline.refresh()
        values, problem = self._recipe_values(run)
        summary = _read_json(run.summary)
        scores = _scores(outline.evaluations, summary)
        torn = f"{outline.unreadable} lines of metrics.jsonl cannot be read" if outline.unreadable else ""
        return RunEntry(
            key=place.key,
            name=place.name,
            path=shown(run.path),
            state=state_of(run),
            started_at=_modified(run.recipe),
            updated_at=max(map(_modified, (run.metrics, run.summary, *_store_files(run.path), run.recipe))),
            model=_text(_at(values, "model", "name")),
            seed=_whole(values.get("seed")),
            steps=_whole(_at(values, "train", "steps")),
            steps_done=outline.steps_done,
            success={label: value for label, (value, _) in scores.items()},
            success_ci95={label: ends for label, (_, ends) in scores.items() if ends},
            note="; ".join(filter(None, (problem, torn, _store_note(run.store)))),
        )

    def _outline_of(self, run: RunDirectory) -> Outline:
        with self._lock:
            return self._outlines.setdefault(run.path, Outline(run.metrics))

    def _figures_of(self, run: RunDirectory) -> Figures:
        with self._lock:
            figures = self._figures.setdefault(run.path, Figures(run.metrics))
            self._figures.move_to_end(run.path)
            while len(self._figures) > MOST_FIGURES:
                self._figures.popitem(last=False)
            return figures

    def _recipe_values(self, run: RunDirectory) -> tuple[dict[str, Any], str]:
        """As the file has them, whatever version wrote it; and why it has none."""
        with contextlib.suppress(OSError):
            changed_at = run.recipe.stat().st_mtime_ns
            with self._lock:
                known = self._recipes.get(run.path)
            if known is None or known[0] != changed_at:
                known = (changed_at, *_raw_recipe(run.recipe))
                with self._lock:
                    self._recipes[run.path] = known
            return known[1:]
        return {}, "recipe.yaml cannot be read"


def state_of(run: RunDirectory) -> RunState:
    if is_held(run.path / ".lock"):
        return "running"
    return "finished" if run.summary.is_file() else "stopped"


def is_held(lock: Path) -> bool:
    """Whether a process holds a run's lock. Asking takes it for a moment, which `RunDirectory.lock` knows."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def readable_recipe(run: RunDirectory) -> tuple[Recipe | None, str]:
    """The recipe, or why this version cannot read it. Rewards are recorded: their function need not be there any more."""
    from lightning_rl.recipe import load_recipe

    try:
        check(run.recipe.read_text(encoding="utf-8"))
        return load_recipe(run.recipe, ["reward.function=null"], recorded=True), ""
    except (LightningError, SystemExit, *UNREADABLE) as error:
        return None, f"this version cannot read the recipe: {_in_short(error)}"


def fields(resolved: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, str]:
    """Every field by its dotted name, as JSON: as it was written, or else as it is resolved."""
    return _leaves(resolved) | _leaves(written)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= _leaves(value, f"{name}.")
        else:
            found[name] = json.dumps(value, ensure_ascii=False, default=str)
    return found


def _formula(recipe: Recipe) -> str:
    from trainers.objective import objective

    return "\n".join(f"{part.what}: {part.words}" for part in objective(recipe))


def _raw_recipe(path: Path) -> tuple[dict[str, Any], str]:
    try:
        values = plain(path.read_text(encoding="utf-8"))
        fields({}, values if isinstance(values, dict) else {})
    except UNREADABLE as error:
        return {}, f"recipe.yaml cannot be read: {_in_short(error)}"
    return (values, "") if isinstance(values, dict) else ({}, "recipe.yaml is no recipe")


def _scores(evaluations: list[Evaluation], summary: Mapping[str, Any]) -> dict[str, tuple[float, list[float]]]:
    """Success by what was measured, with its interval; a summary's where the figures have none."""
    scores = {each.label: (each.success, each.ci95) for each in evaluations}
    for name, value in summary.items():
        label = "eval" if name == "success" else name.removeprefix("success_")  # the first is of `lrl eval`
        if name.startswith("success") and label not in scores and isinstance(value, dict):
            success, ends = value.get("value"), value.get("ci95")
            if is_number(success):
                is_interval = isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends))
                scores[label] = (float(success), [float(end) for end in ends or ()] if is_interval else [])
    return scores


def _stages(run: RunDirectory, series: Mapping[str, list[float | None]]) -> dict[str, float]:
    seconds = _read_json(run.seconds)
    if not seconds:
        seconds = {
            name.removeprefix("seconds."): sum(value or 0.0 for value in values)
            for name, values in series.items()
            if name.startswith("seconds.")
        }
    return {name: float(value) for name, value in seconds.items() if is_number(value)}


def _recorded_entry(place: Place) -> RunEntry:
    files = [] if place.folder is None else list(_store_files(place.folder))
    if isinstance(place.database, Path):
        files = [place.database, place.database.with_name(f"{place.database.name}-wal")]
    changed_at = max(map(_modified, files), default=0.0)
    return RunEntry(
        key=place.key,
        name=place.name,
        path=shown(place.folder) if place.folder else place.name,
        state="recorded",
        started_at=_modified(files[0]) if files else 0.0,
        updated_at=changed_at,
        model="",
        seed=None,
        steps=None,
        steps_done=0,
        success={},
        success_ci95={},
        note=_store_note(files[0]) if files else "",
    )


def _unread_entry(place: Place, note: str) -> RunEntry:
    return RunEntry(
        key=place.key,
        name=place.name,
        path=shown(place.folder) if place.folder else place.name,
        state="stopped" if place.directory else "recorded",
        started_at=0.0,
        updated_at=0.0,
        model="",
        seed=None,
        steps=None,
        steps_done=0,
        success={},
        success_ci95={},
        note=note,
    )


def _without_figures(entry: RunEntry) -> RunDetail:
    return RunDetail(
        entry=entry,
        steps=[],
        series={},
        every=1,
        advantage_edges=[],
        advantage_counts=[],
        evaluations=[],
        stages={},
        recipe={},
        formula="",
    )


def _store_note(path: Path) -> str:
    """A file of another version is not opened for the list: its header says so."""
    try:
        with path.open("rb") as file:
            header = file.read(_USER_VERSION.stop)
    except OSError:
        return ""
    version = int.from_bytes(header[_USER_VERSION], "big")
    if version > SCHEMA_VERSION:
        return f"its episodes were recorded by a newer version of Lightning RL (store {version}, here {SCHEMA_VERSION})"
    if 0 < version < SCHEMA_VERSION:
        return f"its episodes were recorded by an earlier version (store {version}): {BROUGHT_UP_TO_DATE}"
    return ""


def _store_files(folder: Path) -> tuple[Path, Path]:
    return folder / DATABASE, folder / f"{DATABASE}-wal"


def _noted(entry: RunEntry, note: str) -> RunEntry:
    import msgspec

    return msgspec.structs.replace(entry, note="; ".join(filter(None, (entry.note, note))))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except UNREADABLE:
        return {}
    return value if isinstance(value, dict) else {}


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _at(values: Mapping[str, Any], section: str, name: str) -> Any:
    inside = values.get(section)
    return inside.get(name) if isinstance(inside, dict) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST else None


def _in_short(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:LONGEST_NAME] or type(error).__name__
