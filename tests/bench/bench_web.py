"""What the web layer costs: tokens a second and added time of each dialect beside the engine alone.

    python -m tests.bench.bench_web --model smollm2-135m --streams 64 --rounds 3

Rounds are interleaved: the engine spoken to directly (no HTTP, no text), then `/generate`, chat whole, and both streamed, all
with the same prompts (as ids and as a conversation), the same number of sampled tokens, and a client that parses nothing. The
client runs on the same cores. CPU seconds are of the web process.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from rollout_server import messages as m
from rollout_server.api.rendering.render import Renderer
from rollout_server.bench.lrl_driver import LrlEngine, start
from rollout_server.bench.wire import Setup
from rollout_server.launch import RolloutServer
from rollout_server.models.catalog import resolve_model
from tests.web_client import Answer, ask_all

VARIANTS = ("generate", "chat", "generate-stream", "chat-stream")
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly box in the rain".split()  # noqa: SIM905


@dataclass
class Measured:
    tokens_per_s: list[float] = field(default_factory=list)
    request_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    """Between two events of a stream."""
    web_cpu_s: float = 0.0
    tokens: int = 0


def conversation(number: int, words: int) -> list[dict[str, str]]:
    text = " ".join(WORDS[(number * 7 + at * (1 + number % 5)) % len(WORDS)] for at in range(words))
    return [{"role": "user", "content": f"{number}: {text}"}]


def bodies(
    variant: str, conversations: Sequence[list[dict[str, str]]], prompts: Sequence[list[int]], out: int
) -> list[bytes]:
    stream = variant.endswith("stream")
    if variant.startswith("chat"):
        common = {"model": "bench", "max_tokens": out, "ignore_eos": True, "stream": stream}
        return [json.dumps({**common, "messages": messages}).encode() for messages in conversations]
    params = {"max_new_tokens": out, "ignore_eos": True}
    return [json.dumps({"input_ids": ids, "sampling_params": params, "stream": stream}).encode() for ids in prompts]


async def ask_engine(engine: LrlEngine, prompts: Sequence[list[int]], out: int, streams: int) -> float:
    """Tokens a second."""
    waiting = list(prompts)
    sampling = m.SamplingParams(max_tokens=out)

    async def client() -> None:
        while waiting:
            with engine._client.submit(waiting.pop(), sampling) as generation:
                while (await generation.read()).finish_reason is None:
                    pass

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(streams)))
    return len(prompts) * out / (time.perf_counter() - began)


async def ask_web(port: int, path: str, asked: Sequence[bytes], streams: int) -> tuple[list[Answer], float]:
    """All answers, and the seconds that they took together."""
    began = time.perf_counter()
    answers = await ask_all(port, path, asked, streams)
    seconds = time.perf_counter() - began
    refused = [answer for answer in answers if answer.status != 200]
    if refused:
        raise RuntimeError(f"{len(refused)} requests were refused, one with {refused[0].body[:300]!r}")
    return answers, seconds


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def play_web(
    server: RolloutServer, variant: str, asked: Sequence[bytes], out: int, streams: int, into: Measured
) -> None:
    path = "/v1/chat/completions" if variant.startswith("chat") else "/generate"
    port, web = int(server.base_url.rpartition(":")[2]), server.pids["web"]
    before = cpu_seconds(web)
    answers, seconds = asyncio.run(ask_web(port, path, asked, streams))
    into.web_cpu_s += cpu_seconds(web) - before
    into.tokens += len(asked) * out
    into.tokens_per_s.append(len(asked) * out / seconds)
    into.request_s += [answer.seconds for answer in answers]
    for answer in answers:
        into.token_s += [b - a for a, b in zip(answer.events, answer.events[1:], strict=False)]


async def play_engine(
    setup: Setup, warm: Sequence[list[int]], prompts: Sequence[list[int]], out: int, streams: int
) -> float:
    async with start(setup) as engine:
        await ask_engine(engine, warm, 4, streams)
        return await ask_engine(engine, prompts, out, streams)


def percentile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else float("nan")


def show(measured: dict[str, Measured], engine: list[float]) -> None:
    own = statistics.median(engine)
    table = Table(
        "", "tokens/s", "of the engine's", "request p50 / p99", "token p50 / p99", "web CPU a token", title="web layer"
    )
    table.add_row("engine alone", f"{own:.0f}", "100 %", "", "", "")
    for variant, m_ in measured.items():
        rate = statistics.median(m_.tokens_per_s)
        table.add_row(
            variant,
            f"{rate:.0f}",
            f"{100 * rate / own:.0f} %",
            f"{1e3 * percentile(m_.request_s, 0.5):.0f} / {1e3 * percentile(m_.request_s, 0.99):.0f} ms",
            f"{1e3 * percentile(m_.token_s, 0.5):.1f} / {1e3 * percentile(m_.token_s, 0.99):.1f} ms"
            if m_.token_s
            else "",
            f"{1e6 * m_.web_cpu_s / m_.tokens:.0f} µs",
        )
    Console(width=140).print(table)
    for chat, plain in (("chat", "generate"), ("chat-stream", "generate-stream")):
        added = [
            percentile(measured[chat].request_s, q) - percentile(measured[plain].request_s, q) for q in (0.5, 0.99)
        ]
        print(f"{chat} adds to {plain}, a request: p50 {1e3 * added[0]:.1f} ms, p99 {1e3 * added[1]:.1f} ms")
    added = [
        percentile(measured["chat-stream"].token_s, q) - percentile(measured["generate-stream"].token_s, q)
        for q in (0.5, 0.99)
    ]
    print(f"chat-stream adds to generate-stream, a token: p50 {1e3 * added[0]:.2f} ms, p99 {1e3 * added[1]:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--words", type=int, default=90)
    parser.add_argument("--out", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model_dir = resolve_model(args.model)
    renderer = Renderer(model_dir)
    numbers = itertools.count()

    def fresh() -> tuple[list[list[dict[str, str]]], list[list[int]]]:
        """Conversations that nobody has had yet, and their prompts: no prefix of them is known."""
        made = [conversation(next(numbers), args.words) for _ in range(args.requests)]
        return made, [renderer.prompt(list(messages), []) for messages in made]

    scratch = tempfile.mkdtemp(prefix="lrl-bench-")
    setup = Setup(
        model_dir=str(model_dir),
        dtype=args.dtype,
        threads=os.cpu_count() or 1,
        kv_tokens=65536,
        kv_bytes=0,
        max_sequences=args.streams,
        max_context=2048,
        adapters={},
        scratch=scratch,
    )
    measured = {variant: Measured() for variant in VARIANTS}
    engine: list[float] = []
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}: the engine alone", flush=True)
        engine.append(asyncio.run(play_engine(setup, fresh()[1], fresh()[1], args.out, args.streams)))
        with (
            tempfile.TemporaryDirectory() as logs,
            RolloutServer(
                model_dir, "bench", args.dtype, log_dir=Path(logs), max_batch=args.streams, device="cpu"
            ) as server,
        ):
            warm = bodies("chat", *fresh(), 4)
            play_web(server, "chat", warm, 4, args.streams, Measured())
            for variant in VARIANTS if number % 2 == 0 else VARIANTS[::-1]:
                print(f"round {number + 1} of {args.rounds}: {variant}", flush=True)
                asked = bodies(variant, *fresh(), args.out)
                play_web(server, variant, asked, args.out, args.streams, measured[variant])
    show(measured, engine)


if __name__ == "__main__":
    main()
