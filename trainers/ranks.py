"""The other trainer processes: rank 0 is `lrl` itself and starts them; they follow it (`Learner.follow`).

Ranks that an outside launcher has started (RANK is set) are left as they are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import msgspec
from msgspec import Struct

from lightning_rl.errors import LightningError
from lightning_rl.lifetime import die_with_parent
from lightning_rl.memory import keep_freed_memory


class RankConfig(Struct, frozen=True, kw_only=True):
    recipe: str
    model_dir: str
    start_from: str | None
    parent_pid: int


class Ranks:
    """A context manager around ranks 1 … n-1. Sets this process's own rank in the environment."""

    def __init__(self, world_size: int, config: RankConfig, log_dir: Path) -> None:
        self._world_size, self._config, self._log_dir = world_size, config, log_dir
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Ranks:
        from trainers.deepspeed_engine import free_port

        shared = {"WORLD_SIZE": str(self._world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        os.environ.update(shared, RANK="0", LOCAL_RANK="0")
        settings = self._log_dir / "ranks.json"
        settings.write_bytes(msgspec.json.encode(self._config))
        for rank in range(1, self._world_size):
            with (self._log_dir / f"rank-{rank}.log").open("ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "trainers.ranks", str(settings)],
                        env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        return self

    def check(self) -> None:
        """Raises LightningError if a rank has ended."""
        for rank, process in enumerate(self._processes, start=1):
            if process.poll() is not None:
                raise LightningError(
                    f"trainer rank {rank} ended with code {process.returncode}",
                    hint=f"its log is {self._log_dir / f'rank-{rank}.log'}",
                )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if kind is not None:
                process.kill()
            process.wait()


def main(config: RankConfig) -> None:
    from lightning_rl.recipe import load_recipe
    from trainers.deepspeed_engine import init_distributed
    from trainers.learner import Learner

    init_distributed()
    start_from = Path(config.start_from) if config.start_from else None
    Learner(load_recipe(Path(config.recipe)), Path(config.model_dir), start_from).follow()


if __name__ == "__main__":
    settings = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=RankConfig)
    die_with_parent(settings.parent_pid)
    keep_freed_memory()
    main(settings)
    sys.stdout.flush()
    os._exit(0)  # gloo can abort on an orderly exit, after all the work is done
