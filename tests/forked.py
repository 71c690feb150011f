"""`lrl` in processes that a server forks which has imported already what training imports: seconds less for each.

Nothing else is different from a process of its own: its environment, working directory and output are those that it is told. It
leads a session, so that what it leaves behind can be ended with it.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["trainers.cli", "trainers.run", "trainers.learner", "trainers.deepspeed_engine", "peft", "matplotlib.pyplot"]
)


class Forked:
    """As much of `subprocess.Popen` as tests need."""

    def __init__(self, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> None:
        output, theirs = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(target=_run, args=(theirs, list(arguments), str(cwd), dict(environment)))
        self._process.start()
        theirs.close()
        self.stdout = os.fdopen(os.dup(output.fileno()))
        output.close()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 60) -> int | None:
        with self._ended_after(timeout):
            self._process.join()
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, None]:
        with self._ended_after(timeout) as said, self.stdout:
            said.append(self.stdout.read())
            self._process.join()
        return said[0], None

    @contextlib.contextmanager
    def _ended_after(self, seconds: float) -> Iterator[list[str]]:
        """Ends it, and what it has started, if it goes on for longer. AssertionError then, with what it said."""
        late, said = threading.Event(), list[str]()

        def end() -> None:
            late.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            yield said
        except BaseException:  # Ctrl-C, which only this session gets
            end()
            raise
        finally:
            timer.cancel()
        assert not late.is_set(), f"it goes on after {seconds} s: {''.join(said)}"


def _run(output: Connection, arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    os.setsid()
    with output, Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
        for number in (1, 2):
            os.dup2(output.fileno(), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    from lightning_rl.cli import main

    code = main(arguments)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as an interpreter does at its end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)
