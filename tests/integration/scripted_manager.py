"""A manager that says what a test tells it to, over the real socket with the real messages; and the web beside it."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import zmq
from starlette.applications import Starlette

from rollout_server import messages as m
from rollout_server.api.app import build_app
from rollout_server.api.config import WebConfig
from rollout_server.api.process import WebServer

Script = Callable[[m.Submit], list[m.FromManager]]
"""What to answer to a request; without a last message (no finish reason) it stays open until it is cancelled."""


class ScriptedManager:
    def __init__(self, ipc_dir: Path) -> None:
        self.reset()
        self._unasked: deque[m.FromManager] = deque()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.bind(f"ipc://{ipc_dir}/web.ipc")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        """Forget what was heard and what to answer."""
        self.script: Script = lambda submit: []
        self.submitted: list[m.Submit] = []
        self.cancelled: list[str] = []
        self.scores: list[m.Score] = []
        self.answers_scores = True
        self.changes: list[m.ToManager] = []
        """Updates, unloads, pauses and the like, in order."""
        self.refuses: dict[type, m.Failed] = {}
        """What kinds of change fail, and how (the request id is filled in)."""
        self.checksum = "sum"
        self.stats = {"version": 3.0}

    def say(self, *messages: m.FromManager) -> None:
        """What a request that was left open hears later."""
        self._unasked.extend(messages)

    def stop(self) -> None:
        """As if the process had died. Idempotent."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._thread.join()
        self._socket.close(0)
        self._context.term()

    def _run(self) -> None:
        while not self._stopping.is_set():
            while self._unasked:
                self._socket.send(m.encode(self._unasked.popleft()))
            if self._socket.poll(20):
                for answer in self._answers(m.decode_to_manager(self._socket.recv())):
                    self._socket.send(m.encode(answer))

    def _answers(self, message: m.ToManager) -> list[m.FromManager]:
        key = message.request_id
        if type(message) in self.refuses:
            return [msgspec.structs.replace(self.refuses[type(message)], request_id=key)]
        match message:
            case m.Submit():
                self.submitted.append(message)
                return self.script(message)
            case m.Cancel():
                self.cancelled.append(key)
                return []
            case m.Score(ids=ids):
                self.scores.append(message)
                if not self.answers_scores:
                    return []
                return [m.Scored(request_id=key, logprobs=[-float(i) for i in ids[1:]], version=3)]
            case m.UpdateWeights(version=version):
                self.changes.append(message)
                return [m.Updated(request_id=key, version=version, checksum=f"{self.checksum}-{version}")]
            case m.GetStats():
                return [m.Stats(request_id=key, values=self.stats, checksums={"base": self.checksum})]
            case m.UnloadAdapter() | m.Pause() | m.Resume() | m.Sleep() | m.Wake():
                self.changes.append(message)
                return [m.Done(request_id=key)]


def tokens(
    submit: m.Submit,
    ids: list[int],
    finish_reason: str | None = None,
    *,
    index: int = 0,
    version: int = 3,
    cached: int = 0,
) -> m.Tokens:
    """Sampled tokens, the log-prob of id i being -i/1000, the entropy i/1024."""
    top = [[(i, -i / 1024), (17, -50.0)] for i in ids] if submit.sampling.top_logprobs else []
    return m.Tokens(
        request_id=submit.request_id,
        index=index,
        ids=ids,
        logprobs=[-i / 1000 for i in ids],
        versions=[version] * len(ids),
        entropies=[i / 1024 for i in ids],
        top_logprobs=top,
        finish_reason=finish_reason,
        cached_tokens=cached,
    )


def one_by_one(submit: m.Submit, choices: list[list[int]], finish_reason: str = "stop") -> list[m.FromManager]:
    """The ids of each choice, token by token, the choices interleaved."""
    return [
        tokens(submit, [ids[at]], finish_reason if at == len(ids) - 1 else None, index=index)
        for at in range(max(map(len, choices)))
        for index, ids in enumerate(choices)
        if at < len(ids)
    ]


@contextmanager
def serving_web(config: Callable[[int], WebConfig]) -> Iterator[str]:
    """The web application in a thread, on a free port; its base URL."""
    with serving_app(config) as (url, _):
        yield url


@contextmanager
def serving_app(config: Callable[[int], WebConfig]) -> Iterator[tuple[str, Starlette]]:
    """The same, and the application itself."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = build_app(config(listener.fileno()))
    server = WebServer(app)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        listener.close()
