"""The server's routes, as a table: what is where, who may call it, what it takes and gives.

The application and the OpenAPI document are both made from it, so that neither knows of a route that the other does not.
`/openapi.json` itself is added by `openapi.describing`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rollout_server.api import admin
from rollout_server.api.dialects.chat import chat_completions
from rollout_server.api.dialects.chat_request import ChatRequest
from rollout_server.api.dialects.completions import CompletionRequest, completions
from rollout_server.api.dialects.generate import GenerateRequest, generate
from rollout_server.api.dialects.messages import count_tokens, create_message
from rollout_server.api.dialects.messages_request import CountRequest, MessagesRequest
from rollout_server.api.dialects.messages_stream import anthropic_error
from rollout_server.api.dialects.otlp import TraceBody, otlp_error, receive_traces
from rollout_server.api.dialects.responses import create_response, delete_response, get_response
from rollout_server.api.dialects.responses_request import ResponsesRequest
from rollout_server.api.dialects.tokens import DetokenizeRequest, TokenizeRequest, detokenize, tokenize
from rollout_server.api.errors import ApiError
from rollout_server.api.front import status
from rollout_server.api.front.access import Access
from rollout_server.api.front.endpoint import Handler, Shape
from rollout_server.api.services import Services
from rollout_server.api.upstreams.relay import relayed

Schema = Mapping[str, Any]


def fields(**kinds: str) -> Schema:
    """Of an object that has at least these, by JSON type."""
    return {"type": "object", "required": list(kinds), "properties": {name: {"type": kinds[name]} for name in kinds}}


def shown(path: str) -> str:
    """A route's path without the kinds of its parameters, as people and OpenAPI write it."""
    return path.replace(":path}", "}")


@dataclass(frozen=True, kw_only=True)
class Route:
    method: str
    path: str
    handler: Handler
    access: Access
    summary: str
    body: type | None = None
    """A pydantic model or a msgspec struct."""
    answer: Schema
    """JSON schema of what comes with status 200."""
    media: str = "application/json"
    streams: bool = False
    """As server-sent events, when the body asks for it."""
    recorded: bool = False
    """Served at `/e/{episode}…` too, where calls are recorded."""
    query: Sequence[tuple[str, Schema]] = ()
    shape: Shape = ApiError.body


def trainers(work: Callable[[Services, Request], Awaitable[Response]]) -> Handler:
    """What knows no episodes, as a handler."""

    async def handler(services: Services, http: Request, episode_id: str | None) -> Response:
        return await work(services, http)

    return handler


COMPLETION = fields(id="string", object="string", created="integer", model="string", choices="array", usage="object")
RESPONSE = fields(id="string", object="string", status="string", output="array")

