"""`lrl traces html`: episodes and their run as one file, to be kept with a paper or sent to somebody."""

from __future__ import annotations

import argparse
import difflib
import secrets
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lightning_rl.errors import LightningError, StoreError

if TYPE_CHECKING:
    from trainers.viewer.file_answers import Chosen, Shown
    from trainers.viewer.library import Book
    from trainers.viewer.places import Place, Shelf

DESCRIPTION = """\
Write episodes into one file of HTML that any browser opens: the viewer itself, with the run's curves, conversations, tokens,
groups and credit in it. It needs no server and no network, and runs no script but its own. It appears when it is complete.

  lrl traces html runs/calculator --out calculator.html                    the latest 50 episodes
  lrl traces html runs/calculator train.3.train-0007.2.0 --out one.html    these, and nothing of others

Whoever has the file can read all that these episodes say."""
LIMIT = 50
T = TypeVar("T")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory, episode database (file or URL) or trace file")
    add("episode", nargs="*", metavar="EPISODE", help="ids (default: the latest)")
    add("--out", metavar="FILE", type=Path, required=True, help="the file to write")
    add("--limit", type=int, default=LIMIT, metavar="N", help="so many of the latest (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    from trainers.viewer import page_files
    from trainers.viewer.command import opened, require_extra
    from trainers.viewer.library import Library

    require_extra()
    if options.limit < 1:
        raise LightningError(f"--limit {options.limit}: at least one")
    if not page_files.is_built():
        raise LightningError(page_files.MISSING.splitlines()[0], hint=f"`{page_files.HOW}` builds it")
    if options.out.is_dir() or not options.out.name or not options.out.parent.is_dir():
        raise LightningError(
            f"cannot write {options.out}", hint="--out takes the name of a file, in a folder that is there"
        )
    with opened(options.run) as shelf:
        chosen = shelf.chosen
        if chosen is None:
            raise LightningError(f"{options.run} holds several runs: which one?", hint=_some(shelf))
        library = Library(shelf, cache=None)
        try:
            with library.reading(chosen) as book:
                ids = options.episode or _latest(book, options.limit)
                count = _write(options.out, library.place(chosen), book, ids)
        finally:
            library.close()
    size = options.out.stat().st_size
    print(f"{count} episode{'' if count == 1 else 's'} in {options.out}, {size / 1e6:.1f} MB")
    return 0


def _some(shelf: Shelf) -> str:
    names = [place.name for place in shelf.places().values()]
    return f"for instance {shelf.where}/{names[-1]}" if names else f"there is none in {shelf.where}"


def _latest(book: Book, limit: int) -> list[str]:
    from trainers.viewer.query import MOST_ROWS
    from trainers.viewer.records import EpisodeQuery

    ids: list[str] = []
    while len(ids) < limit:
        page = book.index.page(EpisodeQuery(offset=len(ids), limit=min(limit - len(ids), MOST_ROWS)))
        ids += [row.id for row in page.rows]
        if not page.rows:
            break
    if not ids:
        raise StoreError("there are no episodes yet")
    return ids


def _write(out: Path, place: Place, book: Book, ids: Sequence[str]) -> int:
    """How many episodes."""
    from trainers.viewer import page_files
    from trainers.viewer.file_answers import Chosen, askings, said
    from trainers.viewer.one_file import one_file

    asked = Chosen(book.index, frozenset(ids))
    read = (_read(book, asked, id) for id in _followed([*dict.fromkeys(ids)], "reading"))
    episodes = sorted(filter(None, read), key=lambda episode: episode.order)
    if not episodes:
        raise StoreError("none of these episodes can be read")
    chosen = Chosen(book.index, frozenset(episode.view.id for episode in episodes))
    answers = map(said, _followed([*askings(place, book, chosen, episodes)], "writing"))
    index, script, style = (page_files.page_file(page_files.FOLDER, name).body.decode() for name in page_files.KINDS)
    partial = out.with_name(f".{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            for part in one_file(index, script, style, (answer for answer in answers if answer is not None)):
                file.write(part)
        partial.replace(out)
    except OSError as error:
        raise LightningError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return len(episodes)


def _followed(entries: Sequence[T], doing: str) -> Iterable[T]:
    """With a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    return track(entries, doing, transient=True, console=Console(stderr=True), disable=not sys.stderr.isatty())


def _read(book: Book, chosen: Chosen, id: str) -> Shown | None:
    """None, and a word about it, for one that is damaged."""
    from trainers.viewer.file_answers import shown
    from trainers.viewer.library import NotThere

    try:
        return shown(book.run, chosen, id)
    except NotThere:
        store = book.run.store
        near = difflib.get_close_matches(id, store.episode_ids(), n=1)
        raise StoreError(
            f"there is no episode {id}",
            hint=f"did you mean {near[0]}?" if near else "`lrl traces list RUN` has the ids",
        ) from None
    except LightningError as error:
        print(f"episode {id} is left out: {error}", file=sys.stderr)
        return None
