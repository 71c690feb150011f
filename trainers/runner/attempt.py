"""The runner's side of one attempt: what its process has said so far, what it printed last, and how it ended.

It reads what is there when the selector says so and never waits. What the outcome means, and what follows, is the
pool's.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lightning_rl.episode import Outcome
from trainers.runner.fork_server import EXIT_CODE, OWN_FAILURE, ForkServer
from trainers.runner.words import LENGTH, Beat, Done, Emitted, Ended, Job, Recorded, decode_word, framed

START_SECONDS = 120.0
"""In which a process must begin: the one that forks may first have to import what agents import."""
OUTPUT_TAIL = 4000
MAX_WORD = 1 << 30  # bytes: more than any answer or span
WRITE_SIZE = 1 << 18
READ_SIZE = 1 << 16  # what a pipe holds: one read takes all that an ended process left in it


@dataclass(eq=False)
class Attempt:
    """A child at work: what it has said so far, what it printed last, and its exit code once it is gone."""

    job: Job
    forks: ForkServer
    recorded: Callable[[str], Recorded]
    timeout_s: float
    heartbeat_s: float
    """How long it may show no sign of life."""
    selector: selectors.BaseSelector
    done: Done | None = None
    ended: bool = False
    """Whether its process is gone."""
    exit_code: int | None = None
    """None while it lives, and when the fork server died with it; negative when a signal ended it."""
    timed_out: str = ""
    """Why it was killed, if it took too long or was silent for too long."""
    _garbled: bool = False
    """Whether what its process said could not be read."""
    _began: bool = False
    """Whether its process has said anything: its time and its heartbeat count from then on."""
    _unsent: bytearray = field(default_factory=bytearray)
    _received: bytearray = field(default_factory=bytearray)
    _printed: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self._unsent += framed(self.job)
        self.scoring = self.job.ended is not None
        self.spans, self.rewards, self.links = list(self.job.spans), list(self.job.rewards), list(self.job.links)
        self._connection, theirs = socket.socketpair()
        self._output, output = os.pipe()
        os.set_blocking(self._output, False)
        try:
            self._key, self._status = self.forks.fork(theirs, output)
        except BaseException:
            self._connection.close()
            os.close(self._output)
            raise
        finally:
            theirs.close()
            os.close(output)
        self._must_end = time.monotonic() + START_SECONDS
        self.heard_at = time.monotonic()
        """When it last showed that it lives."""
        self._connection.setblocking(False)
        self.selector.register(self._connection, selectors.EVENT_READ, self._on_connection)
        self._flush()
        self.selector.register(self._output, selectors.EVENT_READ, self._on_output)
        self.selector.register(self._status, selectors.EVENT_READ, self._on_exit)

    def kill(self) -> None:
        self.forks.kill(self._key)

    @property
    def deadline(self) -> float:
        """When it is to be killed, if nothing is heard of it before."""
        if self.timed_out:
            return float("inf")
        return min(self._must_end, self.heard_at + self.heartbeat_s) if self._began else self._must_end

    def time_out(self) -> None:
        if not self._began:
            self.timed_out = f"did not start within {START_SECONDS:g} s"
        elif self.heard_at + self.heartbeat_s < self._must_end:
            self.timed_out = f"showed no sign of life for {self.heartbeat_s:g} s"
        else:
            self.timed_out = f"did not end within {self.timeout_s:g} s"
        self.kill()

    def close(self) -> None:
        """Take in what is left and let go of the descriptors."""
        while self._is_registered(self._connection) and self._on_word():
            pass
        if self._is_registered(self._output):
            self._on_output()
        for source in (self._connection, self._output, self._status):
            if self._is_registered(source):
                self.selector.unregister(source)
        self._connection.close()
        os.close(self._output)
        os.close(self._status)

    def verdict(self) -> tuple[Outcome, str | None]:
        """The outcome and its error text, with the last of what was printed."""
        outcome: Outcome
        error: str | None
        if self._garbled:
            outcome, error = (
                Outcome.INFRASTRUCTURE_ERROR,
                "something else than messages came from the episode's process",
            )
        elif self.done is not None:
            outcome, error = self.done.outcome, self.done.error
        else:
            outcome, error = self._without_a_word()
        if error and self._printed:
            error = f"{error}\nThe agent's last output:\n{self.output}"
        return outcome, error

    @property
    def output(self) -> str:
        """The last of what it printed."""
        return self._printed.decode(errors="replace")

    def _without_a_word(self) -> tuple[Outcome, str]:
        """What it means that the process ended before it could say how it went."""
        who = "the reward function" if self.scoring else "the agent"
        if self.timed_out:
            outcome = Outcome.TIMEOUT if self._began else Outcome.INFRASTRUCTURE_ERROR
            error = f"{who} {self.timed_out} and was killed"
        elif self.exit_code is None:
            outcome, error = Outcome.INFRASTRUCTURE_ERROR, "the process that forks agents died"
        elif self.exit_code == OWN_FAILURE:
            outcome, error = Outcome.INFRASTRUCTURE_ERROR, "the episode's process failed"
        elif self.exit_code < 0:
            outcome, error = Outcome.INFRASTRUCTURE_ERROR, f"{who} was ended by signal {-self.exit_code}"
        else:
            outcome, error = Outcome.AGENT_ERROR, f"{who} ended its own process with exit code {self.exit_code}"
        return Outcome.INFRASTRUCTURE_ERROR if self.scoring else outcome, error

    def _is_registered(self, source: Any) -> bool:
        return source in self.selector.get_map()

    def _send(self, message: Recorded) -> None:
        self._unsent += framed(message)
        self._flush()

    def _flush(self) -> None:
        """Write what there is room for; the rest when there is more."""
        try:
            while self._unsent:
                del self._unsent[: self._connection.send(self._unsent[:WRITE_SIZE])]
        except BlockingIOError:
            pass
        except OSError:  # it died: its exit will tell
            self._unsent.clear()
        if self._is_registered(self._connection):
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
            self.selector.modify(self._connection, events, self._on_connection)

    def _on_connection(self) -> None:
        if self._unsent:
            self._flush()
        self._on_word()

    def _on_word(self) -> bool:
        data = self._read(self._connection, lambda: self._connection.recv(READ_SIZE))
        self._received += data
        if data:
            self.heard_at = time.monotonic()
            if not self._began:
                self._began, self._must_end = True, self.heard_at + self.timeout_s
        while len(self._received) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._received)
            end = LENGTH.size + length
            if length <= MAX_WORD and len(self._received) < end:
                break
            try:
                word = decode_word(self._received[LENGTH.size : end])
            except (
                msgspec.DecodeError,
                RecursionError,
            ):  # the agent wrote into what it found open
                self._garbled, self.done = True, None
                self._received.clear()
                self.kill()
                return False
            del self._received[:end]
            match word:
                case Done():
                    self.done = word
                case Ended():
                    self.scoring = True
                    self._send(self.recorded(self.job.start.id))
                case Emitted():
                    self._take(word)
                case Beat():
                    pass
        return bool(data)

    def _take(self, word: Emitted) -> None:
        if word.span:
            self.spans.append(word.span)
        if word.reward:
            self.rewards.append(word.reward)
        if word.link:
            self.links.append(word.link)

    def _on_output(self) -> None:
        data = self._read(self._output, lambda: os.read(self._output, READ_SIZE))
        self._printed = (self._printed + data)[-OUTPUT_TAIL:]

    def _on_exit(self) -> None:
        data = os.read(self._status, EXIT_CODE.size)
        with contextlib.suppress(struct.error):  # EOF without a code: the fork server died
            (self.exit_code,) = EXIT_CODE.unpack(data)
        self.ended = True
        self.selector.unregister(self._status)

    def _read(self, source: Any, read: Callable[[], bytes]) -> bytes:
        """What is there now; at the end of the stream the source is no longer watched."""
        try:
            data = read()
        except BlockingIOError:
            return b""
        except ConnectionError:
            data = b""
        if not data:
            self.selector.unregister(source)
        return data
