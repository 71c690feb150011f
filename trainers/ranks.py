"""The other trainer processes: rank 0 is `lrl` itself and starts them; they follow it (`Learner.follow`).

Collectives cannot be interrupted: when a rank dies, rank 0 may be waiting for it inside one. A watcher thread then says so and
ends the process; everything that was finished is on disk.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import msgspec
import torch
from msgspec import Struct

from lightning_rl.errors import LightningError
from lightning_rl.lifetime import die_with_parent
from lightning_rl.memory import keep_freed_memory

EXIT_S = 30.0


class RankConfig(Struct, frozen=True, kw_only=True):
    recipe: str
    model_dir: str
    start_from: str | None
    parent_pid: int


class Ranks:
    """A context manager around ranks 1 … n-1. Sets this process's own rank in the environment."""

    def __init__(self, world_size: int, config: RankConfig, log_dir: Path, go_on: str) -> None:
        self._world_size, self._config, self._log_dir, self._go_on = world_size, config, log_dir, go_on
        self._leaving = threading.Event()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Ranks:
        from trainers.deepspeed_engine import free_port

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise LightningError(
                "lrl was started by a launcher, with WORLD_SIZE set",
                hint="start `lrl train` once: it starts its ranks itself, as many as train.world_size",
            )
        shared = {"WORLD_SIZE": str(self._world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        os.environ.update(shared, RANK="0", LOCAL_RANK="0")
        if self._world_size > 1:
            threads = max(1, (os.cpu_count() or 1) // self._world_size)
            shared["OMP_NUM_THREADS"] = str(threads)
            torch.set_num_threads(threads)
        settings = self._log_dir / "ranks.json"
        settings.write_bytes(msgspec.json.encode(self._config))
        for rank in range(1, self._world_size):
            with (self._log_dir / f"rank-{rank}.log").open("ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-P", "-m", "trainers.ranks", str(settings)],
                        env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        threading.Thread(target=self._watch, name="rank-watcher", daemon=True).start()
        return self

    def _watch(self) -> None:
        while not self._leaving.wait(1.0):
            dead = self._dead()
            if dead and not self._leaving.is_set():
                print(f"lrl: {dead}\n     {self._go_on}", file=sys.stderr, flush=True)
                os._exit(2)

    def _dead(self) -> str | None:
        """Which rank has ended, in words."""
        for rank, process in enumerate(self._processes, start=1):
            if process.poll() is not None:
                log = self._log_dir / f"rank-{rank}.log"
                return f"trainer rank {rank} ended with code {process.returncode}; its log is {log}"
        return None

    def leave(self) -> None:
        """The ranks are about to end as they should."""
        self._leaving.set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        # A collective whose other end died fails here with a connection's error: say which rank it was.
        # (Connections close a moment before a process can be waited for.)
        dead = None
        if self._processes and kind is not None and issubclass(kind, RuntimeError):
            time.sleep(0.5)
            dead = self._dead()
        for process in self._processes:
            if kind is not None:
                process.kill()
            try:
                process.wait(EXIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if dead:
            raise LightningError(dead) from error


def main(config: RankConfig) -> None:
    from lightning_rl.recipe import load_recipe
    from trainers.deepspeed_engine import init_distributed
    from trainers.learner import Learner

    init_distributed()
    start_from = Path(config.start_from) if config.start_from else None
    Learner(load_recipe(Path(config.recipe), recorded=True), Path(config.model_dir), start_from).follow()


if __name__ == "__main__":
    settings = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=RankConfig)
    die_with_parent(settings.parent_pid)
    keep_freed_memory()
    main(settings)
    sys.stdout.flush()
    os._exit(0)  # gloo can abort on an orderly exit, after all the work is done
