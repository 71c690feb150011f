"""What the bench and an engine's driver process say to each other: one JSON line a message, on the driver's stdin and stdout.

The bench sends `Setup` once and is answered `Ready`; then each `Scenario` is answered by its `Transcript`. End of input
ends the driver. A driver that cannot go on dies with a traceback in its log: there are no error messages to translate.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import BinaryIO

import msgspec
from msgspec import Struct

from lightning_rl.lifetime import die_with_parent
from rollout_server.bench.scenarios import Scenario
from rollout_server.bench.session import Engine, play


class Setup(Struct, frozen=True, kw_only=True):
    """What an engine is started with: the same for all, except `overrides`."""

    model_dir: str
    dtype: str
    """`bfloat16` or `float32`, of weights, computation and cache."""
    threads: int
    kv_tokens: int
    kv_bytes: int
    """Memory of as many tokens' keys and values."""
    max_sequences: int
    max_context: int
    adapters: dict[str, str]
    """Name → directory in PEFT's format."""
    scratch: str
    """A directory that lives as long as the driver."""
    home: str = ""
    """The peer's environment."""
    overrides: dict[str, bool | int] = {}
    """Fields of `EngineConfig` for a variant of our own engine."""


class Ready(Struct, frozen=True, kw_only=True):
    pid: int


def drive(start: Callable[[Setup], AbstractAsyncContextManager[Engine]]) -> None:
    """A driver's main program. What the engine prints on stdout goes to stderr, into the log."""
    die_with_parent(os.getppid())
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    setup = msgspec.json.decode(sys.stdin.buffer.readline(), type=Setup)
    asyncio.run(_serve(start, setup, sys.stdin.buffer, replies))


async def _serve(
    start: Callable[[Setup], AbstractAsyncContextManager[Engine]], setup: Setup, lines: BinaryIO, replies: BinaryIO
) -> None:
    async with start(setup) as engine:
        _send(replies, Ready(pid=os.getpid()))
        while line := await asyncio.to_thread(lines.readline):
            scenario = msgspec.json.decode(line, type=Scenario)
            await engine.prepare(scenario)
            _send(replies, await play(scenario, engine))


def _send(replies: BinaryIO, message: Struct) -> None:
    replies.write(msgspec.json.encode(message) + b"\n")
    replies.flush()
