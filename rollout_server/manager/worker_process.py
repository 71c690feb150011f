"""The manager's worker, one process after the other: started, watched and ended here.

Each process has a socket and a session of its own, so that nothing of a dead worker is ever read as its successor's, and it
does not outlive the manager. It holds the writing end of a pipe that it never writes to: the reading end (`pipe`) becomes
readable the moment it is gone, however it went. How often a worker may be started again is `RestartBudget`'s business; what
it must be told to stand where the last one stood is the manager's.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import zmq

from lightning_rl.memory import with_huge_pages

RESTARTS = 3
STEADY_S = 60.0
"""A worker that has served for so long begins a new count."""
PID_FILE = "worker.pid"
EPITAPH = "worker.lost"
"""Says how the last worker ended, once there will be no other."""


class WorkerLost(Exception):
    """There is no worker, and there will be none."""


class RestartBudget:
    """At most `RESTARTS` restarts in a row that nothing explains; `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._in_a_row = 0
        self._ready_at: float | None = None

    def ready(self) -> None:
        """The worker is up."""
        self._ready_at = self._clock()

    def spend(self, *, explained: bool = False) -> bool:
        """A worker has died; whether there may be another. `explained`: a request has been failed for it, and for a death before:
        neither counts."""
        if self._ready_at is not None and self._clock() - self._ready_at >= STEADY_S:
            self._in_a_row = 0
        self._ready_at = None
        self._in_a_row = max(0, self._in_a_row - 1) if explained else self._in_a_row + 1
        return self._in_a_row <= RESTARTS


class WorkerProcess:
    """`command` gets two more arguments: the manager's pid, and the address to connect to. `log` None: the manager's own."""

    socket: zmq.Socket[bytes]

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], directory: Path, command: Sequence[str], log: Path | None = None
    ) -> None:
        self._context, self._directory, self._command, self._log = context, directory, list(command), log
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.address = ""
        self.pipe = -1

    def start(self) -> None:
        self.address = f"ipc://{self._directory}/worker-{self.starts}.ipc"
        self.socket = self._context.socket(zmq.PAIR)
        self.socket.set_hwm(0)  # nothing is ever dropped; what is in flight is bounded by the web's admission
        self.socket.bind(self.address)
        self.pipe, writing = os.pipe()
        with ExitStack() as stack:
            stack.callback(os.close, writing)
            out = None if self._log is None else stack.enter_context(self._log.open("ab"))
            self._process = subprocess.Popen(
                [*self._command, str(os.getpid()), self.address],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=with_huge_pages(),
                start_new_session=True,
                pass_fds=(writing,),
            )
        self.starts += 1
        self._write(PID_FILE, str(self._process.pid))

    def stop(self) -> str:
        """End it if it still runs, and say how it ended."""
        process, self._process = self._process, None
        if process is None:
            return "no process"
        process.kill()  # it has nothing to put in order
        code = process.wait()
        self.socket.close(0)
        os.close(self.pipe)
        return f"signal {-code}" if code < 0 else f"code {code}"

    def bury(self, epitaph: str) -> None:
        """There will be no other: leave word for whoever started the manager."""
        self._write(EPITAPH, epitaph)

    def _write(self, name: str, text: str) -> None:
        scratch = self._directory / f"{name}.tmp"
        scratch.write_text(text)
        scratch.replace(self._directory / name)
