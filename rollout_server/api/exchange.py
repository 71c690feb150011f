"""The life of one request, whatever its dialect: choices are admitted, sampled side by side, recorded, and handed on.

The choices of one prompt are one request to the engine; each is read in a task of its own. It is durable in the store
before its end is handed on; when the client goes away its tasks are cancelled, the engine forgets them, and what they
sampled is recorded with finish reason `abort`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from lightning_rl.episode import Call, Sampling, Span
from rollout_server.api.choice import Choice, Piece
from rollout_server.api.config import WebConfig
from rollout_server.api.conversation import ConversationIndex, Prompt
from rollout_server.api.engine_client import Generation, Stream
from rollout_server.api.errors import ApiError
from rollout_server.api.recorder import EpisodeLog, Recorder
from rollout_server.api.render import Renderer
from rollout_server.api.replicas import Replicas
from rollout_server.api.requests import ChatRequest, CompletionRequest
from rollout_server.api.sampling import prompt_seeds, sampling_params
from rollout_server.api.tool_prompt import Message
from rollout_server.messages import SamplingParams

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


@dataclass(frozen=True)
class Services:
    """What every handler works with; made once per process."""

    config: WebConfig
    context_limit: int
    vocab_size: int
    engine: Replicas
    renderer: Renderer
    conversations: ConversationIndex
    recorder: Recorder | None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def adapter(self, model: str) -> str:
        """The adapter that clients mean by this model name; "" for the policy. Raises ApiError for an unknown name."""
        if model in self.engine.adapters:
            return model
        self.config.check_model(model, self.engine.adapters)
        return ""

    async def episode(self, episode_id: str | None) -> EpisodeLog | None:
        if episode_id is None:
            return None
        if self.recorder is None:
            raise ApiError(404, "this server has no episode store; use /v1/…", code="episode_not_found")
        return await self.recorder.episode(episode_id)


@dataclass
class Sampled:
    """One prompt with all its choices, as the engine is asked for it: when the first choice is read."""

    engine: Replicas
    prompt_ids: list[int]
    sampling: SamplingParams
    n: int
    adapter: str
    priority: int
    _generation: Generation | None = None

    def stream(self, number: int) -> Stream:
        """Of choice `number`. Raises EngineError when the server is about to end."""
        if self._generation is None:
            self._generation = self.engine.submit(
                self.prompt_ids, self.sampling, n=self.n, adapter=self.adapter, priority=self.priority
            )
        return self._generation.streams[number]

    def close(self) -> None:
        if self._generation is not None:
            self._generation.close()


@dataclass(frozen=True)
class Plan:
    """One choice of a request, and the call that it will be recorded as."""

    index: int
    sampled: Sampled
    number: int
    """Which of its prompt's choices it is."""
    call_id: str
    call_index: int
    parent_id: str | None
    choice: Choice


