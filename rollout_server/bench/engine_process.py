"""The bench's end of a driver process: start it, let it play scenarios one after the other, freeze it in between."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import msgspec

from lightning_rl.errors import ServerError
from rollout_server.bench import processes
from rollout_server.bench.scenarios import Scenario
from rollout_server.bench.transcript import Transcript
from rollout_server.bench.wire import Ready, Setup

START_TIMEOUT_S = 900.0
"""A peer may compile its kernels when it starts for the first time."""
PLAY_TIMEOUT_S = 3600.0
STOP_TIMEOUT_S = 20.0

Reply = TypeVar("Reply", Ready, Transcript)


class Launch(NamedTuple):
    """How a driver is started."""

    engine: str
    """`lrl`, `transformers`, `vllm` or `llamacpp`."""
    variant: str
    """Which settings of ours; empty for the standard ones and for peers."""
    command: list[str]
    environment: dict[str, str]
    setup: Setup

    @property
    def label(self) -> str:
        return f"{self.engine}:{self.variant}" if self.variant else self.engine


class Played(NamedTuple):
    transcript: Transcript
    peak_memory_bytes: int


class EngineProcess:
    """`with EngineProcess(launch, log) as engine:` returns when the model is loaded, frozen between `play`s.

    Raises:
        ServerError: the driver ended or took too long; the message has its last words.
    """

    def __init__(self, launch: Launch, log: Path) -> None:
        self.launch = launch
        self._log = log
        self._scratch = Path(tempfile.mkdtemp(prefix="lrl-bench-"))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    self.launch.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=self.launch.environment,
                    cwd=self._scratch,
                    start_new_session=True,
                )
            self._send(msgspec.structs.replace(self.launch.setup, scratch=str(self._scratch)))
            self._receive(Ready, START_TIMEOUT_S)
            processes.freeze(self._process.pid)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def play(self, scenario: Scenario) -> Played:
        pid = self._running().pid
        processes.thaw(pid)
        processes.reset_peak(pid)
        self._send(scenario)
        transcript = self._receive(Transcript, PLAY_TIMEOUT_S)
        peak = processes.peak_memory(pid)
        processes.freeze(pid)
        return Played(transcript, peak)

    def close(self) -> None:
        """End of input ends a driver in order; what is left of its tree after that is killed."""
        process, self._process = self._process, None
        if process is not None:
            processes.thaw(process.pid)
            members = processes.tree(process.pid)
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.communicate(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            processes.send(members[1:], signal.SIGKILL)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError(f"the bench's {self.launch.label} process was closed")
        return self._process

    def _send(self, message: Setup | Scenario) -> None:
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(msgspec.json.encode(message) + b"\n")
            process.stdin.flush()
        except BrokenPipeError as error:
            raise self._death() from error

    def _receive(self, kind: type[Reply], timeout: float) -> Reply:
        process = self._running()
        assert process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            processes.send(processes.tree(process.pid), signal.SIGKILL)

        timer = threading.Timer(timeout, give_up)
        timer.daemon = True
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise self._death(f"took longer than {timeout:.0f} s" if late.is_set() else "ended")
        return msgspec.json.decode(line, type=kind)

    def _death(self, how: str = "ended") -> ServerError:
        words = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
        return ServerError(
            f"the bench's {self.launch.label} process {how}; last words:\n{words}",
            hint=f"the whole log is {self._log}",
        )
