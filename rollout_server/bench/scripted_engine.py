"""An engine that gives every request the same answer, so that what is measured is everything around it.

`python -m rollout_server.bench.scripted_engine CONFIG.json`, in the manager's place: the real messages over the real socket, a
message for each id as from a model, and no model. The answer's ids and their pace are in `SCRIPT` beside the configuration.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import sys
import time
from pathlib import Path

import msgspec
import zmq
from msgspec import Struct

from lightning_rl.lifetime import die_with_parent
from rollout_server import messages as m
from rollout_server.launch import RolloutServer

SCRIPT = "script.json"


class Script(Struct, frozen=True, kw_only=True):
    ids: list[int]
    """Of every answer; the last one ends it."""
    token_s: float = 0.0
    """From one id to the next, and before the first; 0: all at once."""


class ScriptedServer(RolloutServer):
    """The real web process in front of a scripted engine; the settings are `RolloutServer`'s."""

    def follow(self, script: Script) -> ScriptedServer:
        """Called before it is started."""
        self._script = script
        return self

    def _spawn(self, name: str, module: str, config: Path, *inherited: int) -> None:
        if name == "manager":
            config.with_name(SCRIPT).write_bytes(msgspec.json.encode(self._script))
            module = __name__
        super()._spawn(name, module, config, *inherited)


def serve(ipc_dir: Path, script: Script) -> None:
    web = zmq.Context().socket(zmq.PAIR)
    web.bind(f"ipc://{ipc_dir}/web.ipc")
    order = itertools.count()
    waiting: list[tuple[float, int, bytes]] = []
    while True:
        delay_ms = max(0, math.ceil(1e3 * (waiting[0][0] - time.monotonic()))) if waiting else 1000
        while web.poll(delay_ms):
            delay_ms = 0
            message = m.decode_to_manager(web.recv())
            for seconds, answer in answers(message, script):
                heapq.heappush(waiting, (time.monotonic() + seconds, next(order), m.encode(answer)))
        while waiting and waiting[0][0] <= time.monotonic():
            web.send(heapq.heappop(waiting)[2])


def answers(message: m.ToManager, script: Script) -> list[tuple[float, m.FromManager]]:
    """What is said, and after how many seconds. A cancelled request is answered to its end: nobody listens."""
    key = message.request_id
    match message:
        case m.Submit(n=n):
            return [
                ((at + 1) * script.token_s, _token(key, index, script, at))
                for at in range(len(script.ids))
                for index in range(n)
            ]
        case m.GetStats():
            return [(0.0, m.Stats(request_id=key, values={"version": 0.0}, checksums={}))]
        case m.Cancel():
            return []
        case _:
            return [(0.0, m.Done(request_id=key))]


def _token(key: str, index: int, script: Script, at: int) -> m.Tokens:
    return m.Tokens(
        request_id=key,
        index=index,
        ids=[script.ids[at]],
        logprobs=[-0.5],
        versions=[0],
        finish_reason="stop" if at + 1 == len(script.ids) else None,
    )


if __name__ == "__main__":
    settings = json.loads(Path(sys.argv[1]).read_text())
    die_with_parent(settings["parent_pid"])
    directory = Path(settings["ipc_dir"])
    serve(directory, msgspec.json.decode((directory / SCRIPT).read_bytes(), type=Script))
