"""`POST /v1/completions`: text or token ids in, text out, without a chat template.

`echo` gives the prompt back before the completion, with `logprobs: 0` also the log-probs of its tokens; `max_tokens: 0` then
scores the prompt alone. Alternatives to tokens of the prompt are not computed, so `echo` refuses more, rather than leaving out
what evaluation harnesses read from them: whether the prompt's tokens are the likeliest ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from rollout_server.api.asking import ask, prefixed
from rollout_server.api.choice import Piece, version_spans
from rollout_server.api.dialects.chat import openai_usage
from rollout_server.api.dialects.chat_request import ResponseFormat, StructuredOutputs, response_constraint
from rollout_server.api.dialects.fields import LIMIT, MAX_CHOICES, SampledFields, TokenIds, invalid, parse
from rollout_server.api.errors import ApiError
from rollout_server.api.exchange import Event, Exchange, Plan, drain, finish_reason, remember_ids, unless_gone
from rollout_server.api.front.visit import visit
from rollout_server.api.front.wire import event_stream, json_body, json_response
from rollout_server.api.replies.logprobs import completion_logprobs
from rollout_server.api.services import Services
from rollout_server.api.turn import SamplingOptions
from rollout_server.api.turn_run import Usage, constraint_reading

NOTHING = Piece("", [], [], [])


class CompletionRequest(SampledFields):
    off = {**SampledFields.off, "suffix": ("",), "best_of": (1,)}

    prompt: Annotated[
        str | Annotated[list[str], Field(fail_fast=True)] | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)],
        Field(description="text or ids, one or several"),
    ]
    max_tokens: Annotated[int, Field(ge=0, lt=LIMIT)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    add_special_tokens: bool = True
    """Texts begin as the tokenizer begins them (a BOS token, where it has one)."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(item, int) for item in self.prompt):
            return [list(self.prompt)]  # type: ignore[arg-type]
        return list(self.prompt)  # type: ignore[arg-type]

    def options(self) -> SamplingOptions:
        return self.sampling(max_tokens=self.max_tokens or None, top_logprobs=self.logprobs or 0)


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    request = parse(CompletionRequest, body)
    prompts = request.prompts()
    if not prompts or not all(prompts):
        raise invalid("prompt", "prompt must not be empty")
    if len(prompts) * request.n > MAX_CHOICES:
        raise invalid("n", f"{len(prompts)} prompts with n={request.n}: a request may have {MAX_CHOICES} choices")
    if request.echo and request.logprobs:
        raise invalid("logprobs", "echo gives the log-probs of tokens, not of alternatives to them: logprobs must be 0")
    if request.max_tokens == 0 and not request.echo:
        raise invalid("max_tokens", "max_tokens 0 needs echo")
    return request


async def completions(services: Services, http: Request, episode_id: str | None) -> Response:
    body = await json_body(http)
    request = parse_completion(body)
    prompts = await encoded(services, request.prompts(), request.add_special_tokens)
    options = request.options()
    asked = await ask(services, http, episode_id, body, prefixed("cmpl-"), options, len(prompts))
    exchange = Exchange(
        services, http, asked, request.model, options, body, partial(remember_ids, services, episode_id)
    )
    constraint = response_constraint(request.response_format, request.structured_outputs)
    param = "response_format" if request.structured_outputs is None else "structured_outputs"
    reading = await unless_gone(http, constraint_reading(services, constraint, param))
    echoes = await unless_gone(http, _echoes(exchange, request, prompts))
    writer = _Writer(exchange, request, prompts, echoes)
    if request.max_tokens == 0:
        return json_response(writer.whole())
    exchange.admit_ids(prompts, reading, prompt_param="prompt")
    events = exchange.events(reads_along=request.stream)
    if request.stream:
        first = await unless_gone(http, anext(events))
        return event_stream(writer.chunks(first, events))
    await unless_gone(http, drain(events))
    return json_response(writer.whole())


async def encoded(services: Services, prompts: Sequence[str | list[int]], add_special_tokens: bool) -> list[list[int]]:
    """Raises ApiError for a text that is too long, or ids that the model does not have."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    of_texts = iter(await services.text_size.encode(texts, add_special_tokens=add_special_tokens))
    ids = [next(of_texts) if isinstance(prompt, str) else prompt for prompt in prompts]
    if any(prompt and max(prompt) >= services.vocab_size for prompt in ids):
        raise ApiError(
            400, f"token ids must lie in 0 … {services.vocab_size - 1}", param="prompt", code="invalid_token_ids"
        )
    return ids


async def _echoes(exchange: Exchange, request: CompletionRequest, prompts: list[list[int]]) -> list[Piece]:
    """Each prompt as a piece; its first token has no log-prob, which is written as NaN here and as null on the wire."""
    if not request.echo:
        return []
    services = exchange.services
    scored: list[list[float]] = [[] for _ in prompts]
    if request.logprobs is not None:
        scored = await _scores(exchange, prompts)
    texts = [services.renderer.decode(ids) for ids in prompts]
    return [
        Piece(text, ids, [float("nan"), *logprobs] if logprobs or len(ids) == 1 else [], [])
        for text, ids, logprobs in zip(texts, prompts, scored, strict=True)
    ]


async def _scores(exchange: Exchange, prompts: list[list[int]]) -> list[list[float]]:
    """Log-probs of each prompt's tokens but the first. Raises ApiError 429 or 503 when there is no room for them."""
    services = exchange.services
    flow, tokens = visit(exchange.http).flow, sum(map(len, prompts))
    with services.admission.enter(flow, len(prompts), tokens):
        scoring = [asyncio.ensure_future(services.engine.score(ids, exchange.adapter)) for ids in prompts]
        try:
            return [answer.logprobs for answer in await asyncio.gather(*scoring)]
        finally:  # when one fails, nobody waits for the others
            for score in scoring:
                score.cancel()


