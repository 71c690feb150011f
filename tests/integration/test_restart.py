"""A worker that is killed is there again with the same weights, and replies do not tell that it was gone.

The real manager and worker with the tiny model, spoken to as the web process speaks to them; and the whole server, killed and
drained.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import msgspec
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_rl.errors import ServerError
from rollout_server import messages as m
from rollout_server.api.engine.engine_client import EngineClient
from rollout_server.api.errors import EngineError
from rollout_server.config import EngineConfig
from rollout_server.launch import RolloutServer
from rollout_server.weight_sources import publish_shared_memory

DRAIN_S = 60
ADAPTER: dict[str, object] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "target_modules": ["q_proj"],
}


@asynccontextmanager
async def engine(model: Path, directory: Path, **settings: Any) -> AsyncIterator[tuple[EngineClient, Path]]:
    """A manager and its worker, and the directory that they share."""
    directory.mkdir()
    config = EngineConfig(
        ipc_dir=str(directory),
        model_dir=str(model),
        parent_pid=os.getpid(),
        device="cpu",
        **{"kv_tokens": 8192, "threads": 1, **settings},
    )
    file = directory / "config.json"
    file.write_text(json.dumps(msgspec.to_builtins(config)))
    manager = subprocess.Popen([sys.executable, "-m", "rollout_server.manager.process", str(file)])
    client = EngineClient(directory)
    client.start()
    try:
        ready = asyncio.ensure_future(client.stats())
        while not ready.done():
            assert manager.poll() is None, "the manager could not start"
            await asyncio.sleep(0.05)
        yield client, directory
    finally:
        client.close()
        manager.send_signal(signal.SIGINT)
        assert manager.wait(60) == 0


def kill_worker(directory: Path) -> None:
    os.kill(int((directory / "worker.pid").read_text()), signal.SIGKILL)


async def up_again(client: EngineClient, restarts: int) -> dict[str, float]:
    while True:
        stats = await client.stats(check=True)
        if stats["worker_restarts"] >= restarts and stats["worker_up"]:
            return stats
        await asyncio.sleep(0.02)


async def ask(client: EngineClient, seed: int) -> list[tuple[list[int], list[float], list[int]]]:
    """Two choices of a prompt that belongs to the seed."""
    rng = random.Random(seed)
    prompt = [rng.randrange(3, 40000) for _ in range(rng.randrange(1, 200))]
    sampling = m.SamplingParams(max_tokens=rng.randrange(100, 400), seed=seed, temperature=0.9)
    with client.submit(prompt, sampling, n=2) as generation:
        return [
            (whole.ids, whole.logprobs, whole.versions)
            for whole in [await stream.read(to_end=True) for stream in generation.streams]
        ]


def test_replies_are_the_same_whenever_the_worker_is_killed(tiny_llama: Path, tmp_path: Path) -> None:
    """Ids and log-probs bit for bit, under a load that preempts and caches."""

    async def run() -> None:
        settings = {"kv_tokens": 4096, "max_batch": 6, "host_kv_tokens": 2048, "batch_invariant": True}
        async with engine(tiny_llama, tmp_path / "calm", **settings) as (client, _):
            expected = await asyncio.gather(*(ask(client, seed) for seed in range(10)))
        sampled = sum(len(ids) for choices in expected for ids, _, _ in choices)
        moments = sorted(random.Random(7).sample(range(1, sampled * 3 // 4), 3))
        async with engine(tiny_llama, tmp_path / "killed", **settings) as (client, directory):
            asking = asyncio.gather(*(ask(client, seed) for seed in range(10)))
            for restarts, moment in enumerate(moments, 1):
                while (await client.stats())["sampled_tokens"] < moment:
                    await asyncio.sleep(0.005)
                assert not asking.done(), "it was killed too late"
                kill_worker(directory)
                await up_again(client, restarts)
            assert await asking == expected
            stats = await client.stats(check=True)
        assert stats["running"] == stats["waiting"] == 0
        assert stats["recomputed_tokens"] > 0

    asyncio.run(run())


def changed(tiny_llama: Path, target: Path) -> Path:
    weights = load_file(tiny_llama / "model.safetensors")
    target.mkdir()
    save_file({name: w + 0.05 * torch.randn_like(w) for name, w in weights.items()}, target / "model.safetensors")
    return target


def adapter(tiny_llama: Path) -> dict[str, torch.Tensor]:
    weight = load_file(tiny_llama / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    return {
        f"{module}.lora_A.weight": torch.randn(4, weight.shape[1]),
        f"{module}.lora_B.weight": torch.randn(weight.shape[0], 4),
    }


def test_published_weights_and_adapters_are_there_again(tiny_llama: Path, tmp_path: Path) -> None:
    ids = list(range(20, 60))

    async def scores(client: EngineClient) -> list[list[float]]:
        return [(await client.score(ids, name)).logprobs for name in ("", "file", "memory")]

    async def run() -> None:
        async with engine(tiny_llama, tmp_path / "engine") as (client, directory):
            (plain,) = [(await client.score(ids)).logprobs]
            published = changed(tiny_llama, tmp_path / "base")
            await client.update_weights(m.Directory(path=str(published)), 4)
            tensors = adapter(tiny_llama)
            with publish_shared_memory(tensors, ADAPTER) as source:
                await client.update_weights(source, 5, adapter="memory")
            save_file(adapter(tiny_llama), published / "adapter_model.safetensors")
            (published / "adapter_config.json").write_text(json.dumps(ADAPTER))
            await client.update_weights(m.Directory(path=str(published)), 6, adapter="file")
            shutil.rmtree(published)
            before = await scores(client)
            assert plain not in before
            kill_worker(directory)
            assert await scores(client) == before  # they wait
            assert (await client.score(ids)).version == 4

    asyncio.run(run())


def test_base_weights_out_of_shared_memory_are_missed_until_they_come_again(tiny_llama: Path, tmp_path: Path) -> None:
    async def run() -> None:
        async with engine(tiny_llama, tmp_path / "engine") as (client, directory):
            tensors = load_file(changed(tiny_llama, tmp_path / "base") / "model.safetensors")
            with publish_shared_memory(tensors) as source:
                await client.update_weights(source, 1)
                (before,) = [(await client.score([5, 6, 7])).logprobs]
                kill_worker(directory)
                with pytest.raises(EngineError) as caught:
                    await ask(client, 1)
                assert caught.value.code == "weights_lost"
                await client.update_weights(source, 2)
            assert (await client.score([5, 6, 7])).logprobs == before

    asyncio.run(run())


def test_a_worker_killed_over_and_over_is_given_up_with_words(tiny_llama: Path, tmp_path: Path) -> None:
    with RolloutServer(tiny_llama, "tiny", "float32", log_dir=tmp_path, kv_tokens=1024, threads=1) as server:
        pids = server.pids
        for _ in range(3):
            killed = server.pids["worker"]
            os.kill(killed, signal.SIGKILL)
            until(lambda killed=killed: server.pids["worker"] != killed and healthy(server))  # type: ignore[misc]
            server.check()
        os.kill(server.pids["worker"], signal.SIGKILL)
        until(lambda: ended(server))
        with pytest.raises(ServerError, match="worker process ended with signal 9, as did those before it"):
            server.check()
        answer = httpx.get(f"{server.base_url}/health")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    assert not any(map(alive, pids.values()))


def test_a_replica_that_is_gone_is_avoided(tiny_llama: Path, tmp_path: Path) -> None:
    with RolloutServer(tiny_llama, "tiny", "float32", log_dir=tmp_path, kv_tokens=1024, threads=1, dp=2) as server:
        os.kill(server.pids["manager-0"], signal.SIGKILL)
        until(lambda: "0" in httpx.get(f"{server.base_url}/health").json().get("down", {}))
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="x", max_retries=0)
        for _ in range(4):
            made = client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=4)
            assert made.usage is not None
        server.check_serving()
        with pytest.raises(ServerError, match="manager-0 process ended with signal 9"):
            server.check()
        os.kill(server.pids["manager-1"], signal.SIGKILL)
        until(lambda: httpx.get(f"{server.base_url}/health").status_code == 503)
        assert "replica 1" in httpx.get(f"{server.base_url}/health").json()["error"]["message"]
        with pytest.raises(ServerError):
            server.check_serving()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    code = "import sys; from lightning_rl.cli import main; sys.exit(main())"
    arguments = ["serve", "--model", "tiny-llama", "--port", "0", "--threads", "1", "--log-dir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--drain-s", str(DRAIN_S)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    line = next(line for line in process.stdout if "serving" in line)
    yield process, line.split(" at ")[1].split("/v1")[0]
    process.kill()
    process.wait()
    process.stdout.close()


def generate(url: str, tokens: int) -> httpx.Response:
    body = {"model": "tiny-llama", "prompt": [5, 6, 7], "max_tokens": tokens, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


class Held:
    """A request that the server has begun to read and that ends only when told to: no clock decides whether it is under way."""

    def __init__(self, url: str) -> None:
        self._body = json.dumps(
            {"model": "tiny-llama", "prompt": [5, 6, 7], "max_tokens": 40, "ignore_eos": True}
        ).encode()
        host, port = url.removeprefix("http://").split(":")
        self._socket = socket.create_connection((host, int(port)), timeout=60)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        )
        self._socket.sendall(f"{head}content-length: {len(self._body)}\r\nexpect: 100-continue\r\n\r\n".encode())
        assert self._socket.recv(4096).startswith(b"HTTP/1.1 100 ")

    def is_cut_off(self) -> bool:
        with self._socket, contextlib.suppress(ConnectionResetError):
            return self._socket.recv(65536) == b""
        return True

    def finish(self) -> dict[str, Any]:
        self._socket.sendall(self._body)
        answer = b"".join(iter(lambda: self._socket.recv(65536), b""))
        self._socket.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), answer
        return cast(dict[str, Any], json.loads(body))


def test_sigterm_lets_requests_finish_and_refuses_new_ones(serve: tuple[subprocess.Popen[str], str]) -> None:
    process, url = serve
    held = Held(url)
    process.send_signal(signal.SIGTERM)
    until(lambda: generate(url, 1).status_code == 503)
    refused = generate(url, 1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert int(refused.headers["retry-after"]) > 0
    assert held.finish()["usage"]["completion_tokens"] == 40
    assert process.wait(60) == 0


def test_a_sigterm_to_all_processes_at_once_lets_requests_finish(
    serve: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    """As systemd and Slurm send it."""
    process, url = serve
    held = Held(url)
    body = {"model": "tiny-llama", "prompt": [5, 6, 7], "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        family = [process.pid, *children(process.pid)]
        family += [grandchild for child in family[1:] for grandchild in children(child)]
        assert len(family) == 4, "not web, manager and worker"
        for pid in family:
            os.kill(pid, signal.SIGTERM)
        until(lambda: generate(url, 1).status_code == 503)
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert held.finish()["usage"]["completion_tokens"] == 40
    assert process.wait(60) == 0
    until(lambda: not any(map(alive, family)))
    assert not list(tmp_path.glob("lrl-*"))


def children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for thread in threads for child in thread.read_text().split()]


def test_a_manager_does_not_wait_for_grammars_when_it_ends(tiny_llama: Path, tmp_path: Path) -> None:
    """Each costs seconds; nobody waits for them any more."""

    async def run() -> float:
        async with engine(tiny_llama, tmp_path / "engine", kv_tokens=1024) as (client, _):
            for number in range(20):
                properties = {f"{number} {i:x}": {} for i in range(2500)}
                grammar = json.dumps({"grammars": [{"json_schema": {"type": "object", "properties": properties}}]})
                client.submit([1, 2, 3], m.SamplingParams(), grammar=grammar)
            while (await client.stats())["compiling"] < 19:
                await asyncio.sleep(0.01)
            return time.monotonic()

    began = asyncio.run(run())
    assert time.monotonic() - began < 10


def test_a_second_signal_ends_at_once(serve: tuple[subprocess.Popen[str], str]) -> None:
    """And cuts off who would have been waited for: a request that is still read, and an answer that the engine works at."""
    process, url = serve
    held = Held(url)
    body = {"model": "tiny-llama", "prompt": [5, 6, 7], "max_tokens": 1900, "n": 4, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        until(lambda: generate(url, 1).status_code == 503)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
        assert time.monotonic() - began < DRAIN_S / 2
        told = []
        with contextlib.suppress(httpx.TransportError):
            told += lines
        assert "data: [DONE]" not in told
    assert held.is_cut_off()


def healthy(server: RolloutServer) -> bool:
    return httpx.get(f"{server.base_url}/health").status_code == 200


def ended(server: RolloutServer) -> bool:
    return bool(server.ended())


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
