"""Where a run lives: `runs/<name>/<time>/`, with a `latest` link beside it.

Everything needed to go on or to look back is in there: the resolved recipe, the episode store, checkpoints, metrics, logs.
One process at a time may write to it; the lock goes with the process, however it ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lightning_rl.errors import ResumeError

LOCK_PATIENCE_S = 1.0


@dataclass(frozen=True)
class RunDirectory:
    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def tasks_digest(self) -> Path:
        return self.path / "tasks.digest"

    @property
    def store(self) -> Path:
        return self.path / "episodes.db"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def warm_start(self) -> Path:
        return self.path / "warm_start"

    @property
    def published(self) -> Path:
        return self.path / "published"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def seconds(self) -> Path:
        return self.path / "seconds.json"

    @property
    def curve(self) -> Path:
        return self.path / "curve.png"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def lock(self) -> IO[str]:
        """Held until the returned file is closed. Raises ResumeError when another process holds it for longer than the moment that
        looking whether it is held takes (`viewer.runs.is_held`)."""
        file = (self.path / ".lock").open("w")
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.close()
                    raise ResumeError(
                        f"{self.path} is in use by another lrl process", hint="wait for it, or stop it"
                    ) from None
            time.sleep(0.02)


def create_run(runs_dir: Path, name: str) -> RunDirectory:
    """A new directory named by the time, and `latest` pointing to it."""
    parent = runs_dir / name
    parent.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        path = parent / (stamp + suffix)
        try:
            path.mkdir()
        except FileExistsError:
            continue
        break
    run = RunDirectory(path.resolve())
    for folder in (run.logs, run.checkpoints):
        folder.mkdir()
    link = parent / f".latest-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(parent / "latest")
    return run


def open_run(path: Path) -> RunDirectory:
    """An existing run, by its directory, by `runs/<name>` (its latest), or by a name under `runs/`."""
    for candidate in (path, path / "latest", Path("runs") / path, Path("runs") / path / "latest"):
        if (candidate / "recipe.yaml").is_file():
            return RunDirectory(candidate.resolve())
    raise ResumeError(f"{path} is not a run directory (no recipe.yaml in it)", hint="runs are listed by `ls runs/*/`")


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, even when the machine stops in the middle."""
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
