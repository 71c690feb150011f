"""Requests that a route leads to an upstream: sent on with its own key, answered with its own bytes, recorded like the policy's.

Nothing of the client's goes there but the body (with the model's name replaced, if the upstream has one), the version of the
API and an `Idempotency-Key`: what is sent again is the upstream's to recognise, and is a call of its own here. Nothing of the
answer is changed. An answer is durable in the store before the client can take it to be whole: a streamed
one waits at its end. What was never answered, or answered with an error, is no call. A client that leaves closes the line to the
upstream, and what came is recorded with finish reason `abort`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from lightning_rl.episode import Call, Span
from rollout_server.api.dialects.messages_stream import anthropic_error
from rollout_server.api.errors import ApiError
from rollout_server.api.exchange import unless_gone
from rollout_server.api.front.endpoint import Handler
from rollout_server.api.front.joining import agent_of
from rollout_server.api.front.visit import visit
from rollout_server.api.front.wire import EventStream, decode_object, json_body
from rollout_server.api.recorder import EpisodeLog
from rollout_server.api.retries import KEY_HEADER
from rollout_server.api.services import Services
from rollout_server.api.upstreams.answers import Heard, StreamedAnswer, heard
from rollout_server.api.upstreams.provider import Dialect, Provider
from rollout_server.api.upstreams.tool_results import tool_results

_ASKED_ALONG = ("anthropic-version", "anthropic-beta", "openai-beta", KEY_HEADER)
"""Headers of the request that belong to its body: they say what it may hold, and that it is sent again."""
_ANSWERED_ALONG = ("content-type", "retry-after", "retry-after-ms", "x-should-retry", "x-request-id", "request-id")
_ANTHROPIC_VERSION = "2023-06-01"


class _Asked(Struct):
    model: str = ""


def relayed(handler: Handler, dialect: Dialect, *, suffix: str = "") -> Handler:
    """A handler in whose place an upstream answers where a route says so. `suffix`: of a path below the dialect's own, whose
    answers are no calls."""

    async def relaying(services: Services, http: Request, episode_id: str | None) -> Response:
        name = await _upstream_for(services, http)
        if name is None:
            return await handler(services, http, episode_id)
        log = await services.episode(episode_id) if not suffix else None
        relay = _Relay(services, http, log, dialect, name, services.config.upstreams[name], await json_body(http))
        return await relay.answer(suffix)

    return relaying


async def _upstream_for(services: Services, http: Request) -> str | None:
    if not services.config.upstreams or not services.config.routes:
        return None
    try:
        model = msgspec.json.decode(await http.body(), type=_Asked).model
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):  # the handler says what is wrong with it
        return None
    name = services.route(http, model)
    return name if name in services.config.upstreams else None


@dataclass
class _Relay:
    services: Services
    http: Request
    log: EpisodeLog | None
    dialect: Dialect
    name: str
    provider: Provider
    body: Mapping[str, Any]
    started_at: float = field(default_factory=time.time)

    async def answer(self, suffix: str) -> Response:
        """Raises ApiError: 409 for an episode that has ended, 502 when the upstream cannot be asked, or cannot be read."""
        if self.log is not None:
            self.log.check_open()
        client = self.services.lines.client
        request = client.build_request(
            "POST",
            self.provider.url(self.dialect, suffix),
            content=await self._content(),
            params=self.http.url.query or None,
            headers=self._headers(),
        )
        try:
            answer = await unless_gone(self.http, client.send(request, stream=True))
        except httpx.HTTPError as error:
            raise self._failed(error) from None  # what it says may quote a header
        visit(self.http).at_end.callback(lambda: self.services.spawn(answer.aclose()))
        kind = answer.headers.get("content-type", "").partition(";")[0].strip()
        if answer.status_code == 200 and kind == "text/event-stream":
            stream = EventStream(self._stream(answer), self._last_words)
            stream.headers.update(_passed_on(answer))
            return stream
        try:
            content = await unless_gone(self.http, answer.aread())
        except httpx.HTTPError as error:
            raise self._failed(error) from None
        if answer.status_code == 200 and self.log is not None:
            await self._recorded(heard(self.dialect, self._object(content)), self._begin())
        return Response(content, answer.status_code, _passed_on(answer))

    async def _content(self) -> bytes:
        if self.provider.model is None:
            return await self.http.body()
        return msgspec.json.encode({**self.body, "model": self.provider.model})

    def _headers(self) -> dict[str, str]:
        own = {"content-type": "application/json", "accept-encoding": "identity", "user-agent": "lightning-rl"}
        if self.dialect == "messages":
            own["anthropic-version"] = _ANTHROPIC_VERSION
        given = {name: self.http.headers[name] for name in _ASKED_ALONG if name in self.http.headers}
        return {**own, **given, **self.provider.headers(self.dialect)}

    async def _stream(self, answer: httpx.Response) -> AsyncGenerator[bytes, None]:
        streamed = StreamedAnswer(self.dialect)
        record = self._recording(streamed)
        try:
            async for chunk in answer.aiter_bytes():
                streamed.feed(chunk)
                if streamed.ended:
                    await record()
                yield chunk
            await record()
        except httpx.HTTPError as error:
            await record()
            yield self._last_words(self._failed(error))
        finally:  # also when the client leaves
            await record()

    def _recording(self, streamed: StreamedAnswer) -> Callable[[], Awaitable[None]]:
        """What records the answer as far as it has come, once."""
        begun = self._begin()
        done = False

        async def record() -> None:
            nonlocal done
            if not done:
                done = True
                await self._recorded(streamed.heard(), begun)

        return record

    def _begin(self) -> tuple[int, list[Span]]:
        """The index of the answer's first call, and the spans of the tools whose results came with the request."""
        if self.log is None:
            return 0, []
        told = tool_results(self.dialect, dict(self.body))
        spans = self.log.answered_tools(told, self.started_at, visit(self.http).span_id)
        return self.log.reserve(1), spans

    async def _recorded(self, answer: Heard, begun: tuple[int, list[Span]]) -> None:
        """A client that leaves must not undo it."""
        await asyncio.shield(self.services.spawn(self._record(answer, begun)))

    async def _record(self, answer: Heard, begun: tuple[int, list[Span]]) -> None:
        log, recorder = self.log, self.services.recorder
        if log is None or recorder is None:
            return
        index, spans = begun
        own_id = uuid.uuid4().hex
        for number in range(len(answer.choices)):
            if number:
                index, spans = log.reserve(1), []
            await recorder.record(log, self._call(answer, number, f"{own_id}-{number}", log.id, index), spans)

    def _call(self, answer: Heard, number: int, call_id: str, episode_id: str, index: int) -> Call:
        said = answer.choices[number]
        temperature = self.body.get("temperature")
        asked = self.provider.model or self.body.get("model")
        return Call(
            id=call_id,
            episode_id=episode_id,
            index=index,
            model=answer.model or (asked if isinstance(asked, str) else ""),
            prompt_ids=[],
            sampled_ids=[],
            logprobs=[],
            versions=[],
            temperature=float(temperature) if isinstance(temperature, int | float) else 1.0,
            finish_reason=said.finish_reason,
            span_id=visit(self.http).span_id,
            agent=agent_of(self.http),
            response_id=answer.response_id,
            upstream=self.name,
            request=dict(self.body),
            response={**said.message, **({"usage": answer.usage} if answer.usage is not None else {})},
            started_at=self.started_at,
            ended_at=time.time(),
        )

    def _object(self, content: bytes) -> dict[str, Any]:
        try:
            return decode_object(content)
        except ApiError as error:
            raise ApiError(
                502,
                f"the upstream {self.name!r} answered with something that is no JSON object",
                code="upstream_invalid",
            ) from error

    def _failed(self, error: httpx.HTTPError) -> ApiError:
        kind = type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return ApiError(502, f"the upstream {self.name!r} cannot be reached ({kind})", code="upstream_unavailable")
        return ApiError(502, f"the line to the upstream {self.name!r} broke ({kind})", code="upstream_failed")

    def _last_words(self, error: ApiError) -> bytes:
        """The event that tells of an error, as the dialect's SDK reads it."""
        told: dict[str, Any]
        match self.dialect:
            case "messages":
                told = anthropic_error(error)
            case "responses":
                told = {
                    "type": "error",
                    "code": error.code,
                    "message": error.message,
                    "param": None,
                    "sequence_number": 0,
                }
            case _:
                return b"data: " + msgspec.json.encode(error.body()) + b"\n\n"
        return b"event: error\ndata: " + msgspec.json.encode(told) + b"\n\n"


def _passed_on(answer: httpx.Response) -> dict[str, str]:
    return {name: answer.headers[name] for name in _ANSWERED_ALONG if name in answer.headers}
