"""What the server remembers of episodes: the order of their calls, and each call durably before the agent gets its end.

Calls are written by one thread of their own, so that the event loop never waits for a disk; what is handed in while it writes
goes into the next transaction together. Secrets are taken out before (`redaction`). Tool calls that the policy made and whose
results come back with a later request become spans of kind `tool`, below the span that made the call. A call whose client went
away is kept with finish reason `abort`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lightning_rl.episode import Call, EpisodeStart, Sampling, Span
from lightning_rl.errors import EpisodeEnded, StoreError
from lightning_rl.otlp.read import Received
from lightning_rl.store import Store
from lightning_rl.store.received import Late
from lightning_rl.tool_uses import same_call
from rollout_server.api.errors import ApiError
from rollout_server.api.redaction import Redaction
from rollout_server.api.rendering.tool_prompt import Message, parsed_arguments
from rollout_server.api.retries import Sendings

T = TypeVar("T")

logger = logging.getLogger("lrl.web")

_KEPT_EPISODES = 4096
_BATCH = 128
"""Calls of one transaction, at most: other processes write, too."""
_AT_ONCE_S = 5.0


@dataclass(frozen=True)
class _OpenTool:
    """A tool call that the policy made and whose result has not been seen."""

    id: str
    """Of its span."""
    name: str
    arguments: Any
    call_id: str
    span_id: str | None
    """Of the call."""
    made_at: float

    def is_named(self, made: Mapping[str, Any]) -> bool:
        """By a tool call as a history tells it."""
        function = made["function"]
        return same_call(self.name, self.arguments) == same_call(function["name"], function["arguments"])


@dataclass
class EpisodeLog:
    """One episode as far as this process follows it."""

    id: str
    sampling: Sampling
    next_index: int
    in_flight: int = 0
    ended: bool = False
    """Whether it is known to have its outcome."""
    open_tools: dict[str, list[_OpenTool]] = field(default_factory=dict)
    """By tool call id, which only some models and providers take care to make unique."""
    seen_tools: set[str] = field(default_factory=set)
    """The tool call ids by now."""
    ambiguous_tools: set[str] = field(default_factory=set)
    """Those of them that came more than once."""
    sendings: Sendings = field(default_factory=Sendings)
    folded: dict[str, str | None] = field(default_factory=dict)
    """Spans of OpenTelemetry's that are none of ours (`otlp.read.Received`); only for the thread that reads them."""

    def reserve(self, count: int) -> int:
        """Indices for `count` calls, in order of arrival; the first is returned. Raises ApiError 409 if the episode has ended."""
        self.check_open()
        first, self.next_index = self.next_index, self.next_index + count
        self.in_flight += count
        return first

    def check_open(self) -> None:
        if self.ended:
            raise _ended(self.id)

    def answered_tools(self, messages: list[Message], now: float, span_id: str | None = None) -> list[Span]:
        """Spans of the tool calls that are answered since the last reply, each reported once. `span_id`: of the request."""
        end = next((at for at in reversed(range(len(messages))) if messages[at]["role"] == "assistant"), -1)
        begin = end
        while begin > 0 and messages[begin - 1]["role"] == "assistant":
            begin -= 1
        told = [made for reply in messages[max(begin, 0) : end + 1] for made in reply.get("tool_calls") or []]
        spans = []
        for message in messages[end + 1 :]:
            if message["role"] == "tool":
                tool_call_id = message.get("tool_call_id", "")
                named = next((made for made in told if made["id"] == tool_call_id), None)
                if named is not None:
                    told.remove(named)
                tool = self._take(tool_call_id, named, span_id)
                if tool is not None:
                    spans.append(_tool_span(self.id, tool_call_id, tool, message["content"], now))
        return spans

    def _take(self, tool_call_id: str, named: Mapping[str, Any] | None, span_id: str | None) -> _OpenTool | None:
        """An id that came once means that tool call, one that came again the call that the history names: the nearest, so the one
        of the same span, the latest reply, the first place in it."""
        waiting = self.open_tools.get(tool_call_id, [])
        fitting = waiting
        if named is not None and tool_call_id in self.ambiguous_tools:
            fitting = [tool for tool in waiting if tool.is_named(named)]
        if not fitting:
            return None
        nearest = max(fitting, key=lambda tool: (tool.span_id == span_id, tool.made_at))  # of equals the first
        waiting.remove(nearest)
        if not waiting:
            del self.open_tools[tool_call_id]
        return nearest

    def expect_tools(self, call: Call) -> None:
        for place, made in enumerate(call.response.get("tool_calls") or []):
            name, arguments, id = made["function"]["name"], parsed_arguments(made), f"tool-{call.id}-{place}"
            if made["id"] in self.seen_tools:
                self.ambiguous_tools.add(made["id"])
            self.seen_tools.add(made["id"])
            tool = _OpenTool(id, name, arguments, call.id, call.span_id, call.ended_at)
            self.open_tools.setdefault(made["id"], []).append(tool)


@dataclass(frozen=True)
class _Entry:
    """A call, the spans that go with it, and who waits for them to be durable."""

    call: Call
    spans: Sequence[Span]
    written: asyncio.Future[None]


