"""Many clients at once, clients that vanish, and clients that never end: nothing is lost, nothing grows, nobody is cut off.

The larger figures of docs/reliability.md come from `python -m tests.bench.load`; these are the same checks, small enough for CI.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rollout_server.launch import RolloutServer
from tests.web_client import ask_all

STREAMS = 1000
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutServer]:
    with RolloutServer(
        tiny_llama,
        "tiny",
        "float32",
        log_dir=tmp_path_factory.mktemp("load"),
        kv_tokens=32768,
        max_batch=256,
        threads=1,
        device="cpu",
    ) as running:
        yield running


def port(server: RolloutServer) -> int:
    return int(server.base_url.rpartition(":")[2])


def chat(number: int, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": f"Hello, I am number {number}."}]
    return json.dumps({"model": "tiny", "messages": messages, "ignore_eos": True, **fields}).encode()


def quiet(server: RolloutServer, within_s: float = 60.0) -> dict[str, float]:
    """The counters once nothing runs, waits, or is held by a pass under way."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        stats = server.admin().stats(check=True)
        if not stats["running"] and not stats["waiting"] and not stats["in_flight"]:
            return stats
        time.sleep(0.02)
    raise AssertionError(f"still running: {stats}")


def test_a_thousand_streams_at_once(server: RolloutServer) -> None:
    asked = [
        chat(number, max_tokens=8, stream=True, stream_options={"include_usage": True}) for number in range(STREAMS)
    ]
    answers = asyncio.run(ask_all(port(server), CHAT, asked, STREAMS))
    assert [answer.status for answer in answers] == [200] * STREAMS
    for answer in answers:
        assert answer.body.endswith(b"data: [DONE]\n\n")
        usage = json.loads(answer.body.split(b"data: ")[-2])["usage"]
        assert usage["completion_tokens"] == 8
    quiet(server)


def test_thousands_of_requests_leave_nothing_behind(server: RolloutServer) -> None:
    """Memory of web and manager after 1,500 requests and after 1,500 more, of the same conversations."""
    processes = [psutil.Process(server.pids[name]) for name in ("web", "manager")]
    asked = [chat(number % 100, max_tokens=2) for number in range(1500)]
    sizes = []
    for _ in range(3):
        answers = asyncio.run(ask_all(port(server), CHAT, asked, 64))
        assert all(answer.status == 200 for answer in answers)
        sizes.append(sum(process.memory_info().rss for process in processes))
    quiet(server)
    assert sizes[2] - sizes[1] < 4e6, sizes


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_pages_at_once(server: RolloutServer, stream: bool) -> None:
    async def leave() -> None:
        opened = [await asyncio.open_connection("127.0.0.1", port(server)) for _ in range(20)]
        for number, (_, writer) in enumerate(opened):
            body = chat(number, max_tokens=400, stream=stream, n=2)
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
        while server.admin().stats()["running"] < 40:
            await asyncio.sleep(0.01)
        for _, writer in opened:
            writer.transport.abort()

    before = server.admin().stats()["sampled_tokens"]
    asyncio.run(leave())
    stats = quiet(server)
    assert stats["pages_free"] + stats["pages_cached"] == stats["pages_total"]
    assert stats["sampled_tokens"] - before < 40 * 400


def test_no_table_of_the_web_process_grows(tiny_llama: Path, tmp_path: Path) -> None:
    """Against a scripted manager, in this very process, so that its tables can be counted."""
    from rollout_server.api.config import WebConfig
    from tests.integration.scripted_manager import ScriptedManager, one_by_one, serving_app

    manager = ScriptedManager(tmp_path)
    manager.script = lambda submit: one_by_one(submit, [[40, 41, 2]] * submit.n)

    def config(listen_fd: int) -> WebConfig:
        return WebConfig(
            ipc_dirs=[str(tmp_path)],
            model_dir=str(tiny_llama),
            parent_pid=os.getpid(),
            kv_tokens=4096,
            served_name="tiny",
            listen_fd=listen_fd,
            admin_key="admin",
        )

    with serving_app(config) as (url, app):
        counts = []
        for _ in range(3):
            asked = [chat(number % 50, n=1 + number % 3, stream=number % 2 == 0) for number in range(600)]
            answers = asyncio.run(ask_all(int(url.rpartition(":")[2]), CHAT, asked, 32))
            assert all(answer.status == 200 for answer in answers)
            manager.submitted.clear()
            counts.append(sizes_at_rest(app.state.services))
    manager.stop()
    assert counts[1] == counts[2]
    assert counts[2]["services.tasks"] == 0


def sizes_at_rest(services: object) -> dict[str, int]:
    """Once no task is left and a second look finds the same."""
    sizes: dict[str, int] = {}
    while (found := sizes_of_tables(services)) != sizes or found["services.tasks"]:
        sizes = found
        time.sleep(0.2)
        gc.collect()
    return sizes


def sizes_of_tables(root: object) -> dict[str, int]:
    """Length of every container that is reachable from `root` through objects of ours, by its path."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()

    def visit(value: object, path: str) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, dict | list | set | tuple) or hasattr(value, "__len__"):
            sizes[path] = len(value)  # type: ignore[arg-type]
        if type(value).__module__.startswith("rollout_server"):
            for name in {*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())}:
                visit(getattr(value, name, None), f"{path}.{name}")
        elif isinstance(value, list | tuple) and len(value) < 20:
            for number, item in enumerate(value):
                visit(item, f"{path}[{number}]")

    visit(root, "services")
    return sizes