class Exchange:
    """`respond` makes a finished choice's message, as the client gets it."""

    def __init__(
        self,
        services: Services,
        log: EpisodeLog | None,
        request: ChatRequest | CompletionRequest,
        body: dict[str, Any],
        respond: Callable[[Plan], Message],
    ) -> None:
        """Raises ApiError when the request's model is not served here."""
        self.services = services
        self.request = request
        self.adapter = services.adapter(request.model)
        self._log = log
        self._body = body
        self._respond = respond
        self._spans: list[Span] = []
        self._started_at = time.time()
        self.id = uuid.uuid4().hex
        self.plans: list[Plan] = []
        self.replies: dict[int, Message] = {}

    @property
    def model(self) -> str:
        """The name of what answers, whatever alias the client used."""
        return self.adapter or self.services.config.served_name

    @property
    def scope(self) -> str:
        return self._log.id if self._log else ""

    def note_tool_results(self, messages: list[Message]) -> None:
        if self._log is not None:
            self._spans = self._log.answered_tools(messages, self._started_at)

    def admit(self, prompts: list[Prompt], inclusive_stops: tuple[str, ...] = ()) -> None:
        """Plan `n` choices for each prompt. Raises ApiError if a prompt is too long."""
        imposed = self._log.sampling if self._log else Sampling()
        first = self._log.next_index if self._log else 0
        seeds = prompt_seeds(self.request, imposed, first, len(prompts))
        n = self.request.n
        for prompt, seed in zip(prompts, seeds, strict=True):
            params = sampling_params(
                self.request,
                imposed,
                prompt_tokens=len(prompt.ids),
                context_limit=self.services.context_limit,
                vocab_size=self.services.vocab_size,
                eos_ids=self.services.renderer.stop_ids,
                seed=seed,
            )
            sampled = Sampled(self.services.engine, prompt.ids, params, n, self.adapter, self.request.priority)
            for number in range(n):
                index = len(self.plans)
                choice = Choice(prompt.ids, params, self.request.stops, inclusive_stops)
                plan = Plan(index, sampled, number, f"{self.id}-{index}", first + index, prompt.parent_id, choice)
                self.plans.append(plan)
        if self._log is not None:
            self._log.reserve(len(self.plans))

    async def events(self, *, reads_along: bool) -> AsyncIterator[tuple[Plan, Piece | None]]:
        """Pieces as they come (only if `reads_along`), and None for each choice that is finished and durable."""
        queue: asyncio.Queue[tuple[Plan, Piece | Exception | None]] = asyncio.Queue()

        async def conduct(plan: Plan) -> None:
            try:
                await self._conduct(plan, (lambda piece: queue.put_nowait((plan, piece))) if reads_along else None)
            except Exception as error:  # handed on, raised below
                queue.put_nowait((plan, error))
            else:
                queue.put_nowait((plan, None))

        tasks = [self.services.spawn(conduct(plan)) for plan in self.plans]
        unfinished = len(tasks)
        try:
            while unfinished:
                plan, event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                unfinished -= event is None
                yield plan, event
        finally:
            for task, plan in zip(tasks, self.plans, strict=True):
                task.cancel()
                plan.sampled.close()

    async def _conduct(self, plan: Plan, on_piece: Callable[[Piece], None] | None) -> None:
        try:
            await plan.choice.run(plan.sampled.stream(plan.number), self.services.renderer.tokenizer, on_piece)
        finally:  # also when cancelled: what was sampled is recorded
            reply = self.replies[plan.index] = self._respond(plan)
            if self._log is not None and self.services.recorder is not None:
                spans, self._spans = self._spans, []
                written = self.services.recorder.record(self._log, self._call(plan, self._log.id, reply), spans)
                await asyncio.shield(self.services.spawn(written))  # a client that leaves must not undo it

    def _call(self, plan: Plan, episode_id: str, reply: Message) -> Call:
        choice = plan.choice
        return Call(
            id=plan.call_id,
            episode_id=episode_id,
            index=plan.call_index,
            model=self.model,
            prompt_ids=choice.prompt_ids,
            sampled_ids=choice.ids,
            logprobs=choice.logprobs,
            versions=choice.versions,
            temperature=choice.sampling.temperature,
            finish_reason=finish_reason(choice, reply),
            parent_id=plan.parent_id,
            cached_tokens=choice.cached_tokens,
            request=self._body,
            response=reply,
            started_at=self._started_at,
            ended_at=time.time(),
        )

    def usage(self) -> dict[str, Any]:
        """Prompts count once for all their choices, as in OpenAI's API."""
        prompts = self.plans[:: self.request.n]
        prompt_tokens = sum(len(plan.choice.prompt_ids) for plan in prompts)
        sampled = sum(len(plan.choice.ids) for plan in self.plans)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": sampled,
            "total_tokens": prompt_tokens + sampled,
            "prompt_tokens_details": {"cached_tokens": sum(plan.choice.cached_tokens for plan in prompts)},
        }


def finish_reason(choice: Choice, reply: Message) -> str:
    if choice.finish_reason == "stop" and reply.get("tool_calls"):
        return "tool_calls"
    return choice.finish_reason or "abort"


async def drain(events: AsyncIterator[tuple[Plan, Piece | None]]) -> None:
    async for _ in events:
        pass


async def unless_gone(http: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client goes away first. The body must have been read."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
