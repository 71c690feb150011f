"""What `lrl ui RUN` means, and which runs there are: found by looking, as often as somebody asks, since runs come and go.

A run has a recipe; a folder, or a database, without one holds recorded episodes. Folders are looked through two levels deep, as
runs lie in `runs/<name>/<time>`; links are passed over, so that a run is found once.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_rl.errors import LightningError, StoreError
from lightning_rl.store.place import DATABASE, NOTE, store_of
from trainers.run_directory import RunDirectory, open_run

RUNS = Path("runs")
RECIPE = "recipe.yaml"
_DEEPEST = 2
_TIME = re.compile(r"\d{8}-\d{6}(-\d+)?")
"""How `create_run` names a run."""


@dataclass(frozen=True)
class Place:
    """Where a run, or episodes without one, are."""

    key: str
    name: str
    folder: Path | None
    """None for a database that was named itself."""
    database: Path | str | None = None
    """The one that was named; None: the folder's own."""

    @property
    def directory(self) -> RunDirectory | None:
        """None without a recipe."""
        if self.folder is None or not (self.folder / RECIPE).is_file():
            return None
        return RunDirectory(self.folder)

    @property
    def store(self) -> Path | str:
        """Raises StoreError where there is none yet."""
        if self.database is not None:
            return self.database
        assert self.folder is not None
        try:
            return store_of(self.folder)
        except (OSError, ValueError) as error:
            raise StoreError(f"{shown(self.folder / NOTE)} cannot be read: {error}") from error


@dataclass(frozen=True)
class Shelf:
    """All that can be looked at: what was named itself, and the runs below a folder."""

    named: Place | None
    """The one that the viewer was started for."""
    folder: Path | None

    def places(self) -> dict[str, Place]:
        """By key. All that would have the same one have where they are in it, too, whichever was found first."""
        below = map(_place, _runs_below(self.folder)) if self.folder else ()
        by_folder: dict[Path | None, Place] = {}
        for place in (*filter(None, [self.named]), *below):
            by_folder.setdefault(place.folder, place)
        often = Counter(place.key for place in by_folder.values())
        told_apart = (
            place if often[place.key] == 1 else replace(place, key=f"{place.key}-{_digest(str(place.folder))}")
            for place in by_folder.values()
        )
        return {place.key: place for place in told_apart}

    @property
    def chosen(self) -> str | None:
        """Key of the one that was named."""
        return next(iter(self.places())) if self.named else None

    @property
    def where(self) -> str:
        return shown(self.folder) if self.folder else self.named.name if self.named else ""


def shelf_of(source: str | None) -> Shelf:
    """What RUN of a command line means, but for trace files. Raises LightningError for what is no run and holds none."""
    if source is None:
        return Shelf(named=None, folder=RUNS)
    path = Path(source)
    if "://" in source or source.startswith("${") or path.is_file():
        return Shelf(named=_named(source), folder=None)
    run = _run_of(path)
    if run is not None:
        place = _place(run)
        above = run.parents[len(place.name.split("/")) - 1]
        return Shelf(named=place, folder=above)
    if path.is_dir():
        return Shelf(named=None, folder=path)
    raise LightningError(
        f"{source} is neither a run, nor a folder of runs, nor an episode database, nor a trace file",
        hint="runs are listed by `ls runs/*/`; `lrl ui` alone shows all of them",
    )


def recorded(name: str, database: Path) -> Shelf:
    """The episodes of a trace file, which were read into a database."""
    return Shelf(named=Place(key=_slug(name), name=name, folder=None, database=database), folder=None)


def shown(path: Path) -> str:
    """As the user would write it."""
    with contextlib.suppress(ValueError):
        return str(path.absolute().relative_to(Path.cwd()))
    return str(path)


def _named(source: str) -> Place:
    from lightning_rl.store.engine import database_at

    if "://" not in source and not source.startswith("${"):
        return Place(key=_slug(Path(source).stem), name=source, folder=None, database=Path(source).absolute())
    name = database_at(source, create=False).place  # without secrets
    return Place(key=f"database-{_digest(name)}", name=name, folder=None, database=source)


def _run_of(path: Path) -> Path | None:
    """By its folder, by the folder of its name (the latest), or by a name under `runs/`."""
    for candidate in (path, path / "latest"):
        if _is_run(candidate):
            return candidate.resolve()
    if path.is_dir() or path.is_absolute():
        return None
    with contextlib.suppress(LightningError):
        return open_run(path).path
    return None


def _place(folder: Path) -> Place:
    is_one_of_several = _TIME.fullmatch(folder.name) or (folder.parent / "latest").exists()
    parts: Sequence[str] = folder.parts[-2:] if is_one_of_several else folder.parts[-1:]
    return Place(key=_slug(".".join(parts)), name="/".join(parts), folder=folder)


def _runs_below(folder: Path, depth: int = 1) -> Iterator[Path]:
    try:
        children = sorted(child for child in folder.resolve().iterdir() if not child.name.startswith("."))
    except OSError:
        return
    for child in children:
        if child.is_symlink() or not child.is_dir():
            continue
        if _is_run(child):
            yield child
        elif depth < _DEEPEST:
            yield from _runs_below(child, depth + 1)


def _is_run(folder: Path) -> bool:
    try:
        return any((folder / name).is_file() for name in (RECIPE, DATABASE, NOTE))
    except OSError:
        return False


def _slug(text: str) -> str:
    """What an address can hold without being written otherwise."""
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip(".-") or "run"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=3).hexdigest()
