"""The load figures of docs/reliability.md: `python -m tests.bench.load` (tiny model; `--model smollm2-135m` for a real one).

1,000 streams at once; then 10,000 requests over 64 connections, each a conversation of its own, with memory of web and manager read
after every thousand; then 200 clients that vanish in mid-stream. Ends with the engine's own check of pages, references and tree.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import track

from rollout_server.launch import RolloutServer
from rollout_server.models.catalog import resolve_model
from tests.bench.bench_web import percentile
from tests.web_client import ask_all

CHAT = "/v1/chat/completions"


def chat(number: int, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": f"Hello, I am number {number}. What is {number} + {number // 3}?"}]
    return json.dumps({"model": "load", "messages": messages, "ignore_eos": True, **fields}).encode()


async def vanish(port: int, count: int, server: RolloutServer) -> float:
    """Seconds from the moment that `count` clients are gone until nothing runs or waits."""
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
    for number, (_, writer) in enumerate(opened):
        body = chat(number, max_tokens=2000, stream=True)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
    while True:
        stats = await asyncio.to_thread(server.admin().stats)
        if stats["running"] + stats["waiting"] >= count:
            break
    for _, writer in opened:
        writer.transport.abort()
    gone = time.perf_counter()
    while True:
        stats = await asyncio.to_thread(server.admin().stats)
        if not stats["running"] and not stats["waiting"]:
            return time.perf_counter() - gone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=10_000)
    args = parser.parse_args()
    console = Console()
    with (
        tempfile.TemporaryDirectory() as logs,
        RolloutServer(
            resolve_model(args.model),
            "load",
            "float32",
            log_dir=Path(logs),
            kv_tokens=65536,
            max_batch=256,
            device="cpu",
        ) as server,
    ):
        port = int(server.base_url.rpartition(":")[2])
        began = time.perf_counter()
        asked = [chat(number, max_tokens=32, stream=True) for number in range(args.streams)]
        answers = asyncio.run(ask_all(port, CHAT, asked, args.streams))
        seconds = time.perf_counter() - began
        whole = sum(answer.status == 200 and answer.body.endswith(b"data: [DONE]\n\n") for answer in answers)
        first = [answer.events[0] - answer.asked_at for answer in answers if answer.events]
        console.print(
            f"{args.streams} streams at once: {whole} whole, {seconds:.1f} s, first event p50 {percentile(first, 0.5):.2f} s, "
            f"p99 {percentile(first, 0.99):.2f} s, {args.streams * 32 / seconds:.0f} tokens/s"
        )
        processes = {name: psutil.Process(server.pids[name]) for name in ("web", "manager", "worker")}
        rows, failed, began = [], 0, time.perf_counter()
        for start in track(range(0, args.requests, 1000), description="requests", console=console):
            asked = [chat(number, max_tokens=4) for number in range(start, min(start + 1000, args.requests))]
            failed += sum(answer.status != 200 for answer in asyncio.run(ask_all(port, CHAT, asked, 64)))
            rows.append({name: process.memory_info().rss / 2**20 for name, process in processes.items()})
        seconds = time.perf_counter() - began
        console.print(f"{args.requests} requests: {failed} failed, {args.requests / seconds:.0f} a second")
        for number, row in enumerate(rows, 1):
            console.print(
                f"  after {number * 1000}: " + ", ".join(f"{name} {size:.0f} MiB" for name, size in row.items())
            )
        waited = asyncio.run(vanish(port, 200, server))
        stats = server.admin().stats(check=True)
        console.print(
            f"200 clients vanished: {waited:.2f} s until nothing ran; pages free + cached = "
            f"{stats['pages_free'] + stats['pages_cached']:.0f} of {stats['pages_total']:.0f}"
        )


if __name__ == "__main__":
    main()
