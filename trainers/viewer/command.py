"""`lrl ui`: the viewer, as a local page."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_rl.errors import LightningError, MissingExtra

if TYPE_CHECKING:
    from trainers.viewer.places import Shelf

DESCRIPTION = """\
Look at runs in a browser: curves, episodes, conversations, tokens, credit. Live, and read-only.

  lrl ui                                  every run below runs/
  lrl ui runs/calculator                  its latest run, with the others beside it
  lrl ui traces.jsonl.gz                  a trace file; also an episode database, by file or URL
  lrl ui --host 0.0.0.0                   for others, too: the link has a token in it

On a machine elsewhere: lrl ui there, `ssh -L 7860:127.0.0.1:7860 MACHINE` here. docs/viewer.md says what is to be seen."""
PORT = 7860
_TOKEN = re.compile(r"[\w.~-]{8,}", re.ASCII)
"""What needs no quoting in addresses and cookies."""
NEEDED = ("numpy", "starlette", "tokenizers", "uvicorn")


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "run",
        nargs="?",
        metavar="RUN",
        help="run directory, folder of runs, episode database (file or URL) or trace file (default: runs/)",
    )
    add("--host", default="127.0.0.1", help="address to listen at; beyond loopback a token is required (%(default)s)")
    add("--port", type=int, help=f"0 takes any free one ({PORT}, or the next that is free)")
    add("--token", metavar="T", help="that a browser must show (default beyond loopback: a new one)")
    add("--no-open", action="store_true", help="print the link, open no browser")


def run(options: argparse.Namespace) -> int:
    require_extra()
    from rich.console import Console

    from trainers.recorded import is_trace_file
    from trainers.viewer import page_files
    from trainers.viewer.access import Access, needs_token, new_token
    from trainers.viewer.app import build_app
    from trainers.viewer.library import Library, cache_folder
    from trainers.viewer.serving import end_if_busy, listen, serve

    if options.token is not None and not _TOKEN.fullmatch(options.token):
        raise LightningError("--token takes at least 8 letters, digits and -._~")
    if options.port is not None and not 0 <= options.port <= 65535:
        raise LightningError(f"--port {options.port}: ports are 0 to 65535", hint="--port 0 takes any free port")
    with opened(options.run) as shelf:
        token = options.token or (new_token() if needs_token(options.host) else None)
        asked = options.port is not None
        listener = listen(options.host, options.port if asked else PORT, is_asked_for=asked)
        port = listener.getsockname()[1]
        links = [link(host, port, token, shelf.chosen) for host in reachable_at(options.host, listener.family)]
        console = Console(highlight=False, soft_wrap=True)

        def started() -> None:
            console.print(shelf.where or "runs", style="bold", end=" ", markup=False)
            console.print("at")
            for each in links:
                console.print(f"  {each}", markup=False)
            if not page_files.is_built():
                console.print(page_files.MISSING.splitlines()[0], f"`{page_files.HOW}` builds it.", markup=False)
            console.print("Ctrl-C ends it", style="dim")
            if not options.no_open and has_display():
                webbrowser.open(links[0])

        is_kept = options.run is None or not is_trace_file(options.run)
        library = Library(shelf, cache_folder() if is_kept else None)
        page_files.prepare()
        if shelf.chosen is not None:  # while the browser starts
            threading.Thread(
                target=library.open_early, args=(shelf.chosen,), name="lrl-viewer-early", daemon=True
            ).start()
        serve(build_app(library, Access(options.host, port, token)), listener, started, library.stop)
    end_if_busy()
    return 0


def require_extra() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(f"the viewer needs {', '.join(missing)}", hint="pip install 'lightning-rl[ui]'")


@contextlib.contextmanager
def opened(source: str | None) -> Iterator[Shelf]:
    """What RUN means; a trace file is read into a database that is gone afterwards."""
    from trainers.recorded import is_trace_file, open_recorded
    from trainers.viewer.places import recorded, shelf_of

    if source is None or not is_trace_file(source):
        yield shelf_of(source)
        return
    with open_recorded(source) as read:
        yield recorded(Path(source).name, Path(read.store.place))


def link(host: str, port: int, token: str | None, chosen: str | None) -> str:
    from urllib.parse import quote

    place = f"[{host}]" if ":" in host else host
    query = f"?token={quote(token, safe='')}" if token else ""
    return f"http://{place}:{port}/{query}" + (f"#/run/{quote(chosen, safe='')}" if chosen else "")


def reachable_at(host: str, family: int) -> Sequence[str]:
    """Names of this machine by which others may reach it, where it listens at all its addresses."""
    if host not in ("0.0.0.0", "::", ""):
        return [host]
    found = [socket.gethostname()]
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9) if family == socket.AF_INET else ("2001:db8::1", 9))  # sends nothing
        found.append(probe.getsockname()[0])
    return list(dict.fromkeys(found))


def has_display() -> bool:
    if not sys.stdout.isatty():
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


COMMANDS = {"ui": (DESCRIPTION, configure, run)}
