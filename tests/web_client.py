"""A client that costs as little as one can: HTTP/1.1 over asyncio streams, bodies made beforehand, events counted, not parsed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

EVENT = b"data: {"


@dataclass
class Answer:
    status: int
    asked_at: float
    """Seconds of `time.perf_counter`."""
    ended_at: float = 0.0
    events: list[float] = field(default_factory=list)
    """When each server-sent event came."""
    body: bytes = b""

    @property
    def seconds(self) -> float:
        return self.ended_at - self.asked_at


class Connection:
    """One connection, kept alive; one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Self:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=2**24))

    async def post(self, path: str, body: bytes) -> Answer:
        asked_at = time.perf_counter()
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        reply = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        answer = Answer(int(reply.split(b" ", 2)[1]), asked_at)
        if b"content-length:" in reply:
            length = int(reply.split(b"content-length:")[1].split(b"\r\n")[0])
            answer.body = await self._reader.readexactly(length)
        else:
            await self._read_chunks(answer)
        answer.ended_at = time.perf_counter()
        return answer

    async def _read_chunks(self, answer: Answer) -> None:
        parts = []
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            chunk = await self._reader.readexactly(size + 2)
            answer.events += [time.perf_counter()] * chunk.count(EVENT)
            parts.append(chunk[:-2])
        await self._reader.readexactly(2)
        answer.body = b"".join(parts)

    def close(self) -> None:
        self._writer.close()


async def ask_all(port: int, path: str, asked: Sequence[bytes], connections: int) -> list[Answer]:
    """Every body once, in order of the first to be free."""
    opened = [await Connection.open(port) for _ in range(connections)]
    waiting, answers = list(reversed(asked)), []

    async def client(connection: Connection) -> None:
        while waiting:
            answers.append(await connection.post(path, waiting.pop()))

    await asyncio.gather(*(client(connection) for connection in opened))
    for connection in opened:
        connection.close()
    return answers
