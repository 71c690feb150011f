"""The web process's end of the line to one manager: typed messages over a ZeroMQ PAIR socket, inside asyncio.

The client connects, the manager binds. `submit` opens a request with a stream for each of its `n` choices; leaving a
stream's `with` block closes it, and leaving the generation's closes all. A choice that the engine has not finished when its
stream is closed is cancelled there (a stop string was found, a client went away). When the line breaks, everything that
waits fails with `engine_unavailable` instead of waiting for ever. Single-threaded: use it from one event loop.

    client = EngineClient(ipc_dir)          # the directory of the manager's web.ipc
    client.start()                          # inside the running event loop
    with client.submit(prompt_ids, sampling, n=4) as generation:
        tokens = await generation.streams[2].read()
    client.close()
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import zmq
from zmq.utils.monitor import recv_monitor_message

from rollout_server import messages as m
from rollout_server.api.errors import EngineError
from rollout_server.manager.control import is_base

Reply = TypeVar("Reply", m.Scored, m.Updated, m.Done, m.Stats)
Question = m.Score | m.UpdateWeights | m.UnloadAdapter | m.Pause | m.Resume | m.Sleep | m.Wake | m.GetStats


class Stream:
    """One choice of a request. Tokens that arrive between two reads come merged into one message."""

    def __init__(self, closed: Callable[[Stream], None]) -> None:
        self._closed = closed
        self._arrived: list[m.Tokens] = []
        self._failure: EngineError | None = None
        self._to_end = False
        self._waiter: asyncio.Future[None] | None = None
        self.open = True
        """Somebody may still read."""
        self.finished = False
        """The engine has sent the last word."""

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

    def deliver(self, message: m.Tokens | EngineError) -> None:
        if isinstance(message, EngineError):
            self._failure = message
            self.finished = True
        else:
            if self.open:
                self._arrived.append(message)
            self.finished = message.finish_reason is not None
        if self._waiter is not None and not self._waiter.done() and self._ready(self._to_end):
            self._waiter.set_result(None)

    def close(self) -> None:
        """Nobody will read on; what has arrived can still be taken. Idempotent."""
        if self.open:
            self.open = False
            self._closed(self)

    def _ready(self, to_end: bool) -> bool:
        return self._failure is not None or (self.finished if to_end else bool(self._arrived))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Generation:
    """One running request and the streams of its choices. `ended` is called once, however it ends; `cancel` with one choice
    that nobody reads any more, or with None when that is so of all that were left."""

    def __init__(
        self,
        request_id: str,
        n: int,
        cancel: Callable[[str, int | None], None],
        ended: Callable[[], None],
        adapter: str = "",
    ) -> None:
        self.request_id = request_id
        self.adapter = adapter
        self.streams = [Stream(self._deserted) for _ in range(n)]
        self._cancel = cancel
        self._ended: Callable[[], None] | None = ended
        self.heard: Callable[[m.Tokens], None] | None = None
        """Told of every message as it comes, whoever reads it when."""

    @property
    def ended(self) -> bool:
        """The engine is done with it, or was told to forget it."""
        return self._ended is None

    async def read(self, *, to_end: bool = False) -> m.Tokens:
        """Of the only choice, or the first; see `Stream.read`."""
        return await self.streams[0].read(to_end=to_end)

    def deliver(self, message: m.Tokens | EngineError) -> None:
        if isinstance(message, EngineError):
            for stream in self.streams:
                if not stream.finished:
                    stream.deliver(message)
            self._end()
            return
        if self.heard is not None:
            self.heard(message)
        self.streams[message.index].deliver(message)
        if message.finish_reason is not None and not self._awaited():
            self._end()

    def close(self) -> None:
        for stream in self.streams:
            stream.open = False
        if not self.ended:
            self._cancel(self.request_id, None)
            self._end()

    def _deserted(self, stream: Stream) -> None:
        if self.ended or stream.finished:
            return
        if self._awaited():
            self._cancel(self.request_id, self.streams.index(stream))
        else:
            self._cancel(self.request_id, None)
            self._end()

    def _awaited(self) -> bool:
        """Whether somebody waits for more of it."""
        return any(stream.open and not stream.finished for stream in self.streams)

    def _end(self) -> None:
        if self._ended is not None:
            ended, self._ended = self._ended, None
            ended()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _merge(parts: list[m.Tokens]) -> m.Tokens:
    if len(parts) == 1:
        return parts[0]
    return m.Tokens(
        request_id=parts[0].request_id,
        index=parts[0].index,
        ids=[i for part in parts for i in part.ids],
        logprobs=[x for part in parts for x in part.logprobs],
        versions=[v for part in parts for v in part.versions],
        entropies=[x for part in parts for x in part.entropies],
        top_logprobs=[top for part in parts for top in part.top_logprobs],
        finish_reason=parts[-1].finish_reason,
        cached_tokens=max(part.cached_tokens for part in parts),
    )


class EngineClient:
    """`ipc_dir` is the directory of the manager's `web.ipc`."""

    def __init__(self, ipc_dir: Path) -> None:
        self._address = f"ipc://{ipc_dir}/web.ipc"
        self._numbers = itertools.count()
        self._generations: dict[str, Generation] = {}
        self._replies: dict[str, asyncio.Future[m.FromManager]] = {}
        self._ending: EngineError | None = None
        self.lost: set[str] = set()
        """Adapters (`""`: the policy) that it has refused a request for because it lost their weights, without new ones since."""

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

    @property
    def down(self) -> EngineError | None:
        """Why nothing can be asked any more; None while the line stands, or is awaited."""
        return self._ending

    def hang_up(self) -> None:
        """Fail whatever waits and whatever comes: the server is about to end."""
        self._end(EngineError("shutting_down", "the server is shutting down"))

    def close(self) -> None:
        self.hang_up()
        self._loop.remove_reader(self._socket.FD)
        self._loop.remove_reader(self._monitor.FD)
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        self._context.term()

    def submit(
        self,
        prompt_ids: list[int],
        sampling: m.SamplingParams,
        *,
        n: int = 1,
        adapter: str = "",
        priority: int = 0,
        grammar: str = "",
        flow: str = "",
        ended: Callable[[], None] = lambda: None,
    ) -> Generation:
        """`n` choices of one prompt, which is computed once; choice i is drawn with (seed, i, t). See `messages.Submit`.

        Raises EngineError when the server is about to end, or the line is broken.
        """
        request_id = self._new_id()
        generation = Generation(request_id, n, self.cancel, ended, adapter)
        self._send(
            m.Submit(
                request_id=request_id,
                prompt_ids=prompt_ids,
                sampling=sampling,
                n=n,
                priority=priority,
                adapter=adapter,
                grammar=grammar,
                flow=flow,
            )
        )
        self._generations[request_id] = generation
        return generation

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """One choice of a request, or all of it."""
        known = request_id in self._generations
        if index is None:
            self._generations.pop(request_id, None)
        if known and self._ending is None:
            self._send(m.Cancel(request_id=request_id, index=index))

    async def score(self, ids: list[int], adapter: str = "") -> m.Scored:
        """Cancelled, it is forgotten by the engine too."""
        question = m.Score(request_id=self._new_id(), ids=ids, adapter=adapter)
        try:
            return await self._ask(question, m.Scored)
        except EngineError as error:
            if error.code == "weights_lost":
                self.lost.add(adapter)
            raise
        except asyncio.CancelledError:
            if self._ending is None:
                self._send(m.Cancel(request_id=question.request_id))
            raise

    async def update_weights(
        self, source: m.WeightSource, version: int, *, adapter: str = "", running: m.Running = "reprefill"
    ) -> m.Updated:
        """Raises EngineError `weights_rejected`; the old weights are whole and live then."""
        update = m.UpdateWeights(
            request_id=self._new_id(), source=source, version=version, adapter=adapter, running=running
        )
        updated = await self._ask(update, m.Updated)
        if is_base(source):
            self.lost.clear()  # an adapter that was lost on its own is refused once more
        self.lost.discard(adapter)
        return updated

    async def unload_adapter(self, adapter: str) -> None:
        await self._ask(m.UnloadAdapter(request_id=self._new_id(), adapter=adapter), m.Done)
        self.lost.discard(adapter)

    async def pause(self, running: m.Running = "keep") -> None:
        await self._ask(m.Pause(request_id=self._new_id(), running=running), m.Done)

    async def resume(self) -> None:
        await self._ask(m.Resume(request_id=self._new_id()), m.Done)

    async def sleep(self, level: int = 1) -> None:
        await self._ask(m.Sleep(request_id=self._new_id(), level=level), m.Done)

    async def wake(self) -> None:
        await self._ask(m.Wake(request_id=self._new_id()), m.Done)

    async def checksums(self) -> dict[str, str]:
        """Of the live weights, as `messages.Stats` has them."""
        return (await self._ask(m.GetStats(request_id=self._new_id()), m.Stats)).checksums

    async def stats(self, *, check: bool = False) -> dict[str, float]:
        """Counters; `check` verifies pages and tree first (EngineError `integrity`)."""
        return (await self._ask(m.GetStats(request_id=self._new_id(), check=check), m.Stats)).values

    def _new_id(self) -> str:
        if self._ending is not None:
            raise self._ending
        return f"web-{next(self._numbers)}"

    async def _ask(self, question: Question, kind: type[Reply]) -> Reply:
        waiter: asyncio.Future[m.FromManager] = self._loop.create_future()
        self._replies[question.request_id] = waiter
        try:
            self._send(question)
            reply = await waiter
        finally:
            self._replies.pop(question.request_id, None)
        assert isinstance(reply, kind), f"{type(reply).__name__} in answer to {type(question).__name__}"
        return reply

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
        if generation is not None and isinstance(answer, EngineError) and answer.code == "weights_lost":
            self.lost.add(generation.adapter)
        if generation is not None and isinstance(answer, m.Tokens | EngineError):
            generation.deliver(answer)
            if generation.ended:
                self._generations.pop(key, None)
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
            self._end(EngineError("engine_unavailable", "the engine's manager process went away"))

    def _end(self, error: EngineError) -> None:
        """Managers do not come back: once the line is down, whatever comes fails as what waits does."""
        self._ending = self._ending or error
        generations, self._generations = self._generations, {}
        for generation in generations.values():
            generation.deliver(error)
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(error)
