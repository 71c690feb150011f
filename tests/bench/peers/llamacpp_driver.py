"""Driver of llama.cpp's server, compiled for this machine's processor; see `rollout_server.bench.wire`.

Settings, the best that we know: the checkpoint as GGUF in the same precision; continuous batching; one slot for each
sequence that the scenario has at once, restarted for each concurrency level because idle slots cost time; a cache of its
own for each slot (with the unified cache every sequence's attention passes over all cells); prompt caching, which finds
the slot with the longest common prefix; `n_cmpl` for several answers, which computes the prompt once. Log-probs of the
chosen ids are asked for (`n_probs` 1). Its stream drops ids that are not whole UTF-8 characters, so those are never
sampled (`logit_bias`): a few hundred of 49,152, no change to the work.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rollout_server.bench.scenarios import Scenario
from rollout_server.bench.session import Ask, Deliver
from rollout_server.bench.wire import Setup, drive

START_TIMEOUT_S = 120.0
_OUT_TYPES = {"bfloat16": "bf16", "float32": "f32"}


class LlamaEngine:
    def __init__(self, setup: Setup, gguf: Path) -> None:
        self._setup, self._gguf = setup, gguf
        self._server: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._prefilled = 0
        self._shape = (0, 0)
        self._bias = [[token, False] for token in broken_pieces(Path(setup.model_dir))]

    async def prepare(self, scenario: Scenario) -> None:
        shape = (scenario.max_sequences, scenario.max_context)
        if shape == self._shape and self._server is not None:
            return
        self.close()
        self._shape = shape
        slots, context = shape
        per_slot = (
            -(-(context + 1) // 256) * 256
        )  # it stops one token before a slot is full, and wants multiples of 256
        self._port = _free_port()
        threads = str(self._setup.threads)
        self._server = subprocess.Popen(
            [
                *(f"{self._setup.home}/bin/llama-server", "--model", str(self._gguf), "--offline"),
                *("--host", "127.0.0.1", "--port", str(self._port), "--no-webui"),
                *("--parallel", str(slots), "--ctx-size", str(slots * per_slot), "--no-kv-unified", "--cont-batching"),
                *("--threads", threads, "--threads-batch", threads, "--threads-http", "2", "--log-verbosity", "1"),
            ],
            stdin=subprocess.DEVNULL,
        )
        await self._wait_until_healthy(self._server)

    async def ask(self, ask: Ask, deliver: Deliver) -> None:
        question = {
            "prompt": ask.prompt,
            "n_predict": ask.max_tokens,
            "n_cmpl": ask.n,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": True,
            "ignore_eos": True,
            "logit_bias": self._bias,
            "samplers": ["temperature"],
            "temperature": 1.0,
            "n_probs": 1,
            "seed": ask.seed,
        }
        async for event in self._events("/completion", question):
            if event["stop"]:
                self._prefilled += event["timings"]["prompt_n"] if event["index"] % ask.n == 0 else 0
                continue
            logprobs = [probability["logprob"] for probability in event.get("completion_probabilities", [])]
            deliver(event["index"] % ask.n, event["tokens"], logprobs)

    async def prefill_tokens(self) -> int | None:
        return self._prefilled

    def close(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.wait()
            self._server = None

    async def _wait_until_healthy(self, server: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if server.poll() is not None:
                raise RuntimeError(f"llama-server ended with code {server.returncode}")
            try:
                reader, writer = await self._request("GET", "/health", b"")
            except ConnectionRefusedError:
                await asyncio.sleep(0.1)
                continue
            status = (await reader.readline()).split()
            writer.close()
            if status[1:2] == [b"200"]:
                return
            await asyncio.sleep(0.1)
        raise RuntimeError(f"llama-server did not start within {START_TIMEOUT_S:.0f} s")

    async def _request(self, method: str, path: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**24)
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        await writer.drain()
        return reader, writer

    async def _events(self, path: str, question: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The events of a server-sent stream in chunked encoding."""
        reader, writer = await self._request("POST", path, json.dumps(question).encode())
        try:
            status = await reader.readline()
            chunked = False
            while (line := await reader.readline()).strip():
                chunked |= line.lower().startswith(b"transfer-encoding: chunked")
            if status.split()[1:2] != [b"200"] or not chunked:
                raise RuntimeError(f"llama-server answered {status!r}: {(await reader.read()).decode()[:500]}")
            text = b""
            while size := int(await reader.readline(), 16):
                text += (await reader.readexactly(size + 2))[:-2]
                *events, text = text.split(b"\n\n")
                for event in events:
                    if event.startswith(b"data: {"):
                        yield json.loads(event[6:])
        finally:
            writer.close()


def broken_pieces(model_dir: Path) -> list[int]:
    """Ids of a byte-level vocabulary whose bytes are not whole UTF-8 characters."""
    vocab = json.loads((model_dir / "tokenizer.json").read_text())["model"]["vocab"]
    table = _bytes_of_characters()
    return sorted(number for piece, number in vocab.items() if not _is_whole(piece, table))


def _is_whole(piece: str, table: dict[str, int]) -> bool:
    if any(character not in table for character in piece):
        return True  # an added token: plain text
    try:
        bytes(table[character] for character in piece).decode()
    except UnicodeDecodeError:
        return False
    return True


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins of the 256 bytes: visible Latin-1 characters stand for themselves, others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


def make_gguf(setup: Setup) -> Path:
    """The checkpoint in llama.cpp's format, made once for each version of its weights."""
    weights = sorted(Path(setup.model_dir).glob("*.safetensors"))
    identity = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in weights]
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    target = Path(setup.home) / "models" / f"{key}-{setup.dtype}.gguf"
    if not target.is_file():
        target.parent.mkdir(exist_ok=True)
        # The converter imports its neighbours, and must not find our modules.
        plain = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
        partial = target.with_suffix(f".{os.getpid()}.partial")
        convert = [f"{setup.home}/venv/bin/python", f"{setup.home}/llama.cpp/convert_hf_to_gguf.py", setup.model_dir]
        subprocess.run(
            [*convert, "--outtype", _OUT_TYPES[setup.dtype], "--outfile", str(partial)], check=True, env=plain
        )
        partial.rename(target)
    return target


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@asynccontextmanager
async def start(setup: Setup) -> AsyncIterator[LlamaEngine]:
    engine = LlamaEngine(setup, make_gguf(setup))
    try:
        yield engine
    finally:
        engine.close()


if __name__ == "__main__":
    drive(start)
