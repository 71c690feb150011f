"""One turn on its way through the server, for every dialect that speaks in messages: rendered, constrained, sampled, read.

    run = await begin(services, http, episode_id, turn, body, prefixed("chatcmpl-"))
    finished = await run.whole()                   # or, streamed:
    async for step in run.steps(): ...

`begin` raises ApiError for everything that can be known before a token is sampled. Whatever a dialect does with the steps, each
choice is recorded before its last step is handed on, and remembered so that the next turn extends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request

from rollout_server.api.asking import ask
from rollout_server.api.choice import Choice, Piece
from rollout_server.api.errors import ApiError
from rollout_server.api.exchange import Asked, Exchange, Plan, Reading, finish_reason, unless_gone
from rollout_server.api.rendering.conversation import Prompt
from rollout_server.api.rendering.render import RenderError
from rollout_server.api.replies.grammars import constraint_grammar, require_servable, turn_grammar, unservable
from rollout_server.api.replies.reasoning import ReasoningCount, ReasoningFormat, ReasoningReader
from rollout_server.api.replies.reply import PlainReader, Reader, Reply, ReplyEvent, gather
from rollout_server.api.retries import Naming
from rollout_server.api.services import Services
from rollout_server.api.turn import Constraint, Message, Turn
from rollout_server.manager.masking import GrammarError


@dataclass(frozen=True)
class Usage:
    """Tokens. The prompt counts once for all choices."""

    prompt: int
    completion: int
    cached: int
    """Of the prompt: keys and values were kept from earlier requests."""
    reasoning: int
    """Of the completion: up to the end of its reasoning."""


@dataclass(frozen=True)
class Finished:
    """One choice at its end."""

    index: int
    reply: Reply
    finish_reason: str
    """`stop`, `length`, `tool_calls` or `abort`."""
    stop: str | None
    """The stop string that ended it."""
    choice: Choice
    """Ids, log-probs, versions."""


@dataclass(frozen=True)
class Step:
    """What one choice said since its last step."""

    index: int
    events: list[ReplyEvent]
    piece: Piece | None
    """The tokens that came; their text need not be in these events, a reader may hold it back. None on the last step."""
    finished: Finished | None
    """On the last step of a choice."""


class TurnRun:
    def __init__(self, services: Services, http: Request, asked: Asked, turn: Turn, body: Mapping[str, Any]) -> None:
        """Raises ApiError when the model is not served here, or the template refuses the messages."""
        self._services, self._http, self._turn = services, http, turn
        self._exchange = Exchange(services, http, asked, turn.model, turn.sampling, body, self._record)
        self._prompt = self._claimed(asked) if asked.replay is None else Prompt(asked.replay.calls[0].prompt_ids)
        self._told: dict[int, list[ReplyEvent]] = {}
        reasoning, ends_with = services.reasoning, services.renderer.ends_with
        self._opened = reasoning is not None and self._begins_inside(reasoning)
        self._shown = services.shown_ids(tools=turn.reads_tools)
        self._reasoning_counts: dict[int, ReasoningCount] = {}
        self._reasons = reasoning is not None and not ends_with(self._prompt.ids, reasoning.close)

    def _claimed(self, asked: Asked) -> Prompt:
        turn, exchange = self._turn, self._exchange
        try:
            prompt = self._services.conversations.prompt(
                exchange.scope,
                turn.messages,
                turn.tools,
                turn.template_options,
                turn.continues,
                one_agent=asked.log is not None,
            )
        except RenderError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_messages") from error
        exchange.withdraw_unless_sampled([prompt])
        return prompt

    @property
    def response_id(self) -> str:
        """As the client gets it."""
        return self._exchange.response_id

    @property
    def id(self) -> str:
        """32 hexadecimal digits."""
        return self._exchange.id

    @property
    def created(self) -> int:
        """Seconds since the epoch."""
        return self._exchange.created

    @property
    def model(self) -> str:
        """The name of what answers, whatever alias the client used."""
        return self._exchange.model

    @property
    def prompt_ids(self) -> list[int]:
        return self._prompt.ids

    async def admit(self) -> None:
        """Raises ApiError when the turn cannot be sampled: its prompt is too long, its grammar cannot be served."""
        turn = self._turn
        reading = Reading(
            grammar=await self._grammar() if self._exchange.replay is None else "",
            until_call=self._reader if self._one_call_only and self._services.tool_format.closes else None,
            shown=self._shown,
        )
        self._exchange.admit([self._prompt], reading)
        self._exchange.note_tool_results(turn.messages)

    async def _grammar(self) -> str:
        turn, services = self._turn, self._services
        grammar = turn_grammar(
            turn,
            services.tool_format,
            services.reasoning if self._reasons else None,
            reasoning_opened=self._opened,
            special_ids=services.special_ids,
        )
        if grammar is not None:
            await unless_gone(self._http, require_servable(turn, grammar, partial(compiled, services)))
        return grammar or ""

    async def whole(self) -> list[Finished]:
        """All choices, in order. Raises ClientGone if the client leaves first."""

        async def collect() -> list[Finished]:
            return [
                self._finish(plan) async for plan, piece in self._exchange.events(reads_along=False) if piece is None
            ]

        finished = await unless_gone(self._http, collect())
        return sorted(finished, key=lambda choice: choice.index)

    async def steps(self, *, by_token: bool = False) -> AsyncGenerator[Step, None]:
        """The first step is awaited before anything is sent, so that errors before it have a status of their own:
        `first = await unless_gone(http, anext(steps))`. `by_token`: no step has more than one token, however they come."""
        readers = [self._reader(plan.call_id) for plan in self._exchange.plans]
        async with aclosing(self._exchange.events(reads_along=True)) as events:
            async for plan, piece in events:
                reader = readers[plan.index]
                if piece is None:
                    yield Step(plan.index, reader.finish(), None, self._finish(plan))
                    continue
                for part in piece.by_token() if by_token else [piece]:
                    told = reader.feed(part.text)
                    self._told.setdefault(plan.index, []).extend(told)
                    yield Step(plan.index, told, part, None)

    def retold(self, finished: Finished) -> list[Step]:
        """The steps, token by token, that a whole choice would have been."""
        reader = self._reader(self._exchange.plans[finished.index].call_id)
        pieces = finished.choice.as_piece().by_token()
        told = [Step(finished.index, reader.feed(piece.text), piece, None) for piece in pieces]
        return [*told, Step(finished.index, reader.finish(), None, finished)]

    def usage(self) -> Usage:
        choices = [plan.choice for plan in self._exchange.plans]
        return Usage(
            prompt=len(self._prompt.ids),
            completion=sum(len(choice.ids) for choice in choices),
            cached=choices[0].cached_tokens,
            reasoning=sum(self._reasoning_tokens(plan) for plan in self._exchange.plans),
        )

    @property
    def _one_call_only(self) -> bool:
        return self._turn.reads_tools and not self._turn.parallel_tool_calls

    def _reader(self, call_id: str = "") -> Reader:
        """`call_id` gives tool calls their ids."""
        turn, reasoning = self._turn, self._services.reasoning
        reader: Reader = PlainReader()
        if turn.reads_tools:
            reader = self._services.tool_format.parser(call_id, turn.tools)
        return ReasoningReader(reader, reasoning, self._opened) if reasoning is not None else reader

    def _read(self, plan: Plan) -> Reply:
        reader = self._reader(plan.call_id)
        return gather([*reader.feed(plan.choice.text), *reader.finish()])

    def _record(self, plan: Plan) -> Message:
        """Its reply can be extended from the moment on that the client knows it.

        A choice that was broken off is remembered as what was handed on of it, with all that was sampled: the policy may
        have said a little more than the client has seen (half a character, what may be a call, tokens on their way).
        What was handed on and got lost on the way to the client makes the next turn an edit.
        """
        reply, choice, turn = self._read(plan), plan.choice, self._turn
        known = reply if choice.finish_reason in ("stop", "length") else self._handed_on(plan)
        if choice.ids:
            self._services.conversations.remember(
                self._exchange.scope,
                turn.messages,
                known.as_message(),
                turn.tools,
                choice.prompt_ids + choice.ids,
                plan.call_id,
                turn.template_options,
                turn.continues,
            )
        return reply.as_message()

    def _handed_on(self, plan: Plan) -> Reply:
        return gather(self._told.get(plan.index) or self._reader(plan.call_id).feed(plan.choice.text))

    def _finish(self, plan: Plan) -> Finished:
        reply, choice = self._read(plan), plan.choice
        return Finished(plan.index, reply, finish_reason(choice, bool(reply.tool_calls)), choice.stop, choice)

    def _begins_inside(self, form: ReasoningFormat) -> bool:
        """Whether what is sampled first goes on with reasoning that the prompt, or the reply that is continued, opened."""
        prompt, renderer, last = self._prompt, self._services.renderer, self._turn.messages[-1]
        if prompt.begun_at is not None:
            opened = renderer.ends_with(prompt.ids[: prompt.begun_at], form.open)
            begun = renderer.decode(prompt.ids[prompt.begun_at :], special=True)
            return _left_open(form, form.open + begun if opened else begun)
        if self._turn.continues and _left_open(form, last.get("content") or ""):
            return True
        return renderer.ends_with(prompt.ids, form.open)

    def _reasoning_tokens(self, plan: Plan) -> int:
        reasoning = self._services.reasoning
        if reasoning is None:
            return 0
        counts = self._reasoning_counts
        if plan.index not in counts:
            tokenizer = self._services.renderer.tokenizer
            counts[plan.index] = ReasoningCount(tokenizer, reasoning, self._opened, self._shown)
        return counts[plan.index].of(plan.choice.ids)


def _left_open(form: ReasoningFormat, begun: str) -> bool:
    """Whether a reply that begins so is still in its reasoning, as `ReasoningReader` would read it."""
    return begun.lstrip().startswith(form.open) and form.close not in begun


async def constraint_reading(services: Services, constraint: Constraint | None, param: str) -> Reading:
    """For text that no template opens. Raises ApiError, naming `param`, when the constraint cannot be served."""
    if constraint is None:
        return Reading()
    grammar = constraint_grammar(constraint, param)
    try:
        await compiled(services, grammar)
    except GrammarError as error:
        raise unservable(param, str(error)) from error
    return Reading(grammar=grammar)


async def compiled(services: Services, grammar: str) -> None:
    """Wait until the grammar is; whoever gives up waiting takes it out of the queue. Raises GrammarError."""
    if services.grammars.kept(grammar) is None:
        await asyncio.wrap_future(services.grammars.begin(grammar))


async def begin(
    services: Services, http: Request, episode_id: str | None, turn: Turn, body: Mapping[str, Any], naming: Naming
) -> TurnRun:
    """`naming` is how the dialect names its responses. Raises ApiError for whatever keeps the turn from being sampled."""
    await services.text_size.check_parts(http, [turn.messages, turn.tools, dict(turn.template_options)], "messages")
    services.text_size.check_messages(len(turn.messages))
    asked = await ask(services, http, episode_id, body, naming, turn.sampling)
    run = await services.renderer.patiently(lambda: TurnRun(services, http, asked, turn, body))
    await run.admit()
    return run