class _Writer:
    """`echoes` has an entry for each prompt, or none at all."""

    def __init__(
        self, exchange: Exchange, request: CompletionRequest, prompts: list[list[int]], echoes: list[Piece]
    ) -> None:
        self._exchange, self._request, self._prompts, self._echoes = exchange, request, prompts, echoes
        self._offsets = [0] * (len(prompts) * request.n)

    def whole(self) -> dict[str, Any]:
        choices = [self._entry(index, self._echo_of(index)) for index in range(len(self._offsets))]
        for plan in self._exchange.plans:
            choices[plan.index] = self._join(choices[plan.index], self._entry(plan.index, plan.choice.as_piece()))
            choices[plan.index] |= self._ending(plan) | self._ids(plan.choice.ids)
        if not self._exchange.plans:
            for index, choice in enumerate(choices):
                choice |= {"finish_reason": "length"} | self._prompt_ids(index)
        return {**self._head(), "choices": choices, "usage": openai_usage(self._usage())}

    async def chunks(self, first: Event, rest: AsyncGenerator[Event, None]) -> AsyncGenerator[dict[str, Any], None]:
        head = self._head()
        options = self._request.stream_options
        if options.include_usage:
            head["usage"] = None

        def chunk(choice: dict[str, Any]) -> dict[str, Any]:
            if options.continuous_usage_stats:
                return {**head, "usage": openai_usage(self._usage()), "choices": [choice]}
            return {**head, "choices": [choice]}

        async with aclosing(rest):
            if self._request.echo:
                for index in range(len(self._offsets)):
                    yield chunk(self._entry(index, self._echo_of(index)))
            yield chunk(self._streamed(*first))
            async for event in rest:
                yield chunk(self._streamed(*event))
        if options.include_usage:
            yield {**head, "choices": [], "usage": openai_usage(self._usage())}

    def _streamed(self, plan: Plan, piece: Piece | None) -> dict[str, Any]:
        if piece is None:
            return self._entry(plan.index, NOTHING) | self._ending(plan)
        return self._entry(plan.index, piece) | self._ids(piece.ids)

    def _entry(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self._request.logprobs is not None and piece.ids:
            tokenizer = self._exchange.services.renderer.tokenizer
            logprobs = completion_logprobs(tokenizer, piece, self._offsets[index])
        self._offsets[index] += len(piece.text)
        return {"index": index, "text": piece.text, "finish_reason": None, "logprobs": logprobs}

    def _echo_of(self, index: int) -> Piece:
        return self._echoes[index // self._request.n] if self._echoes else NOTHING

    def _join(self, echo: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
        joined = {**said, "text": echo["text"] + said["text"]}
        if echo["logprobs"] is not None and said["logprobs"] is not None:
            joined["logprobs"] = {
                name: echo["logprobs"][name] + value if isinstance(value, list) else value
                for name, value in said["logprobs"].items()
            }
        return joined

    def _ending(self, plan: Plan) -> dict[str, Any]:
        ending: dict[str, Any] = {
            "finish_reason": finish_reason(plan.choice, called=False),
            "stop_reason": plan.choice.stop,
        }
        if self._request.return_token_ids:
            ending |= self._prompt_ids(plan.index) | {"weight_versions": version_spans(plan.choice.versions)}
        return ending

    def _ids(self, ids: list[int]) -> dict[str, Any]:
        return {"token_ids": ids} if self._request.return_token_ids else {}

    def _prompt_ids(self, index: int) -> dict[str, Any]:
        if not self._request.return_token_ids:
            return {}
        return {"prompt_token_ids": self._prompts[index // self._request.n]}

    def _head(self) -> dict[str, Any]:
        exchange = self._exchange
        return {
            "id": exchange.response_id,
            "object": "text_completion",
            "created": exchange.created,
            "model": exchange.model,
        }

    def _usage(self) -> Usage:
        choices = [plan.choice for plan in self._exchange.plans]
        return Usage(
            prompt=sum(map(len, self._prompts)),
            completion=sum(len(choice.ids) for choice in choices),
            cached=sum(choice.cached_tokens for choice in choices[:: self._request.n]),
            reasoning=0,
        )
