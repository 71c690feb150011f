"""Trace files: episodes on their way from one machine or tool to another, to the bit (docs/traces.md has the format).

The suffix says which of two forms a file has: JSON Lines (`.jsonl`, `.jsonl.gz`), a header and one line for each episode; or
Parquet (`.parquet`), one row for each. Both are written and read episode by episode, in constant memory. A file appears only
when it is complete. What a reader does not know is refused by name, never dropped.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lightning_rl.episode import Episode
from lightning_rl.errors import LightningError, StoreError, TraceFileError
from lightning_rl.trace_file.records import FORMAT, VERSION, Header, episode_of, header_of

if TYPE_CHECKING:
    from lightning_rl.store import Store

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


def write_traces(path: Path, episodes: Iterable[Episode], count: int | None = None) -> int:
    """How many were written. `count`, where it is known before, lets a reader notice that lines are missing.

    Raises TraceFileError; what was at `path` before is then still there.
    """
    kind = _kind(path)
    partial = path.with_name(f".{path.name}.partial")
    counted = itertools.count()
    numbered = (episode for episode, _ in zip(episodes, counted, strict=False))
    try:
        if kind == ".parquet":
            from lightning_rl.trace_file.parquet import write_parquet

            write_parquet(partial, numbered)
        else:
            _write_lines(partial, numbered, count, compressed=kind == ".jsonl.gz")
        partial.replace(path)
    except OSError as error:
        raise TraceFileError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return next(counted)


def read_traces(path: Path) -> Iterator[Episode]:
    """The episodes of a file, in its order. Raises TraceFileError where something is wrong, after what comes before it."""
    return (episode for _, episode in numbered_traces(path))


def numbered_traces(path: Path) -> Iterator[tuple[str, Episode]]:
    """The episodes, and where each one stands, for messages."""
    if _kind(path) == ".parquet":
        from lightning_rl.trace_file.parquet import read_parquet

        return read_parquet(path)
    return _read_lines(path)


def export_traces(
    store: Store, path: Path, *, phase: str | None = None, step: int | None = None, counted_only: bool = False
) -> int:
    """Write a store's episodes, in their order. How many there are."""
    ids = store.episode_ids(phase=phase, step=step, counted_only=counted_only)
    return write_traces(path, map(store.episode, ids), len(ids))


def import_traces(path: Path, store: Store) -> int:
    """Add a file's episodes to a store, one transaction each; importing once more changes nothing. How many there are.

    Raises TraceFileError with the place in the file; the episodes before it have been imported.
    """
    number = 0
    for place, episode in numbered_traces(path):
        try:
            store.add_episode(episode)
        except StoreError as error:
            raise TraceFileError(f"{place}: {error}", hint=error.hint) from error
        number += 1
    return number


def _kind(path: Path) -> str:
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return suffix
    raise TraceFileError(
        f"{path} could be any kind of file", hint=f"the name of a trace file ends in {', '.join(SUFFIXES)}"
    )


def _write_lines(path: Path, episodes: Iterable[Episode], count: int | None, *, compressed: bool) -> None:
    with gzip.open(path, "wt", 6, encoding="ascii") if compressed else path.open("w", encoding="ascii") as file:
        file.write(json.dumps(header_of(count)) + "\n")
        for episode in episodes:
            try:
                line = json.dumps(msgspec.to_builtins(episode), separators=(",", ":"))
            except (TypeError, ValueError, RecursionError) as error:
                raise TraceFileError(f"episode {episode.id} cannot be written as JSON: {error}") from error
            file.write(line + "\n")


def _read_lines(path: Path) -> Iterator[tuple[str, Episode]]:
    with _reading(path) as lines:
        header = _header(path, next(lines, None))
        number = 0
        for number, line in enumerate(lines, start=1):
            place = f"{path}, line {number + 1}"
            yield place, episode_of(_parsed(place, line), place)
    if header.episodes not in (None, number):
        raise TraceFileError(
            f"{path} has {number} episodes, and its first line says {header.episodes}",
            hint="lines were lost; copy the file again",
        )


@contextmanager
def _reading(path: Path) -> Iterator[Iterator[bytes]]:
    """The lines of the file, decompressed."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield iter(file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceFileError(f"{path} is cut off or damaged: {error}", hint="copy the file again") from error
    except OSError as error:
        raise TraceFileError(f"cannot read {path}: {error.strerror or error}") from error


def _header(path: Path, line: bytes | None) -> Header:
    place = f"{path}, line 1"
    try:
        return Header.of(_parsed(place, line or b""), place)
    except LightningError as error:
        hint = error.hint or f'a trace file begins with {{"format": "{FORMAT}", "version": {VERSION}}}'
        raise TraceFileError(str(error), hint=hint) from error


def _parsed(place: str, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceFileError(f"{place} is not JSON: {error}", hint="the line is damaged or cut off") from error
