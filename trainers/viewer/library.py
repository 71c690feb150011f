"""The stores that the viewer has open: for reading only, opened when somebody asks, and a few at a time."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_rl.errors import LightningError, StoreError
from lightning_rl.store.sqlite import log_of
from trainers.viewer.opened import OpenRun
from trainers.viewer.places import Place, Shelf
from trainers.viewer.runs import readable_recipe

if TYPE_CHECKING:
    from trainers.viewer.index import EpisodeIndex

MOST_OPEN = 3
_FAILED, _LONGEST_FAILED_S = 5.0, 30.0
"""A store that cannot be opened is tried again after so many times the seconds that it took to fail."""
Identity = tuple[int, ...]


class NotThere(LightningError):
    """Something that was asked for by name."""


@dataclass
class Book:
    """A run whose store is open."""

    run: OpenRun
    index: EpisodeIndex
    identity: Identity | None
    """Of the store's file: another one may have come in its place, or a run that writes to it."""
    readers: int = 0
    is_stale: bool = False

    def close(self) -> None:
        self.index.close()
        self.run.store.close()


@dataclass
class Library:
    """Threads may share it. What nobody reads is closed when something else is opened."""

    shelf: Shelf
    cache: Path | None
    """Folder for what indexes know; None: for this process only."""
    _open: OrderedDict[str, Book] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _opening: dict[str, threading.Lock] = field(default_factory=dict)
    _failed: dict[str, tuple[float, StoreError]] = field(default_factory=dict)
    """By key until when the store is held for one that cannot be opened, and why."""
    _stopped: bool = False

    def place(self, key: str) -> Place:
        """Raises NotThere."""
        place = self.shelf.places().get(key)
        if place is None:
            raise NotThere(
                f"there is no run {key}", hint="it may have been moved or deleted; the runs that are there: #/"
            )
        return place

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[Book]:
        """Raises NotThere, and StoreError for a store that cannot be opened."""
        place = self.place(key)
        book = self._borrow(key, place)
        try:
            yield book
        finally:
            self._give_back(book)

    def stop(self) -> None:
        """No more is read: requests that wait for it fail at once, and so do those that come later. Returns at once."""
        with self._lock:
            self._stopped = True
            books = list(self._open.values())
        for book in books:
            book.index.stop()

    def close(self) -> None:
        self.stop()
        with self._lock:
            books = list(self._open.values())
            self._open.clear()
        for book in books:
            book.close()

    def open_early(self, key: str) -> None:
        """Somebody will ask for it. What is wrong with it is said then."""
        with contextlib.suppress(LightningError), self.reading(key):
            pass

    def _borrow(self, key: str, place: Place) -> Book:
        with self._lock:
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:  # two that ask for a run at once open it once
            self._must_open(key)
            store = place.store
            identity = _identity(store)
            with self._lock:
                book = self._open.get(key)
                if book is not None and book.identity == identity:
                    self._open.move_to_end(key)
                    book.readers += 1
                    return book
            book = self._opened(key, place, store, identity)
            with self._lock:
                if self._stopped:
                    book.index.stop()
                before = self._open.pop(key, None)
                self._open[key] = book
                book.readers += 1
                gone = self._no_longer_wanted(before)
        for other in gone:
            other.close()
        return book

    def _must_open(self, key: str) -> None:
        with self._lock:
            until, failure = self._failed.get(key, (0.0, None))
            if self._stopped:
                raise StoreError("the viewer is being closed")
        if failure is not None and time.monotonic() < until:
            raise StoreError(str(failure), hint=failure.hint)

    def _opened(self, key: str, place: Place, store: Path | str, identity: Identity | None) -> Book:
        from lightning_rl.store import Store
        from trainers.viewer.index import EpisodeIndex

        directory = place.directory
        recipe, note = readable_recipe(directory) if directory else (None, "")
        began = time.monotonic()
        try:
            opened = Store.open(store, create=False, upgrade=False)
        except StoreError as error:
            now = time.monotonic()
            with self._lock:
                self._failed[key] = now + min(_FAILED * (now - began), _LONGEST_FAILED_S), error
            raise
        try:
            index = EpisodeIndex(opened, self.cache, lambda: _identity(store) == identity)
        except BaseException:
            opened.close()
            raise
        return Book(OpenRun(key, opened, directory, recipe, note), index, identity)

    def _no_longer_wanted(self, replaced: Book | None) -> list[Book]:
        """To be closed: nobody reads them."""
        gone = []
        if replaced is not None:
            replaced.is_stale = True
            if not replaced.readers:
                gone.append(replaced)
        idle = [key for key, book in self._open.items() if not book.readers]
        for key in idle[: max(len(self._open) - MOST_OPEN, 0)]:
            gone.append(self._open.pop(key))
        return gone

    def _give_back(self, book: Book) -> None:
        with self._lock:
            book.readers -= 1
            is_over = book.is_stale and not book.readers
        if is_over:
            book.close()


def cache_folder() -> Path | None:
    """Where programs keep what they can make again; None where nothing can be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-rl" / "viewer"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _identity(store: Path | str) -> Identity | None:
    """One that nobody has open is read as if it never changed (`store.sqlite`): its size and time are of it."""
    if isinstance(store, str) and "://" in store:
        return None
    try:
        status = Path(store).stat()
        file = status.st_dev, status.st_ino
        return file if log_of(Path(store)).exists() else (*file, status.st_size, status.st_mtime_ns)
    except OSError:
        return None
