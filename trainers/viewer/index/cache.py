"""What the index has read of a store, kept in a file of our own, so that it is read once only.

`parts` has episodes that are over, in columns, as they were found; `words` (FTS5) what each is found by. Only words are there,
no texts. A document is never changed: an episode that is read again gets another number, and the old one means nothing any
more. So several viewers can use a file at once, each taking over what the others have read. It is disposable: a file that is
damaged, of another version or of another store is made anew; one that cannot be made is made elsewhere, for as long as the
viewer runs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from lightning_rl.store.browsing import Listing

P = TypeVar("P")
VERSION = 1
UNUSED_DAYS = 30
BUSY_SECONDS = 10
_TABLES = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS parts (number INTEGER PRIMARY KEY, part BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS documents (next INTEGER NOT NULL);
INSERT INTO documents SELECT 1 WHERE NOT EXISTS (SELECT * FROM documents);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5 (
    of_episode, content = '', columnsize = 0, detail = none, tokenize = 'ascii', prefix = '1 2 3'
);
PRAGMA user_version = {VERSION};
COMMIT;
"""
_PRAGMAS = ("journal_mode = WAL", "synchronous = OFF", "temp_store = MEMORY", "cache_size = -8000")
logger = logging.getLogger("lrl.viewer")


class Part(Struct, frozen=True, kw_only=True):
    """Episodes that are over, and what was read of them."""

    listing: Listing
    agents: list[list[str]]
    low: list[int]
    high: list[int]
    documents: list[int]


class _Ids(Struct):
    id: list[str]


class _IdsOfPart(Struct):
    """Of a `Part` no more than the ids: the rest is passed over."""

    listing: _Ids


def together(parts: Sequence[Part], order: Sequence[str]) -> Part:
    """One part of many, in this order of ids, others left out; of an episode that is in several what the last says."""
    ids = [id for part in parts for id in part.listing.id]
    place = {id: at for at, id in enumerate(ids)}
    chosen = [place[id] for id in order if id in place]

    def joined(lists: Iterable[list[Any]]) -> list[Any]:
        flat = list(itertools.chain.from_iterable(lists))
        return [flat[at] for at in chosen]

    listing = {name: joined(getattr(part.listing, name) for part in parts) for name in Listing.__struct_fields__}
    read = {name: joined(getattr(part, name) for part in parts) for name in Part.__struct_fields__ if name != "listing"}
    return Part(listing=Listing(**listing), **read)


class Cache:
    """Searched by many threads, written by one. All methods raise sqlite3.Error for a file that is damaged."""

    def __init__(self, folder: Path | None, identity: str) -> None:
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._searching = threading.Lock()
        self._seen = 0
        self._writer: sqlite3.Connection
        self._reader: sqlite3.Connection
        name = f"{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.db"
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                _remove_unused(folder)
                self._open(folder / name)
                return
            except (OSError, sqlite3.Error) as error:
                logger.warning("what is read for the list of episodes cannot be kept in %s: %s", folder, error)
        self._temporary = tempfile.TemporaryDirectory(prefix="lrl-viewer-", ignore_cleanup_errors=True)
        self._open(Path(self._temporary.name) / name)

    def news(self) -> list[Part]:
        """What was added, by whomever, since this was called last."""
        query = "SELECT number, part FROM parts WHERE number > ? ORDER BY number"
        rows = self._writer.execute(query, (self._seen,)).fetchall()
        parts = [_decoded(part, Part) for _, part in rows]
        self._seen = rows[-1][0] if rows else self._seen
        return parts

    def known(self, order: Sequence[str], at_once: int) -> Iterator[Part]:
        """All that is there, in this order of ids: so many at a time, since all at once would take a lot of memory."""
        part_of: dict[str, int] = {}
        for number, part in self._writer.execute("SELECT number, part FROM parts ORDER BY number"):
            part_of.update(dict.fromkeys(_decoded(part, _IdsOfPart).listing.id, number))
            self._seen = number
        there = [id for id in order if id in part_of]
        for start in range(0, len(there), at_once):
            piece = there[start : start + at_once]
            numbers = json.dumps(sorted({part_of[id] for id in piece}))
            query = "SELECT part FROM parts WHERE number IN (SELECT value FROM json_each(?)) ORDER BY number"
            yield together([_decoded(part, Part) for (part,) in self._writer.execute(query, (numbers,))], piece)

    def add(self, words: Sequence[set[str]], part: Callable[[list[int]], Part]) -> list[int]:
        """Make a document of each set of words; `part` is given their numbers, which are returned as well."""
        raw = self._writer
        raw.execute("BEGIN IMMEDIATE")
        try:
            (start,) = raw.execute("SELECT next FROM documents").fetchone()
            documents = list(range(start, start + len(words)))
            raw.execute("UPDATE documents SET next = next + ?", (len(words),))
            rows = zip(documents, map(" ".join, words), strict=True)
            raw.executemany("INSERT INTO words (rowid, of_episode) VALUES (?, ?)", rows)
            if (made := part(documents)).documents:
                raw.execute("INSERT INTO parts (part) VALUES (?)", (msgspec.msgpack.encode(made),))
            raw.execute("COMMIT")
        except BaseException:
            if raw.in_transaction:
                raw.execute("ROLLBACK")
            raise
        return documents

    def find(self, words: Iterable[str]) -> NDArray[np.int64]:
        """Documents in which all of the words begin a word."""
        expression = " AND ".join(f'"{word}" *' for word in words)
        with self._searching:  # one answer for all: each row would let go of the interpreter, and wait for it
            query = "SELECT group_concat(rowid) FROM words WHERE words MATCH ?"
            (found,) = self._reader.execute(query, (expression,)).fetchone()
        return np.fromstring(found or "", dtype=np.int64, sep=",")

    def renew(self) -> None:
        """Begin again with an empty file."""
        with self._searching:
            path = self._path
            self._close()
            _remove(path)
            self._open(path)

    def close(self) -> None:
        with self._searching:
            self._close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _open(self, path: Path) -> None:
        try:
            self._connect(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise
            _remove(path)
            self._connect(path)

    def _connect(self, path: Path) -> None:
        self._path = path
        self._seen = 0
        self._writer, self._reader = (
            sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False) for _ in range(2)
        )
        try:
            for raw in (self._writer, self._reader):
                for pragma in _PRAGMAS:
                    raw.execute(f"PRAGMA {pragma}")
            if self._writer.execute("PRAGMA user_version").fetchone()[0] not in (0, VERSION):
                raise sqlite3.DatabaseError("another version")
            self._writer.executescript(_TABLES)
            self._reader.execute("SELECT rowid FROM words WHERE words MATCH 'a' LIMIT 1").fetchone()
        except BaseException:
            self._close()
            raise
        os.utime(path)

    def _close(self) -> None:
        self._reader.close()
        self._writer.close()


def _decoded(part: bytes, kind: type[P]) -> P:
    try:
        return msgspec.msgpack.decode(part, type=kind)
    except msgspec.DecodeError as error:
        raise sqlite3.DatabaseError(str(error)) from error


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _remove_unused(folder: Path) -> None:
    """Files of stores that nobody has looked at for long."""
    for path in folder.glob("*.db"):
        if len(path.stem) == 32 and path.stat().st_mtime < time.time() - UNUSED_DAYS * 86400:
            _remove(path)
