"""`POST /generate`: token ids (or text) in, token ids out, without a template, a parser, or a conversation.

Field names are SGLang's, for requests and replies. Streamed events hold what is new since the last one, as vLLM's do, not all that
was said so far. Log-probs are of the distribution that was sampled from.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

import msgspec
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from rollout_server.api.asking import ask
from rollout_server.api.choice import Piece, version_spans
from rollout_server.api.dialects.completions import NOTHING, encoded
from rollout_server.api.dialects.fields import (
    LIMIT,
    MAX_CHOICES,
    DistributionFields,
    Natural,
    Strict,
    TokenIds,
    invalid,
    parse,
)
from rollout_server.api.exchange import Event, Exchange, Plan, drain, finish_reason, remember_ids, unless_gone
from rollout_server.api.front.wire import event_stream, json_body, json_response
from rollout_server.api.services import Services
from rollout_server.api.turn import Constraint, JsonSchema, Regex, SamplingOptions
from rollout_server.api.turn_run import constraint_reading

RequestName = Annotated[str, Field(min_length=1, max_length=256)]


class GenerateSampling(DistributionFields):
    off = {
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True, False),  # there are none to put spaces between
        "no_stop_trim": (False,),
    }

    max_new_tokens: Natural = 128
    min_new_tokens: Annotated[int, Field(ge=0, lt=LIMIT)] = 0
    sampling_seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    json_schema: str | None = None
    """JSON text of a schema that the reply must fit."""
    regex: str | None = None


class GenerateRequest(Strict):
    off = {"logprob_start_len": (-1,), "return_text_in_logprobs": (False,), "return_hidden_states": (False,)}

    text: str | list[str] | None = None
    input_ids: TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] | None = None
    sampling_params: GenerateSampling = GenerateSampling()
    return_logprob: bool = False
    top_logprobs_num: Annotated[int, Field(ge=0, le=20)] = 0
    stream: bool = False
    rid: RequestName | list[RequestName] | None = None
    """The `id` of the answers' `meta_info`: one for all, or one for each prompt."""
    model: str | None = None
    """The served model, or an adapter."""
    lora_path: str | None = None
    """SGLang's name for the adapter to use."""
    priority: Annotated[int, Field(ge=-8, le=8)] = 0
    """Lower goes first."""

    def prompts(self) -> tuple[list[str | list[int]], bool]:
        """And whether the answer is a list. Raises ApiError unless there is exactly one of text and input_ids."""
        if (self.text is None) == (self.input_ids is None):
            raise invalid("input_ids", "give either text or input_ids")
        given: Any = self.text if self.text is not None else self.input_ids
        batched = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
        prompts = given if batched else [given]
        if not all(prompts):
            raise invalid("text" if self.text is not None else "input_ids", "a prompt must not be empty")
        if len(prompts) * self.sampling_params.n > MAX_CHOICES:
            raise invalid("sampling_params.n", f"a request may have {MAX_CHOICES} choices")
        if isinstance(self.rid, list) and len(self.rid) != len(prompts):
            raise invalid("rid", f"there are {len(self.rid)} for {len(prompts)} prompts")
        return prompts, batched or self.sampling_params.n > 1

    def options(self) -> SamplingOptions:
        """Raises ApiError for more `min_new_tokens` than `max_new_tokens`."""
        params = self.sampling_params
        if params.min_new_tokens > params.max_new_tokens:
            least, most = params.min_new_tokens, params.max_new_tokens
            raise invalid("sampling_params.min_new_tokens", f"at least {least} tokens, at most {most}")
        return params.drawn(
            seed=params.sampling_seed,
            max_tokens=params.max_new_tokens,
            min_tokens=params.min_new_tokens,
            top_logprobs=self.top_logprobs_num if self.return_logprob else 0,
            priority=self.priority,
        )

    def name_of(self, exchange_id: str, index: int) -> str:
        """Of the answer with choice `index`."""
        match self.rid:
            case None:
                return f"{exchange_id}-{index}"
            case str():
                return self.rid
            case _:
                return self.rid[index // self.sampling_params.n]

    def constraint(self) -> Constraint | None:
        params = self.sampling_params
        if params.json_schema is not None and params.regex is not None:
            raise invalid("sampling_params.regex", "give either json_schema or regex")
        if params.regex is not None:
            return Regex(params.regex)
        if params.json_schema is None:
            return None
        try:
            schema = msgspec.json.decode(params.json_schema)
        except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
            raise invalid("sampling_params.json_schema", f"this is no JSON: {error}") from error
        if not isinstance(schema, Mapping | bool):
            raise invalid("sampling_params.json_schema", "a JSON schema is an object or a boolean")
        return JsonSchema(schema)


async def generate(services: Services, http: Request, episode_id: str | None) -> Response:
    body = await json_body(http)
    request = parse(GenerateRequest, body)
    prompts, many = request.prompts()
    options = request.options()
    asked = await ask(services, http, episode_id, body, request.name_of, options, len(prompts))
    model = request.lora_path or request.model or services.config.served_name
    exchange = Exchange(services, http, asked, model, options, body, partial(remember_ids, services, episode_id))
    reading = await unless_gone(http, constraint_reading(services, request.constraint(), "sampling_params"))
    ids = await encoded(services, prompts, add_special_tokens=True)
    exchange.admit_ids(ids, reading, prompt_param="input_ids")
    events = exchange.events(reads_along=request.stream)
    if request.stream:
        first = await unless_gone(http, anext(events))
        return event_stream(_chunks(request, exchange, first, events))
    await unless_gone(http, drain(events))
    answers = [_entry(request, exchange, plan, plan.choice.as_piece(), ended=True) for plan in exchange.plans]
    return json_response(answers if many else answers[0])


async def _chunks(
    request: GenerateRequest, exchange: Exchange, first: Event, rest: AsyncGenerator[Event, None]
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(rest):
        yield _chunk(request, exchange, *first)
        async for event in rest:
            yield _chunk(request, exchange, *event)


def _chunk(request: GenerateRequest, exchange: Exchange, plan: Plan, piece: Piece | None) -> dict[str, Any]:
    return _entry(request, exchange, plan, piece or NOTHING, ended=piece is None)


def _entry(request: GenerateRequest, exchange: Exchange, plan: Plan, piece: Piece, *, ended: bool) -> dict[str, Any]:
    choice = plan.choice
    meta: dict[str, Any] = {
        "id": request.name_of(exchange.id, plan.index),
        "finish_reason": _finish(plan) if ended else None,
        "prompt_tokens": len(choice.prompt_ids),
        "completion_tokens": len(choice.ids),
        "cached_tokens": choice.cached_tokens,
    }
    if ended:
        meta["weight_versions"] = version_spans(choice.versions)
    if request.return_logprob:
        meta["output_token_logprobs"] = [[x, i, None] for x, i in zip(piece.logprobs, piece.ids, strict=True)]
        if request.top_logprobs_num:
            meta["output_top_logprobs"] = [[[x, i, None] for i, x in top] for top in piece.top_logprobs]
    return {"index": plan.index, "text": piece.text, "output_ids": piece.ids, "meta_info": meta}


def _finish(plan: Plan) -> dict[str, Any]:
    reason = finish_reason(plan.choice, called=False)
    if reason == "length":
        return {"type": "length", "length": len(plan.choice.ids)}
    if plan.choice.stop is not None:
        return {"type": reason, "matched": plan.choice.stop}
    return {"type": reason, "matched": plan.choice.ids[-1] if plan.choice.ids else None}