ROUTES: tuple[Route, ...] = (
    Route(
        method="POST",
        path="/v1/chat/completions",
        handler=relayed(chat_completions, "chat"),
        access="client",
        summary="The next message of a conversation.",
        body=ChatRequest,
        answer=COMPLETION,
        streams=True,
        recorded=True,
    ),
    Route(
        method="POST",
        path="/v1/completions",
        handler=relayed(completions, "completions"),
        access="client",
        summary="Text or token ids, continued.",
        body=CompletionRequest,
        answer=COMPLETION,
        streams=True,
        recorded=True,
    ),
    Route(
        method="POST",
        path="/v1/responses",
        handler=relayed(create_response, "responses"),
        access="client",
        summary="OpenAI's Responses API.",
        body=ResponsesRequest,
        answer=RESPONSE,
        streams=True,
        recorded=True,
    ),
    Route(
        method="GET",
        path="/v1/responses/{response_id}",
        handler=get_response,
        access="client",
        summary="A stored response.",
        answer=RESPONSE,
        recorded=True,
    ),
    Route(
        method="DELETE",
        path="/v1/responses/{response_id}",
        handler=delete_response,
        access="client",
        summary="Forget a stored response.",
        answer=fields(id="string", object="string", deleted="boolean"),
        recorded=True,
    ),
    Route(
        method="POST",
        path="/v1/messages",
        handler=relayed(create_message, "messages"),
        access="client",
        summary="Anthropic's Messages API.",
        body=MessagesRequest,
        answer=fields(id="string", type="string", role="string", content="array", model="string", usage="object"),
        streams=True,
        recorded=True,
        shape=anthropic_error,
    ),
    Route(
        method="POST",
        path="/v1/messages/count_tokens",
        handler=relayed(count_tokens, "messages", suffix="/count_tokens"),
        access="client",
        summary="Tokens that a message's prompt has.",
        body=CountRequest,
        answer=fields(input_tokens="integer"),
        recorded=True,
        shape=anthropic_error,
    ),
    Route(
        method="POST",
        path="/generate",
        handler=generate,
        access="client",
        summary="Token ids in, token ids out.",
        body=GenerateRequest,
        answer={"type": ["object", "array"]},
        streams=True,
        recorded=True,
    ),
    Route(
        method="POST",
        path="/tokenize",
        handler=tokenize,
        access="client",
        summary="Token ids of a text or a conversation.",
        body=TokenizeRequest,
        answer=fields(count="integer", max_model_len="integer", tokens="array"),
    ),
    Route(
        method="POST",
        path="/detokenize",
        handler=detokenize,
        access="client",
        summary="Text of token ids.",
        body=DetokenizeRequest,
        answer=fields(prompt="string"),
    ),
    Route(
        method="POST",
        path="/v1/traces",
        handler=receive_traces,
        access="client",
        summary="Spans of an agent, as OpenTelemetry's exporters send them (OTLP/HTTP); also as protobuf.",
        body=TraceBody,
        answer=fields(partialSuccess="object"),
        recorded=True,
        shape=otlp_error,
    ),
    Route(
        method="GET",
        path="/v1/models",
        handler=status.models,
        access="client",
        summary="The policy and its adapters.",
        answer=fields(object="string", data="array"),
        recorded=True,
    ),
    Route(
        method="GET",
        path="/v1/models/{model:path}",
        handler=status.model,
        access="client",
        summary="One of them.",
        answer=fields(id="string", object="string", created="integer", owned_by="string"),
        recorded=True,
    ),
    Route(
        method="GET",
        path="/health",
        handler=status.health,
        access="open",
        summary="200 if the engine can serve.",
        answer=fields(status="string"),
    ),
    Route(
        method="GET",
        path="/metrics",
        handler=status.metrics,
        access="client",
        summary="Counters and histograms for Prometheus.",
        answer={"type": "string"},
        media="text/plain",
    ),
    Route(
        method="POST",
        path="/update_weights",
        handler=trainers(admin.update_weights),
        access="admin",
        summary="Load new weights in place.",
        body=admin.UpdateBody,
        answer=fields(version="integer", checksum="string"),
    ),
    Route(
        method="POST",
        path="/v1/load_lora_adapter",
        handler=trainers(admin.load_adapter),
        access="admin",
        summary="Serve a LoRA adapter as a model of its own.",
        body=admin.LoadAdapterBody,
        answer=fields(lora_name="string", version="integer", checksum="string"),
    ),
    Route(
        method="POST",
        path="/v1/unload_lora_adapter",
        handler=trainers(admin.unload_adapter),
        access="admin",
        summary="Serve it no more.",
        body=admin.UnloadAdapterBody,
        answer=fields(lora_name="string"),
    ),
    Route(
        method="GET",
        path="/checksums",
        handler=trainers(admin.checksums),
        access="admin",
        summary="Checksums of the live weights: `base`, and `adapter/<name>` of each adapter.",
        answer=fields(checksums="object"),
    ),
    Route(
        method="POST",
        path="/pause",
        handler=trainers(admin.pause),
        access="admin",
        summary="Compute nothing until resumed.",
        body=admin.PauseBody,
        answer=fields(paused="boolean", mode="string"),
    ),
    Route(
        method="POST",
        path="/resume",
        handler=trainers(admin.resume),
        access="admin",
        summary="Go on.",
        body=admin.EmptyBody,
        answer=fields(paused="boolean"),
    ),
    Route(
        method="POST",
        path="/sleep",
        handler=trainers(admin.sleep),
        access="admin",
        summary="Give the device's memory back.",
        body=admin.SleepBody,
        answer=fields(asleep="boolean", level="integer"),
    ),
    Route(
        method="POST",
        path="/wake_up",
        handler=trainers(admin.wake_up),
        access="admin",
        summary="Take it again, and go on.",
        body=admin.EmptyBody,
        answer=fields(asleep="boolean"),
    ),
    Route(
        method="POST",
        path="/score",
        handler=trainers(admin.score),
        access="admin",
        summary="Log-probs of given token ids.",
        body=admin.ScoreBody,
        answer=fields(logprobs="array"),
    ),
    Route(
        method="GET",
        path="/stats",
        handler=trainers(admin.stats),
        access="admin",
        summary="The engine's counters and queues.",
        answer={"type": "object", "additionalProperties": {"type": "number"}},
        query=(("check", {"type": "string", "enum": ["0", "1"]}),),
    ),
)
