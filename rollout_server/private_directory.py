"""The directory that a server's processes share: sockets, settings with keys in them, copies of weights.

Its owner removes it. Where the owner was killed, the next one to start does so: it stays locked (`flock`) for as long as its
owner lives, which also holds between containers that share the place but not the numbers of processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import tempfile
from pathlib import Path

PREFIX = "lrl-"
CONFIG = "config.json"
"""Tells the `parent_pid`. A directory without it is left alone: it is being made, or no server's."""
_LOCK = "owner.lock"


class PrivateDirectory:
    """Mode 0700, in the system's place for temporary files."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = (self.path / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def remove_abandoned() -> list[Path]:
    """Remove the directories of servers of this user whose owners are gone; which they were."""
    return [path for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*") if _remove_if_abandoned(path)]


def _remove_if_abandoned(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # no server's, or another one removes it
        about = path.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
            return False
        with (path / _LOCK).open("r+") as lock:
            if _runs(int(json.loads((path / CONFIG).read_text())["parent_pid"])):
                return False
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
            return True
    return False


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
