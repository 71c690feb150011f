"""The life of one request, whatever its dialect: choices are admitted, sampled side by side, recorded, and handed on.

The choices of one prompt are one request to the engine; each is read in a task of its own. It is durable in the store
before its end is handed on; when the client goes away its tasks are cancelled, the engine forgets them, and what they
sampled is recorded with finish reason `abort`. A request that repeats one goes the same way, with what is recorded in the
engine's place: it asks the engine for nothing, and records nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from lightning_rl.episode import Call, Sampling, Span
from rollout_server.api.choice import Choice, Piece
from rollout_server.api.engine.engine_client import Generation, Stream
from rollout_server.api.engine.replicas import Replicas
from rollout_server.api.front.joining import agent_of
from rollout_server.api.front.metrics import Clock
from rollout_server.api.front.visit import visit
from rollout_server.api.recorder import EpisodeLog
from rollout_server.api.rendering.conversation import Prompt
from rollout_server.api.replies.reply import Reader
from rollout_server.api.retries import Answered, Naming, Replayed, Sending
from rollout_server.api.sampling import prompt_seeds, restrictions, sampling_params
from rollout_server.api.services import Services
from rollout_server.api.turn import Message, SamplingOptions
from rollout_server.messages import SamplingParams, Tokens

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the text of a choice is read."""

    grammar: str = ""
    """What the reply must fit (`rollout_server.grammar`); empty: anything."""
    until_call: Callable[[], Reader] | None = None
    """Makes a reader whose first tool call ends a choice; None: calls end nothing."""
    shown: Collection[int] = ()
    """Special tokens that have a text."""


@dataclass
class Sampled:
    """One prompt with all its choices, as the engine is asked for it: when the first choice is read."""

    engine: Replicas
    prompt_ids: list[int]
    sampling: SamplingParams
    n: int
    adapter: str
    priority: int
    grammar: str
    flow: str
    heard: Callable[[Tokens], None] | None = None
    """Told of everything that the engine says of it, as it comes."""
    _generation: Generation | None = None

    def stream(self, number: int) -> Stream:
        """Of choice `number`. Raises EngineError when the server is about to end."""
        if self._generation is None:
            self._generation = self.engine.submit(
                self.prompt_ids,
                self.sampling,
                n=self.n,
                adapter=self.adapter,
                priority=self.priority,
                grammar=self.grammar,
                flow=self.flow,
            )
            self._generation.heard = self.heard
        return self._generation.streams[number]

    def close(self) -> None:
        if self._generation is not None:
            self._generation.close()


@dataclass(frozen=True)
class Asked:
    """A request, new or sent again, as its episode knows it."""

    exchange_id: str
    naming: Naming
    log: EpisodeLog | None = None
    """None: it belongs to no episode."""
    sending: Sending | None = None
    replay: Answered | None = None
    """What it was answered before."""


@dataclass(frozen=True)
class Plan:
    """One choice of a request, and the call that it will be recorded as."""

    index: int
    sampled: Sampled | Replayed
    number: int
    """Which of its prompt's choices it is."""
    call_id: str
    call_index: int
    prompt: Prompt
    choice: Choice
    restricted: list[str]
    """As in the call."""


Event = tuple[Plan, Piece | None]
"""A piece of a choice; None for one that is finished and durable."""


