"""The thread that keeps an index up with its store: first what a list shows of all episodes, then, episode by episode and the
latest first, what takes reading them: agents, versions, words.

It shares the machine with a training run, so it rests as long as it works; and it works in short bursts, so that whoever asks
for a page meanwhile waits for no more than one.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from sqlalchemy import Connection

from lightning_rl.errors import StoreError
from lightning_rl.store import Store
from lightning_rl.store.browsing import first_episode, latest, listing, number_of_episodes, recorded_since, said
from trainers.viewer.index.cache import Cache, Part
from trainers.viewer.index.columns import Columns, Rows
from trainers.viewer.index.odd import each
from trainers.viewer.index.words import LONGEST_TEXT, Read, read

EARLY = 100
"""So many of the latest are to be had before all are known."""
_EARLY_S = 0.8
"""For so long a browser that was given those has the machine for itself, to show them."""
_PIECE = 5000
_BURST_EPISODES, _BURST_CALLS = 16, 200
_KEPT_S, _KEPT = 1.0, 1000
_RETRY_S = 5.0
_REFRESHED_S = 1.0
_CLOSING_S = 5.0
_MAX_RENEWALS = 5
_REST = 1.0
"""How long it rests for each second that it works."""
logger = logging.getLogger("lrl.viewer")


class Reader:
    """Fills `columns`, which are to be touched only while `lock` is held."""

    def __init__(self, store: Store, cache_dir: Path | None, is_current: Callable[[], bool]) -> None:
        self.columns = Columns()
        self.lock = threading.RLock()
        self.early: Columns | None = None
        """The latest, the last first; it does not change."""
        self.total = 0
        self.has_early = threading.Event()
        self.has_all = threading.Event()
        self.failure: StoreError | None = None
        """Why not all are known yet: it is tried again."""
        self.search_failure: StoreError | None = None
        """Why episodes cannot be searched by text as long as this is open."""
        self.cache: Cache | None = None
        """None as long as the store is empty."""
        self._store = store
        self._is_current = is_current
        self._cache_dir = cache_dir
        self._mark = 0
        self._refreshing = threading.Lock()
        self._refresh_at = 0.0
        self._is_damaged = False
        self._renewals = 0
        self._stopped = threading.Event()
        self._wanted = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lrl-viewer-index", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Whoever waits is told at once. Returns at once, too."""
        self._stopped.set()
        self._wanted.set()

    def close(self) -> None:
        self.stop()
        self._thread.join(_CLOSING_S)
        if self.cache is not None and not self._thread.is_alive():  # one that waits for a server ends with the process
            self.cache.close()

    def wait(self, known: threading.Event) -> None:
        """For `has_early` or `has_all`. Raises StoreError if it will not come."""
        while not known.wait(0.1):
            if self._stopped.is_set() or not self._thread.is_alive():
                raise StoreError(f"{self._store.place} is being closed")
            if self.failure is not None:
                raise _again(self.failure)

    def find(self, words: Iterable[str]) -> Rows:
        """Documents in which these words are. Raises StoreError where they cannot be searched."""
        if self.search_failure is not None:
            raise _again(self.search_failure)
        try:
            return np.empty(0, np.int64) if self.cache is None else self.cache.find(words)
        except sqlite3.Error as error:
            self._is_damaged = True
            self._wanted.set()
            raise StoreError(
                f"episodes cannot be searched by text now: {error}",
                hint="what was read for it is damaged and is being read again: ask again in a moment",
            ) from error

    def refresh(self) -> None:
        """See what was recorded since; at most once a second, and less often where it takes long."""
        if time.monotonic() < self._refresh_at or not self._refreshing.acquire(blocking=False):
            return
        try:
            began = time.monotonic()
            self._catch_up()
            now = time.monotonic()
            self._refresh_at = now + max(_REFRESHED_S, 20 * (now - began))
        finally:
            self._refreshing.release()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                if not self.has_all.is_set():
                    self._open()
                self._read_on()
            except sqlite3.Error as error:  # of the cache: the store's are StoreErrors
                logger.warning("what was read for the list of episodes is lost, and read again: %s", error)
                self._renew(error)
            except StoreError as error:
                logger.warning("%s", error)
                self._fail(error)
            except Exception as error:
                logger.exception("the episodes of %s cannot be listed", self._store.place)
                self._fail(
                    StoreError(
                        f"the episodes of {self._store.place} cannot be listed: {error!r}",
                        hint="what happened is in the terminal of `lrl ui`; it is tried again",
                    )
                )

    def _fail(self, failure: StoreError) -> None:
        self.failure = failure
        self.has_early.set()
        self._stopped.wait(_RETRY_S)

    def _open(self) -> None:
        self.total = self._store.read(number_of_episodes)
        if self.total > _PIECE:
            early = Columns()
            self._list(self._store.read(lambda connection: latest(connection, EARLY)), early)
            self.early = early
            self.has_early.set()
            self._stopped.wait(_EARLY_S)
        with self._refreshing:
            self._catch_up()
        if not self._stopped.is_set():
            self.failure = None
            self.has_all.set()
            self.has_early.set()

    def _catch_up(self) -> None:
        mark = self._mark
        news = self._store.read(lambda connection: recorded_since(connection, mark))
        if self.cache is None and news.ids:
            self._take_over(news.ids)
        with self.lock:
            fresh = [id for id in news.ids if id not in self.columns.row_of]
            running = self.columns.ids_running()
        for piece in _pieces(fresh + running):
            if self._stopped.is_set():
                return
            self._list(piece, self.columns)
        self._mark = news.mark
        self._wanted.set()

    def _list(self, ids: Sequence[str], columns: Columns) -> None:
        def put(some: Sequence[str]) -> None:
            found = self._store.read(lambda connection: listing(connection, some))
            with self.lock:
                columns.put(found)

        each(ids, put, self._not_listed)

    def _not_listed(self, id: str, error: Exception) -> None:
        logger.warning("episode %s of %s is damaged and not listed: %r", id, self._store.place, error)

    def _not_read(self, id: str, error: Exception) -> None:
        what = "damaged: it is listed without agents and versions, and no text finds it"
        logger.warning("episode %s of %s is %s: %r", id, self._store.place, what, error)

    def _take_over(self, ids: Sequence[str]) -> None:
        """What is known of the store from before."""
        first = self._store.read(first_episode)
        try:
            self.cache = Cache(self._cache_dir, repr((self._store.place, first)))
            try:
                for part in self.cache.known(ids, _PIECE):
                    self._put(part)
            except sqlite3.Error:
                self.cache.renew()
                with self.lock:
                    self.columns.forget_read()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"what is read of {self._store.place} can be kept nowhere: {error}",
                hint="free some space on the disk, or set TMPDIR to a folder that you may write to",
            ) from error

    def _put(self, part: Part) -> None:
        with self.lock:
            self.columns.put(part.listing)
            self.columns.put_read(
                part.listing.id,
                agents=part.agents,
                low=part.low,
                high=part.high,
                documents=part.documents,
                is_last=True,
            )

    def _read_on(self) -> None:
        pending: dict[str, _ReadEpisode] = {}
        kept_at = time.monotonic()
        while not self._stopped.is_set():
            if self._is_damaged:
                raise sqlite3.DatabaseError("a search failed")
            if not self._is_current():
                self._stopped.wait()
                return
            began = time.monotonic()
            ids = self._next(pending)
            if pending and (not ids or len(pending) >= _KEPT or began > kept_at + _KEPT_S):
                self._keep(pending)
                pending, kept_at = {}, time.monotonic()
            elif ids:
                pending |= self._read(ids)
            else:
                self._wanted.wait()
                self._wanted.clear()
                continue
            self._stopped.wait(_REST * (time.monotonic() - began))

    def _read(self, ids: Sequence[str]) -> dict[str, _ReadEpisode]:
        found = dict.fromkeys(ids, (True, Read([], 1, 0, set())))
        each(
            ids,
            lambda some: found.update(self._store.read(lambda connection: _read(connection, some))),
            self._not_read,
        )
        return found

    def _next(self, pending: dict[str, _ReadEpisode]) -> list[str]:
        with self.lock:
            ids = [id for id in self.columns.unread(len(pending) + _BURST_EPISODES) if id not in pending]
            calls = 0
            for at, id in enumerate(ids):
                calls += int(self.columns["calls"][self.columns.row_of[id]])
                if at and calls > _BURST_CALLS:
                    return ids[:at]
        return ids

    def _keep(self, pending: dict[str, _ReadEpisode]) -> None:
        assert self.cache is not None
        with self.lock:
            over = [id for id, (is_over, _) in pending.items() if is_over and self.columns.is_over(id)]
            of_over = self.columns.listing(over)
        order = over + [id for id in pending if id not in set(over)]
        found = [pending[id][1] for id in order]

        def part(documents: list[int]) -> Part:
            known = found[: len(over)]
            return Part(
                listing=of_over,
                agents=[of_one.agents for of_one in known],
                low=[of_one.low for of_one in known],
                high=[of_one.high for of_one in known],
                documents=documents[: len(over)],
            )

        if self.search_failure is None:
            documents = self.cache.add([of_one.words for of_one in found], part)
        else:
            documents = [self.columns.row_of[id] + 1 for id in order]  # any: nothing is searched
        running = found[len(over) :]
        with self.lock:
            self.columns.put_read(
                order[len(over) :],
                agents=[of_one.agents for of_one in running],
                low=[of_one.low for of_one in running],
                high=[of_one.high for of_one in running],
                documents=documents[len(over) :],
                is_last=False,
            )
        for added in self.cache.news() if self.search_failure is None else [part(documents)]:
            self._put(added)

    def _renew(self, error: sqlite3.Error) -> None:
        """A few times: what goes on failing is not the file's fault, and the list goes on without it."""
        assert self.cache is not None
        self._renewals += 1
        try:
            if self._renewals > _MAX_RENEWALS:
                raise error
            self.cache.renew()
        except (OSError, sqlite3.Error) as reason:
            logger.warning("episodes cannot be searched by text: %s", reason)
            self.search_failure = StoreError(
                f"episodes cannot be searched by text: {reason}",
                hint="see that the disk has space and works, for what is kept of runs and for TMPDIR; then start `lrl ui` anew",
            )
        self._is_damaged = False
        with self.lock:
            self.columns.forget_read()


_ReadEpisode = tuple[bool, Read]
"""Whether it was over."""


def _read(connection: Connection, ids: Sequence[str]) -> dict[str, _ReadEpisode]:
    return {found.id: (found.is_over, read(found)) for found in said(connection, ids, LONGEST_TEXT)}


def _again(failure: StoreError) -> StoreError:
    """For another thread."""
    return StoreError(str(failure), hint=failure.hint)


def _pieces(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[at : at + _PIECE] for at in range(0, len(ids), _PIECE))
