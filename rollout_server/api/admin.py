"""What the trainer asks of the server, with the admin key: new weights, log-probs of given tokens, counters.

`POST /update_weights {path, version}` → `{version, checksum}`; `POST /score {sequences: [[ids]]}` → `{logprobs,
version}`, one log-prob for every id but the first of each sequence; `GET /stats`.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from rollout_server.api.errors import ApiError
from rollout_server.api.exchange import Services
from rollout_server.api.wire import json_body, json_response

T = TypeVar("T")


class UpdateBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    version: int


class ScoreBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sequences: list[list[int]]


async def update_weights(services: Services, http: Request) -> Response:
    body = _convert(await json_body(http), UpdateBody)
    updated = await services.engine.update_weights(body.path, body.version)
    return json_response({"version": updated.version, "checksum": updated.checksum})


async def score(services: Services, http: Request) -> Response:
    body = _convert(await json_body(http), ScoreBody)
    scored = await asyncio.gather(*(services.engine.score(ids) for ids in body.sequences))
    versions = {entry.version for entry in scored}
    if len(versions) > 1:
        raise ApiError(409, "the policy changed while the sequences were scored", code="policy_changed")
    return json_response({"logprobs": [entry.logprobs for entry in scored], "version": max(versions, default=None)})


async def stats(services: Services, http: Request) -> Response:
    return json_response(await services.engine.stats())


def _convert(body: object, kind: type[T]) -> T:
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise ApiError(400, str(error), code="invalid_value") from error
