"""Where the episodes of a run are: in its own file, or in a schema of its own in a database that the recipe names.

The database's URL is noted in the run's directory, as the recipe has it: with `${NAME}` for what is secret.
"""

from __future__ import annotations

import hashlib
import re
import socket
from pathlib import Path

from lightning_rl.errors import StoreError

DATABASE = "episodes.db"
NOTE = "episodes.url"


def settle_store(run: Path, url: str | None) -> Path | str:
    """The place for the run's episodes, the same ever after. `url` is the recipe's, None for a file."""
    note = run / NOTE
    if note.exists():
        return note.read_text(encoding="utf-8").strip()
    if url is None:
        return run / DATABASE
    from lightning_rl.store.postgres import run_url

    where = hashlib.blake2b(f"{socket.gethostname()}:{run.resolve()}".encode(), digest_size=3).hexdigest()
    name = re.sub(r"[^\w.-]", "-", f"{run.parent.name[:32]}.{run.name[:20]}", flags=re.ASCII)
    place = run_url(url, f"{name}-{where}")
    note.write_text(place + "\n", encoding="utf-8")
    return place


def store_of(run: Path | str) -> Path | str:
    """The store of a run's directory, of the latest run under a directory of runs; a database itself, by file or URL."""
    if isinstance(run, str) and ("://" in run or run.startswith("${")):
        return run
    path = Path(run)
    for directory in (path, path / "latest"):
        if (directory / NOTE).is_file():
            return (directory / NOTE).read_text(encoding="utf-8").strip()
        if (directory / DATABASE).is_file():
            return directory / DATABASE
    if path.is_file():
        return path
    raise StoreError(
        f"{run}: no episode database here",
        hint=f"give a run's directory, such as runs/NAME/latest, which has {DATABASE}; or the URL of a database",
    )
