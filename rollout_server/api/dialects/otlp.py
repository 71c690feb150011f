"""`POST /v1/traces`: what an agent's own OpenTelemetry instrumentation says of its episode (OTLP/HTTP, protobuf or JSON).

The episode is that of the request, as for calls, else the one that a span or its resource names as `lrl.episode`. What is taken is
durable before the answer, and is taken once however often it is sent. What is refused is counted in the answer's
`partial_success`, with the reason; the log has numbers only. Bodies are read by one thread, so
that a large one delays neither calls nor more than one core.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from lightning_rl import otlp
from lightning_rl.errors import StoreError
from lightning_rl.otlp import JSON, Encoding, OtelSpan, OtlpError, encoding_of
from lightning_rl.otlp.read import Received, cut, episode_named, received
from lightning_rl.store.received import Late
from rollout_server.api.errors import ENGINE_RETRY_AFTER_S, ApiError
from rollout_server.api.recorder import EpisodeLog
from rollout_server.api.services import Services

MAX_EPISODES = 256
"""That one request may be about."""
_FOLDED = 10_000
"""Of one episode."""
_AT_ONCE = 1000
"""Spans, links or rewards of one transaction."""
_TOLD = 10
"""Reasons that an answer gives."""
_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 405: 12, 408: 4, 413: 3, 415: 3, 429: 8, 503: 14}
"""google.rpc.Code by HTTP status."""
_WINDOW = {"gzip": 31, "deflate": 15}
"""zlib's `wbits` by content-encoding."""

_reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="otlp")
log = logging.getLogger("lrl.web")


class TraceBody(Struct):
    """An ExportTraceServiceRequest."""

    resourceSpans: list[dict[str, Any]] = []


def otlp_error(error: ApiError) -> dict[str, Any]:
    """A google.rpc.Status."""
    return {"code": _CODES.get(error.status, 13), "message": error.message}


async def receive_traces(services: Services, http: Request, episode_id: str | None) -> Response:
    encoding = encoding_of(http.headers.get("content-type", ""))
    try:
        if encoding is None:
            raise ApiError(415, "traces come as application/x-protobuf or application/json")
        rejected, problems = await _receive(services, http, episode_id, encoding)
    except ApiError as error:
        return _refusal(error, encoding or JSON)
    if problems:  # they quote what was sent, which is for the sender alone
        whose = episode_id or "the episodes that spans name"
        log.warning("traces for %s: %d problems, %d spans refused", whose, len(problems), rejected)
    more = [f"and {len(problems) - _TOLD} more"] if len(problems) > _TOLD else []
    told = "; ".join([*problems[:_TOLD], *more])
    return Response(otlp.answer(encoding, rejected, told), headers={"content-type": encoding})


def _refusal(error: ApiError, encoding: Encoding) -> Response:
    said = otlp_error(error)
    response = Response(
        otlp.status(encoding, said["code"], said["message"]), error.status, headers={"content-type": encoding}
    )
    if error.retry_after is not None:
        response.headers["retry-after"] = str(error.retry_after)
    return response


async def _receive(
    services: Services, http: Request, episode_id: str | None, encoding: Encoding
) -> tuple[int, list[str]]:
    """How many spans were refused, and what is wrong. Raises ApiError."""
    sent, compression = await http.body(), http.headers.get("content-encoding", "identity").lower()
    limit, loop = services.config.limits.body_bytes, asyncio.get_running_loop()
    spans = await loop.run_in_executor(_reader, _decoded, sent, compression, limit, encoding)
    of_episode: dict[str | None, list[OtelSpan]] = defaultdict(list)
    for span in spans:
        of_episode[episode_id or episode_named(span)].append(span)
    rejected, problems = 0, []
    for number, (whose, own) in enumerate(of_episode.items()):
        episode, problem = await _episode(services, whose, number)
        if episode is None:
            rejected += len(own)
            problems.append(f"{len(own)} spans were refused: {problem}")
            continue
        result = await loop.run_in_executor(_reader, _read, own, episode)
        late = await _record(services, episode, result)
        rejected += result.refused + sum(len(some.spans) for some in late)
        problems += [*result.problems, *_too_late(late, episode.id)]
    return rejected, problems


async def _episode(services: Services, episode_id: str | None, number: int) -> tuple[EpisodeLog | None, str]:
    """The episode, or why there is none."""
    if episode_id is None:
        return None, (
            "nothing says which episode they belong to: send them to /e/EPISODE/v1/traces, "
            "with the header x-lrl-episode, or with the attribute lrl.episode"
        )
    if number >= MAX_EPISODES:
        return None, f"one request may be about {MAX_EPISODES} episodes"
    try:
        return await services.episode(episode_id), ""
    except ApiError as error:
        return None, cut(error.message, 200)
    except StoreError as error:
        raise _not_now(error) from error


def _decoded(sent: bytes, compression: str, limit: int, encoding: Encoding) -> list[OtelSpan]:
    try:
        return otlp.decode(_expanded(sent, compression, limit), encoding)
    except OtlpError as error:
        raise ApiError(413 if error.too_large else 400, str(error)) from error


def _expanded(sent: bytes, compression: str, limit: int) -> bytes:
    """The body as it was before it was compressed. Raises ApiError, before it takes more memory than `limit`."""
    if compression in ("", "identity"):
        return sent
    if compression not in _WINDOW:
        raise ApiError(415, f"the content-encoding must be gzip or deflate, not {cut(compression, 40)!r}")
    expander = zlib.decompressobj(_WINDOW[compression])
    try:
        body = expander.decompress(sent, limit + 1)
    except zlib.error as error:
        raise ApiError(400, f"the body is no {compression}") from error
    if len(body) > limit:
        raise ApiError(413, f"the request's body is larger than {limit} bytes")
    if not expander.eof or expander.unused_data:
        raise ApiError(400, f"the body is no {compression}: it ends early, or goes on after its end")
    return body


def _read(spans: Sequence[OtelSpan], episode: EpisodeLog) -> Received:
    result = received(spans, episode.id, episode.folded)
    episode.folded.update(result.folded)
    for old in list(episode.folded)[: max(0, len(episode.folded) - _FOLDED)]:
        del episode.folded[old]
    return result


async def _record(services: Services, episode: EpisodeLog, result: Received) -> list[Late]:
    """Returns, when it is durable, what came too late."""
    assert services.recorder is not None
    try:
        return [await services.recorder.receive(episode, part) for part in _parts(result)]
    except StoreError as error:
        raise _not_now(error) from error


def _too_late(late: Sequence[Late], episode_id: str) -> list[str]:
    named = [(kind, name) for some in late for kind in ("span", "reward") for name in getattr(some, f"{kind}s")]
    return [f"the {kind} {cut(name, 80)!r} came after the end of episode {episode_id}" for kind, name in named]


def _parts(result: Received) -> Iterator[Received]:
    """What one transaction takes: the calls of other episodes are written between them. Spans come before what points at them."""
    for at in range(0, max(len(result.spans), len(result.rewards)), _AT_ONCE):
        some = slice(at, at + _AT_ONCE)
        yield Received(spans=result.spans[some], rewards=result.rewards[some], reward_keys=result.reward_keys[some])
    folded = list(result.folded.items())
    for at in range(0, max(len(result.links), len(folded)), _AT_ONCE):
        some = slice(at, at + _AT_ONCE)
        yield Received(links=result.links[some], folded=dict(folded[some]))


def _not_now(error: StoreError) -> ApiError:
    log.error("traces could not be stored: %s", error)
    return ApiError(503, "the episode store does not answer", retry_after=ENGINE_RETRY_AFTER_S)