class Exchange:
    """`respond` makes a finished choice's message, as it is recorded."""

    def __init__(
        self,
        services: Services,
        http: Request,
        asked: Asked,
        model: str,
        sampling: SamplingOptions,
        body: Mapping[str, Any],
        respond: Callable[[Plan], Message],
    ) -> None:
        """Raises ApiError when the model is not served here."""
        self.services = services
        self.http = http
        self.sampling = sampling
        self.replay = asked.replay
        self.adapter = self._adapter_then() if self.replay else services.answering(http, model)
        self._asked = asked
        self._log = asked.log
        self._body = dict(body)
        self._respond = respond
        self._spans: list[Span] = []
        self._started_at = self.replay.calls[0].started_at if self.replay else time.time()
        self.id = asked.exchange_id
        self.plans: list[Plan] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._writes: list[asyncio.Task[None]] = []

    @property
    def response_id(self) -> str:
        """Of the first choice; in most dialects that of all."""
        return self._asked.naming(self.id, 0)

    @property
    def created(self) -> int:
        return int(self._started_at)

    @property
    def model(self) -> str:
        """The name of what answers, whatever alias the client used."""
        return self.adapter or self.services.config.served_name

    @property
    def scope(self) -> str:
        """Whose conversations the next prompt may extend: those of the episode, or of this key and address, with this model."""
        return _scope(visit(self.http).flow, self.adapter)

    def _adapter_then(self) -> str:
        """The adapter that has answered; it may have been unloaded since."""
        assert self.replay is not None
        model = self.replay.calls[0].model
        return "" if model == self.services.config.served_name else model

    def withdraw_unless_sampled(self, prompts: list[Prompt]) -> None:
        """From now on: whatever ends the request, prompts for which nothing was sampled were not asked."""

        def withdraw() -> None:
            sampled = {id(plan.prompt.claim) for plan in self.plans if plan.choice.ids}
            for prompt in prompts:
                if id(prompt.claim) not in sampled:
                    self.services.conversations.withdraw(prompt)

        async def withdraw_later() -> None:
            await asyncio.wait(self._tasks)
            withdraw()

        def end() -> None:
            if all(task.done() for task in self._tasks):
                withdraw()
            else:  # cancelled choices still take what the engine said last
                self.services.spawn(withdraw_later())

        visit(self.http).at_end.callback(end)

    def note_tool_results(self, messages: list[Message]) -> None:
        if self._log is not None and self.replay is None:
            self._spans = self._log.answered_tools(messages, self._started_at, visit(self.http).span_id)

    def admit(self, prompts: list[Prompt], reading: Reading = Reading(), *, prompt_param: str = "messages") -> None:
        """Plan `n` choices for each prompt. Raises ApiError if a prompt is too long; `prompt_param` is the field it is in."""
        if self.replay is not None:
            self._admit_again(self.replay, reading)
            return
        if self._log is not None:
            self._log.check_open()
        imposed = self._log.sampling if self._log else Sampling()
        first = self._log.next_index if self._log else 0
        wanted = self.sampling
        seeds = prompt_seeds(wanted.seed, imposed.seed, first, len(prompts))
        made: list[Sampled] = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            params = sampling_params(
                wanted,
                imposed,
                prompt_tokens=len(prompt.ids),
                context_limit=self.services.context_limit,
                vocab_size=self.services.vocab_size,
                eos_ids=self.services.renderer.stop_ids,
                seed=seed,
                prompt_param=prompt_param,
            )
            sampled = Sampled(
                self.services.engine,
                prompt.ids,
                params,
                wanted.n,
                self.adapter,
                wanted.priority,
                reading.grammar,
                visit(self.http).flow,
            )
            made.append(sampled)
            for number in range(wanted.n):
                self._plan(sampled, number, first, prompt if number == 0 else prompt.sibling(), params, reading)
        self._enter(made)
        if self._log is not None:
            self._log.reserve(len(self.plans))

    def _admit_again(self, replay: Answered, reading: Reading) -> None:
        n = self.sampling.n
        for at, call in enumerate(replay.calls):
            number = at % n
            told = Replayed(replay.calls[at - number : at - number + n], visit(self.http).flow, self.adapter)
            self._plan(told, number, call.index - at, Prompt(call.prompt_ids), SamplingParams(), reading)
        self.services.metrics.replays += 1

    def _plan(
        self,
        sampled: Sampled | Replayed,
        number: int,
        first: int,
        prompt: Prompt,
        params: SamplingParams,
        reading: Reading,
    ) -> None:
        """`first` is the episode's index of the request's first call."""
        index = len(self.plans)
        until_call = reading.until_call() if reading.until_call is not None else None
        told = self.sampling.top_logprobs
        choice = Choice(prompt.ids, params, self.sampling.stops, reading.shown, until_call, told)
        restricted = restrictions(params, has_grammar=bool(reading.grammar))
        self.plans.append(Plan(index, sampled, number, f"{self.id}-{index}", first + index, prompt, choice, restricted))

    def _enter(self, made: list[Sampled]) -> None:
        """Raises ApiError 429 or 503 when there is no room for them."""
        asks = visit(self.http)
        tokens = sum(len(sampled.prompt_ids) for sampled in made)
        ticket = asks.at_end.enter_context(self.services.admission.enter(asks.flow, len(self.plans), tokens))
        for sampled in made:
            clock = Clock(self.services.metrics, asks.started, len(sampled.prompt_ids), ticket.began)
            sampled.heard = clock.heard

    def admit_ids(self, prompts: list[list[int]], reading: Reading, *, prompt_param: str) -> None:
        """The same for prompts that the client gives as they are; `remember_ids` is their `respond`."""
        if self._log is None or self.replay is not None:
            self.admit([Prompt(ids) for ids in prompts], reading, prompt_param=prompt_param)
            return
        conversations = self.services.conversations
        labelled = [conversations.raw_prompt(self.scope, ids) for ids in prompts]
        self.withdraw_unless_sampled(labelled)
        self.admit(labelled, reading, prompt_param=prompt_param)

    async def events(self, *, reads_along: bool) -> AsyncGenerator[Event, None]:
        """Pieces as they come (only if `reads_along`), and None for each choice that is finished and durable."""
        queue: asyncio.Queue[tuple[Plan, Piece | Exception | None]] = asyncio.Queue()

        async def conduct(plan: Plan) -> None:
            try:
                await self._conduct(plan, (lambda piece: queue.put_nowait((plan, piece))) if reads_along else None)
            except Exception as error:  # handed on, raised below
                queue.put_nowait((plan, error))
            else:
                queue.put_nowait((plan, None))

        tasks = self._tasks = [self.services.spawn(conduct(plan)) for plan in self.plans]
        if self._asked.sending is not None:
            self._asked.sending.conducted = True
            self.services.spawn(self._follow(self._asked.sending))
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
            if self.replay is not None:
                self._reply_again(self.replay, plan)
            else:
                reply = self._respond(plan)
                if self._log is not None and self.services.recorder is not None:
                    spans, self._spans = self._spans, []
                    written = self.services.recorder.record(self._log, self._call(plan, self._log.id, reply), spans)
                    self._writes.append(self.services.spawn(written))
                    await asyncio.shield(self._writes[-1])  # a client that leaves must not undo it

    def _reply_again(self, replay: Answered, plan: Plan) -> None:
        """What this process knows of the answer is as if it had given it."""
        if not replay.known and self._log is not None and plan.choice.finish_reason != "abort":
            self._respond(plan)
            self._log.expect_tools(replay.calls[plan.index])

    async def _follow(self, sending: Sending) -> None:
        """Say how it ended, when nothing of it is to come any more."""
        await asyncio.wait(self._tasks)
        if self._writes:
            await asyncio.wait(self._writes)
        ended = [plan.choice.finish_reason in ("stop", "length") for plan in self.plans]
        kept = [not write.cancelled() and write.exception() is None for write in self._writes]
        sending.end(whole=len(kept) == len(ended) and all(ended + kept))

    def _call(self, plan: Plan, episode_id: str, reply: Message) -> Call:
        choice, prompt = plan.choice, plan.prompt
        return Call(
            id=plan.call_id,
            episode_id=episode_id,
            index=plan.call_index,
            model=self.model,
            prompt_ids=choice.prompt_ids,
            sampled_ids=choice.ids,
            logprobs=choice.logprobs,
            versions=choice.versions,
            entropies=choice.entropies,
            alternatives=choice.alternatives,
            temperature=choice.sampling.temperature,
            restricted=plan.restricted,
            finish_reason=finish_reason(choice, bool(reply.get("tool_calls"))),
            parent_id=prompt.parent_id,
            relation=prompt.relation,
            parted_at=prompt.parted_at,
            cached_tokens=choice.cached_tokens,
            request=self._body,
            response=reply,
            span_id=visit(self.http).span_id,
            agent=agent_of(self.http),
            response_id=self._asked.naming(self.id, plan.index),
            started_at=self._started_at,
            ended_at=time.time(),
        )


def remember_ids(services: Services, episode: str | None, plan: Plan) -> Message:
    """The message of a choice without a conversation: its text. Within an episode, a prompt that goes on with it extends it."""
    choice, sampled = plan.choice, plan.sampled
    if episode is not None and choice.ids:
        scope = _scope(sampled.flow, sampled.adapter)
        services.conversations.remember_raw(scope, choice.prompt_ids, choice.ids, plan.call_id)
    return {"role": "assistant", "content": choice.text}


def _scope(flow: str, adapter: str) -> str:
    return json.dumps([flow, adapter])


def finish_reason(choice: Choice, called: bool) -> str:
    """`called`: tools were."""
    if choice.finish_reason == "stop" and called:
        return "tool_calls"
    return choice.finish_reason or "abort"


async def drain(events: AsyncIterator[Event]) -> None:
    async for _ in events:
        pass


async def unless_gone(http: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client goes away first. The body must have been read."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            watcher.result()
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