class Recorder:
    def __init__(self, store: Store, redaction: Redaction) -> None:
        self._store = store
        self._redaction = redaction
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._logs: OrderedDict[str, asyncio.Task[EpisodeLog]] = OrderedDict()
        self._waiting: list[_Entry] = []
        self._writing: asyncio.Task[None] | None = None

    async def episode(self, episode_id: str) -> EpisodeLog:
        """Raises ApiError 404 for an episode that nobody began."""
        task = self._logs.get(episode_id)
        if task is None:
            task = asyncio.create_task(self._open(episode_id))
            self._logs[episode_id] = task
        self._logs.move_to_end(episode_id)
        try:
            return await asyncio.shield(task)
        except (ApiError, StoreError):
            self._logs.pop(episode_id, None)
            raise

    async def record(self, log: EpisodeLog, call: Call, spans: list[Span]) -> None:
        """Returns when the call is durable. Raises StoreError, and logs it: the client may be gone. Raises ApiError 409 if the
        episode has ended meanwhile."""
        made = call
        try:
            if self._redaction.is_slow:  # others must not wait for it
                call, spans = await asyncio.to_thread(self._redaction.recorded, call, spans)
            entry = _Entry(call, spans, asyncio.get_running_loop().create_future())
            self._waiting.append(entry)
            if self._writing is None:
                self._writing = asyncio.create_task(self._write())
            await entry.written
        except EpisodeEnded as error:
            logger.warning("call %s of episode %s is not recorded: %s", call.index, log.id, error)
            log.ended = True
            raise _ended(log.id) from error
        except StoreError as error:
            logger.error("call %s of episode %s is lost: %s", call.index, log.id, error)
            raise
        finally:
            log.in_flight -= 1
        log.expect_tools(made)

    async def receive(self, log: EpisodeLog, received: Received) -> Late:
        """What the agent's own instrumentation says; returns, when it is durable, what came too late."""
        kept = await asyncio.to_thread(self._redaction.received, received)
        return await self._in_writer(lambda: self._store.add_received(log.id, kept))

    async def calls(self, episode_id: str, beginning: str = "") -> list[Call]:
        """Those that are in the store by now and whose ids begin so."""
        if beginning:
            return await asyncio.to_thread(self._store.calls_beginning, episode_id, beginning)
        return (await asyncio.to_thread(self._store.episode, episode_id)).calls

    def close(self) -> None:
        """Waits for what is being written."""
        self._writer.shutdown(wait=True)
        self._store.close()

    async def _write(self) -> None:
        """Until nothing waits."""
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
                for entry, error in zip(batch, await self._commit(batch), strict=True):
                    if entry.written.done():
                        continue  # whoever waited was cancelled
                    if error is None:
                        entry.written.set_result(None)
                    else:
                        entry.written.set_exception(error)
        finally:
            self._writing = None

    async def _commit(self, batch: Sequence[_Entry]) -> list[Exception | None]:
        """What kept each from being written. Together; one by one if that fails at once, so that none suffers for another.

        A store that takes its time to refuse is at fault itself, and would take it for each of them.
        """
        began = time.monotonic()
        error = await self._try(batch)
        if error is None or len(batch) == 1 or time.monotonic() - began > _AT_ONCE_S:
            return [error] * len(batch)
        return [await self._try([entry]) for entry in batch]

    async def _try(self, batch: Sequence[_Entry]) -> Exception | None:
        def write() -> None:
            kept = [(entry.call, entry.spans) for entry in batch]
            if not self._redaction.is_slow:
                kept = [self._redaction.recorded(call, spans) for call, spans in kept]
            self._store.add_calls([call for call, _ in kept], [span for _, spans in kept for span in spans])

        try:
            await self._in_writer(write)
        except Exception as error:  # raised where the call is waited for
            return error
        return None

    async def _open(self, episode_id: str) -> EpisodeLog:
        def look_up() -> tuple[EpisodeStart | None, int, bool]:
            store = self._store
            return store.start_of(episode_id), store.next_call_index(episode_id), store.has_ended(episode_id)

        start, next_index, ended = await self._in_writer(look_up)
        if start is None:
            raise ApiError(404, f"no episode {episode_id!r} in the store", code="episode_not_found")
        self._forget_idle()
        past = Sendings(has_past=next_index > 0)
        return EpisodeLog(episode_id, start.sampling, next_index, sendings=past, ended=ended)

    def _forget_idle(self) -> None:
        """Whatever is forgotten can be read back from the store, tool calls that wait for results excepted."""
        for episode_id, task in list(self._logs.items())[: max(0, len(self._logs) - _KEPT_EPISODES)]:
            if task.done() and not task.exception() and task.result().in_flight == 0:
                del self._logs[episode_id]

    async def _in_writer(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)


def _ended(episode_id: str) -> ApiError:
    return ApiError(
        409,
        f"episode {episode_id!r} has ended; a client that outlives its rollout must not keep the rollout's URL",
        code="episode_ended",
        final=True,
    )


def _tool_span(episode_id: str, tool_call_id: str, tool: _OpenTool, result: str, now: float) -> Span:
    return Span(
        id=tool.id,
        episode_id=episode_id,
        name=tool.name,
        kind="tool",
        parent_id=tool.span_id,
        started_at=tool.made_at,
        ended_at=now,
        attributes={
            "tool_call_id": tool_call_id,
            "call_id": tool.call_id,
            "arguments": tool.arguments,
            "result": result,
        },
    )
