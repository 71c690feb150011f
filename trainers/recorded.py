"""Recorded episodes, wherever they are: a run's directory, an episode database by file or URL, or a trace file. And the words of a
command line about them, which are relative to where the command is started."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_rl.errors import LightningError

if TYPE_CHECKING:
    from lightning_rl.store import Store
    from trainers.run_directory import RunDirectory

OF_FUNCTIONS = (("reward", "function"), ("train", "credit", "rule"))
"""Fields that name a function which a record is judged or credited by; their sections may be written short."""
SQLITE = b"SQLite format 3\0"


@dataclass(frozen=True)
class Recorded:
    store: Store
    run: RunDirectory | None
    """None for a database or a file."""


@contextlib.contextmanager
def open_recorded(source: str) -> Iterator[Recorded]:
    """A trace file is read into a store of its own, which is gone afterwards.

    Raises StoreError or TraceFileError for what cannot be read, ResumeError for what is none of them.
    """
    from lightning_rl.store import Store
    from lightning_rl.store.place import store_of
    from trainers.run_directory import open_run

    path = Path(source)
    if "://" in source or source.startswith("${") or _is_database(path):
        with Store.open(store_of(source), create=False) as store:
            yield Recorded(store, None)
    elif is_trace_file(source):
        from lightning_rl.trace_file import import_traces

        with (
            tempfile.TemporaryDirectory(prefix="lrl-recorded-") as folder,
            Store.open(Path(folder, "traces.db")) as store,
        ):
            import_traces(path, store)
            yield Recorded(store, None)
    else:
        run = open_run(path)
        with Store.open(store_of(run.path), create=False) as store:
            yield Recorded(store, run)


def is_trace_file(source: str) -> bool:
    """Or a file that is nothing of ours at all."""
    path = Path(source)
    return "://" not in source and not source.startswith("${") and path.is_file() and not _is_database(path)


def _is_database(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(SQLITE)) == SQLITE


def from_here(overrides: Sequence[str]) -> list[str]:
    """The overrides, with functions that they name found from the working folder: a recipe's own are relative to its file, and
    that of a run is in the run's folder. Others stay as they are, wrong ones too.

    Raises LightningError for a function that is not there.
    """
    return [_from_here(override) for override in overrides]


def _from_here(override: str) -> str:
    import yaml

    from lightning_rl.recipe.file import parse_value

    name, _, text = override.partition("=")
    place = tuple(name.strip().split("."))
    field = next((field for field in OF_FUNCTIONS if place in (field, field[:-1])), None)
    if field is None:
        return override
    try:
        value: Any = parse_value(text)
    except yaml.YAMLError:
        return override
    if isinstance(value, str) and ":" in value:
        return f"{name}={found(value, f'override {name}')}"
    key = field[-1]
    if place == field[:-1] and isinstance(value, dict) and isinstance(value.get(key), str) and ":" in value[key]:
        given = value | {key: found(value[key], f"override {name}")}
        return f"{name}={yaml.safe_dump(given, default_flow_style=True, sort_keys=False, width=2**31)}"
    return override


def found(reference: str, said_by: str) -> str:
    """The function, as it is found from any folder. Raises LightningError, naming the option that said it."""
    from lightning_rl.recipe.functions import resolve_reference

    try:
        return str(resolve_reference(reference, Path.cwd()))
    except ValueError as error:
        raise LightningError(f"{said_by}: {error}") from error
