"""What the server remembers of episodes: the order of their calls, and each call durably before the agent gets its end.

Calls are written by one thread of their own, so that the event loop never waits for a disk. Tool calls that the policy
made and whose results come back with a later request become spans of kind `tool`. A call whose client went away is kept
with finish reason `abort`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lightning_rl.episode import Call, Sampling, Span
from lightning_rl.errors import StoreError
from lightning_rl.store import Store
from rollout_server.api.errors import ApiError
from rollout_server.api.rendering.tool_prompt import Message, parsed_arguments

T = TypeVar("T")

logger = logging.getLogger("lrl.web")

_KEPT_EPISODES = 4096


@dataclass(frozen=True)
class _OpenTool:
    """A tool call that the policy made and whose result has not been seen."""

    name: str
    arguments: Any
    call_id: str
    made_at: float


@dataclass
class EpisodeLog:
    """One episode as far as this process follows it."""

    id: str
    sampling: Sampling
    next_index: int
    in_flight: int = 0
    open_tools: dict[str, _OpenTool] = field(default_factory=dict)

    def reserve(self, count: int) -> int:
        """Indices for `count` calls, in order of arrival; the first is returned."""
        first, self.next_index = self.next_index, self.next_index + count
        self.in_flight += count
        return first

    def answered_tools(self, messages: list[Message], now: float) -> list[Span]:
        """Spans of the tool calls that are answered since the last reply, each reported once."""
        spans = []
        for message in reversed(messages):
            if message["role"] == "assistant":
                break
            if message["role"] != "tool":
                continue
            tool_call_id = message.get("tool_call_id", "")
            tool = self.open_tools.pop(tool_call_id, None)
            if tool is not None:
                spans.append(_tool_span(self.id, tool_call_id, tool, message["content"], now))
        return spans[::-1]

    def expect_tools(self, call: Call) -> None:
        for made in call.response.get("tool_calls") or []:
            name, arguments = made["function"]["name"], parsed_arguments(made)
            self.open_tools[made["id"]] = _OpenTool(name, arguments, call.id, call.ended_at)


class Recorder:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._logs: OrderedDict[str, asyncio.Task[EpisodeLog]] = OrderedDict()

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
        """Returns when the call is durable. Raises StoreError, and logs it: the client may be gone."""

        def write() -> None:
            if spans:
                self._store.add_spans(spans)
            self._store.add_call(call)

        try:
            await self._in_writer(write)
        except StoreError as error:
            logger.error("call %s of episode %s is lost: %s", call.index, log.id, error)
            raise
        finally:
            log.in_flight -= 1
        log.expect_tools(call)

    def close(self) -> None:
        """Waits for what is being written."""
        self._writer.shutdown(wait=True)
        self._store.close()

    async def _open(self, episode_id: str) -> EpisodeLog:
        start = await self._in_writer(lambda: self._store.start_of(episode_id))
        if start is None:
            raise ApiError(404, f"no episode {episode_id!r} in the store", code="episode_not_found")
        next_index = await self._in_writer(lambda: self._store.next_call_index(episode_id))
        self._forget_idle()
        return EpisodeLog(episode_id, start.sampling, next_index)

    def _forget_idle(self) -> None:
        """Whatever is forgotten can be read back from the store, tool calls that wait for results excepted."""
        for episode_id, task in list(self._logs.items())[: max(0, len(self._logs) - _KEPT_EPISODES)]:
            if task.done() and not task.exception() and task.result().in_flight == 0:
                del self._logs[episode_id]

    async def _in_writer(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)


def _tool_span(episode_id: str, tool_call_id: str, tool: _OpenTool, result: str, now: float) -> Span:
    return Span(
        id=f"tool-{tool_call_id}",
        episode_id=episode_id,
        name=tool.name,
        kind="tool",
        started_at=tool.made_at,
        ended_at=now,
        attributes={
            "tool_call_id": tool_call_id,
            "call_id": tool.call_id,
            "arguments": tool.arguments,
            "result": result,
        },
    )
