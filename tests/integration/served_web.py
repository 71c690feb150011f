"""A web process with settings of one's own in front of a scripted manager, and raw sockets to talk to it."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from rollout_server import messages as m
from rollout_server.api.config import WebConfig
from rollout_server.api.services import Services
from tests.integration.scripted_manager import ScriptedManager, serving_app, tokens

CHAT = "/v1/chat/completions"


def hello(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], **fields}


def at_once(submit: m.Submit) -> list[m.FromManager]:
    """Every choice is one token."""
    return [tokens(submit, [100], "stop", index=at) for at in range(submit.n)]


def never(submit: m.Submit) -> list[m.FromManager]:
    return []


@dataclass
class Served:
    url: str
    manager: ScriptedManager
    services: Services

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, path: str = CHAT, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=hello() if body is None else body, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def raw(self, *sent: bytes) -> bytes:
        """What comes back until the server closes."""
        with self.connect() as line:
            for part in sent:
                line.sendall(part)
            return heard(line)


def heard(line: socket.socket) -> bytes:
    """Everything until the other side closes, or resets after that."""
    got = b""
    try:
        while part := line.recv(65536):
            got += part
    except ConnectionResetError:
        pass
    return got


def request(path: str, body: bytes, *headers: str, method: str = "POST", length: int | None = None) -> bytes:
    """The bytes of a request after which the server closes."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "host: x",
        "connection: close",
        f"content-length: {len(body) if length is None else length}",
    ]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def status_and_error(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def eventually(holds: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def served(model_dir: Path, **settings: Any) -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="lrl-") as folder:
        manager = ScriptedManager(Path(folder))
        manager.script = at_once

        def config(listen_fd: int) -> WebConfig:
            given = {"kv_tokens": 4096, "served_name": "tiny", "aliases": ["gpt-*"], "admin_key": "admin", **settings}
            return WebConfig(
                ipc_dirs=[folder], model_dir=str(model_dir), parent_pid=os.getpid(), listen_fd=listen_fd, **given
            )

        try:
            with serving_app(config) as (url, app):
                yield Served(url, manager, app.state.services)
        finally:
            manager.stop()
