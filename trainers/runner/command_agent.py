"""An agent that is a program of its own: started with the task on its standard input, read line by line until it ends.

A line of its output that is a JSON object of `answer`, or `reward` with or without `name`, or both, is taken; every other line is
its log, and goes where a Python agent's output goes, as does what it writes to standard error. What it has left running when it
ends is not waited for. Memory is bounded by `MAX_LINE`.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_rl.errors import LightningError
from trainers.runner.scoring import is_finite
from trainers.runner.words import Command

MAX_LINE = 32 << 20
"""Bytes of a line that can be an answer."""
LOG_TAIL = 4000
READ_SIZE = 1 << 16
LARGEST_PIPE = 1 << 20
QUOTED = 200
NAMES = ({"answer"}, {"reward"}, {"reward", "name"}, {"answer", "reward"}, {"answer", "reward", "name"})


class CommandFailed(LightningError):
    """The program could not be started, or said what cannot be understood."""


class CommandExited(CommandFailed):
    """The program ended with an exit code other than 0."""


class CommandKilled(CommandFailed):
    """A signal ended the program."""


def run_command(command: Command, task: dict[str, Any], task_file: Path, emit: Callable[[float, str], None]) -> Any:
    """Run it to its end; its answer, None if it gave none. `emit` gets each reward's value and name as it comes.

    Raises CommandFailed.
    """
    line = json.dumps(task, allow_nan=False).encode() + b"\n"
    task_file.write_bytes(line)
    environment = os.environ | {"LRL_TASK": str(task_file)}
    try:
        process = subprocess.Popen(
            command.words,
            cwd=command.folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
    except OSError as error:
        raise CommandFailed(f"cannot start {command.words[0]!r} in {command.folder}: {error.strerror}") from None
    lines = _Lines(emit)
    try:
        _exchange(process, line, lines.feed)
        lines.end()
    finally:
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        task_file.unlink(missing_ok=True)
    if code < 0:
        raise CommandKilled(f"the agent was ended by signal {-code}")
    if code > 0:
        raise CommandExited(f"the agent ended with exit code {code}")
    return lines.answer


def _exchange(process: subprocess.Popen[bytes], task: bytes, read: Callable[[bytes], None]) -> None:
    """Write the task and read what comes until the process has ended, whoever else still holds its pipes."""
    assert process.stdin is not None
    assert process.stdout is not None
    ended, signal_end = socket.socketpair()
    with ended, selectors.DefaultSelector() as selector:
        threading.Thread(target=_watch, args=(process, signal_end), daemon=True).start()
        for pipe, event in ((process.stdin, selectors.EVENT_WRITE), (process.stdout, selectors.EVENT_READ)):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, event)
        selector.register(ended, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if ended in ready:
                _drain(process.stdout.fileno(), read)
                return
            if process.stdin in ready:
                task = task[_written(process.stdin.fileno(), task) :]
                if not task:
                    selector.unregister(process.stdin)
                    process.stdin.close()
            if process.stdout in ready:
                data = os.read(process.stdout.fileno(), READ_SIZE)
                read(data)
                if not data:
                    selector.unregister(process.stdout)


def _watch(process: subprocess.Popen[bytes], ended: socket.socket) -> None:
    with ended:
        process.wait()


def _drain(pipe: int, read: Callable[[bytes], None]) -> None:
    """What an ended program has left in its pipe, and no more: another process may go on writing."""
    left = LARGEST_PIPE
    with contextlib.suppress(BlockingIOError):
        while left > 0 and (data := os.read(pipe, READ_SIZE)):
            left -= len(data)
            read(data)


def _written(pipe: int, data: bytes) -> int:
    """How much has been written; as good as all where nobody reads it any more."""
    try:
        return os.write(pipe, data[:READ_SIZE])
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        return len(data)


@dataclass
class _Lines:
    """The program's output, as it comes in pieces."""

    emit: Callable[[float, str], None]
    answer: Any = None
    _answered: bool = False
    _piece: bytearray = field(default_factory=bytearray)
    """The beginning of a line whose end has not come; of a line that is too long, its tail."""
    _too_long: bytes = b""
    """How the present line begins, if it is too long."""

    def feed(self, data: bytes) -> None:
        *ends, rest = data.split(b"\n")
        for end in ends:
            self._piece += end
            self.end()
        self._piece += rest
        if len(self._piece) > MAX_LINE:
            self._too_long = self._too_long or bytes(self._piece[:QUOTED])
            del self._piece[:-LOG_TAIL]

    def end(self) -> None:
        """The present line is complete."""
        line, began = bytes(self._piece), self._too_long
        self._piece.clear()
        self._too_long = b""
        if began.lstrip().startswith(b"{"):
            raise CommandFailed(f"the agent wrote a line of more than {MAX_LINE >> 20} MiB: {_quoted(began)}")
        word = None if began else _word(line)
        if word is not None:
            self._take(word, line)
        elif line:
            with contextlib.suppress(OSError):  # nobody reads the log any more
                _write_all(1, line[-LOG_TAIL:] + b"\n")

    def _take(self, word: dict[str, Any], line: bytes) -> None:
        try:
            line.decode()
        except UnicodeDecodeError:
            raise CommandFailed(f"the agent wrote a line that is not UTF-8: {_quoted(line)}") from None
        if "reward" in word:
            value, name = word["reward"], word.get("name", "reward")
            if isinstance(value, bool) or not is_finite(value):
                raise CommandFailed(f"a reward must be a finite number: {_quoted(line)}")
            if not isinstance(name, str) or not name:
                raise CommandFailed(f"a reward's name must be text: {_quoted(line)}")
            self.emit(float(value), name)
        if "answer" in word:
            if self._answered:
                raise CommandFailed(f"the agent answered a second time: {_quoted(line)}")
            self.answer, self._answered = word["answer"], True


def _word(line: bytes) -> dict[str, Any] | None:
    """The line as one of ours; None if it is log."""
    if not line.lstrip().startswith(b"{"):
        return None
    try:
        value = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value.keys() in NAMES else None


def _quoted(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}… ({len(line)} bytes)"


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
