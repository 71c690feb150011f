"""The web process's end of the line to the manager: typed messages over one ZeroMQ PAIR socket, inside asyncio.

The client connects, the manager binds. A generation is opened with `submit` and closed by leaving its `with` block:
whatever ends it early (a stop string, a client that went away) sends `Cancel`. When the line breaks, everything that
waits fails with `engine_unavailable` instead of waiting for ever. Single-threaded: use it from one event loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from rollout_server import messages as m
from rollout_server.api.errors import EngineError


class Generation:
    """One running request. Tokens that arrive between two reads come merged into one message."""

    def __init__(self, request_id: str, cancel: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._arrived: list[m.Tokens] = []
        self._failure: EngineError | None = None
        self._finished = False
        self._to_end = False
        self._waiter: asyncio.Future[None] | None = None

    async def read(self, *, to_end: bool = False) -> m.Tokens:
        """The tokens sampled since the last read, at least one message; `to_end` waits for the last one.

        Raises:
            EngineError: the engine failed the request.
        """
        while not self._ready(to_end):
            self._to_end = to_end
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._failure is not None:
            raise self._failure
        merged = self.take()
        assert merged is not None
        return merged

    def take(self) -> m.Tokens | None:
        """What has arrived by now, without waiting."""
        arrived, self._arrived = self._arrived, []
        return _merge(arrived) if arrived else None

    def _ready(self, to_end: bool) -> bool:
        return self._failure is not None or (self._finished if to_end else bool(self._arrived))

    def deliver(self, message: m.Tokens | EngineError) -> None:
        if isinstance(message, EngineError):
            self._failure = message
            self._finished = True
        else:
            self._arrived.append(message)
            self._finished = message.finish_reason is not None
        if self._waiter is not None and not self._waiter.done() and self._ready(self._to_end):
            self._waiter.set_result(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            self._cancel(self.request_id)


def _merge(parts: list[m.Tokens]) -> m.Tokens:
    if len(parts) == 1:
        return parts[0]
    return m.Tokens(
        request_id=parts[0].request_id,
        ids=[i for part in parts for i in part.ids],
        logprobs=[x for part in parts for x in part.logprobs],
        versions=[v for part in parts for v in part.versions],
        top_logprobs=[top for part in parts for top in part.top_logprobs],
        finish_reason=parts[-1].finish_reason,
        cached_tokens=max(part.cached_tokens for part in parts),
    )


class EngineClient:
    def __init__(self, ipc_dir: Path) -> None:
        self._address = f"ipc://{ipc_dir}/web.ipc"
        self._numbers = itertools.count()
        self._generations: dict[str, Generation] = {}
        self._replies: dict[str, asyncio.Future[m.FromManager]] = {}
        self._ending: EngineError | None = None

    def start(self) -> None:
        """Connect; the manager may come later. Call inside the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(self._address)
        self._loop.add_reader(self._socket.FD, self._drain)
        self._loop.add_reader(self._monitor.FD, self._drain_monitor)
        self._drain()  # ZeroMQ announces messages only to a reader that found nothing before
        self._drain_monitor()

    def hang_up(self) -> None:
        """Fail whatever waits and whatever comes: the server is about to end."""
        self._ending = EngineError("shutting_down", "the server is shutting down")
        self._fail_all(self._ending)

    def close(self) -> None:
        self.hang_up()
        self._loop.remove_reader(self._socket.FD)
        self._loop.remove_reader(self._monitor.FD)
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        self._context.term()

    def submit(self, prompt_ids: list[int], sampling: m.SamplingParams) -> Generation:
        """Raises EngineError when the server is about to end."""
        request_id = self._new_id()
        generation = Generation(request_id, self.cancel)
        self._generations[request_id] = generation
        self._send(m.Submit(request_id=request_id, prompt_ids=prompt_ids, sampling=sampling))
        return generation

    def cancel(self, request_id: str) -> None:
        if self._generations.pop(request_id, None) is not None:
            self._send(m.Cancel(request_id=request_id))

    async def score(self, ids: list[int]) -> m.Scored:
        reply = await self._ask(m.Score(request_id=self._new_id(), ids=ids))
        assert isinstance(reply, m.Scored)
        return reply

    async def update_weights(self, path: str, version: int) -> m.Updated:
        reply = await self._ask(m.UpdateWeights(request_id=self._new_id(), path=path, version=version))
        assert isinstance(reply, m.Updated)
        return reply

    async def stats(self) -> dict[str, float]:
        reply = await self._ask(m.GetStats(request_id=self._new_id()))
        assert isinstance(reply, m.Stats)
        return reply.values

    def _new_id(self) -> str:
        if self._ending is not None:
            raise self._ending
        return f"web-{next(self._numbers)}"

    async def _ask(self, question: m.Score | m.UpdateWeights | m.GetStats) -> m.FromManager:
        reply: asyncio.Future[m.FromManager] = self._loop.create_future()
        self._replies[question.request_id] = reply
        self._send(question)
        try:
            return await reply
        finally:
            self._replies.pop(question.request_id, None)

    def _send(self, message: m.ToManager) -> None:
        self._socket.send(m.encode(message), zmq.NOBLOCK)
        self._loop.call_soon(self._drain)  # sending may consume the edge that announces a message

    def _drain(self) -> None:
        while not self._socket.closed:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._dispatch(m.decode_from_manager(frame))

    def _dispatch(self, message: m.FromManager) -> None:
        key = message.request_id
        answer = EngineError(message.code, message.message) if isinstance(message, m.Failed) else message
        generation = self._generations.get(key)
        if generation is not None and isinstance(answer, m.Tokens | EngineError):
            if isinstance(answer, EngineError) or answer.finish_reason is not None:
                del self._generations[key]
            generation.deliver(answer)
            return
        reply = self._replies.get(key)
        if reply is None or reply.done():
            return  # cancelled while the answer was on its way
        if isinstance(answer, EngineError):
            reply.set_exception(answer)
        else:
            reply.set_result(answer)

    def _drain_monitor(self) -> None:
        while not self._monitor.closed:
            try:
                recv_monitor_message(self._monitor, zmq.NOBLOCK)
            except zmq.Again:
                return
            self._fail_all(EngineError("engine_unavailable", "the engine's manager process went away"))

    def _fail_all(self, error: EngineError) -> None:
        generations, self._generations = self._generations, {}
        for generation in generations.values():
            generation.deliver(error)
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(error)
