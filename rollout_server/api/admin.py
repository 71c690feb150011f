"""What the trainer asks of the server, with the admin key: new weights, adapters, pauses, log-probs, counters.

`POST /update_weights {path | source, version, adapter?, running?, expected_checksum?}` → `{version, checksum}`;
`/v1/load_lora_adapter {lora_name, lora_path, load_inplace?, version?}`, `/v1/unload_lora_adapter {lora_name}` (vLLM's
names); `/pause {mode?}`, `/resume`, `/sleep {level?}`, `/wake_up`; `/score {sequences: [[ids]], adapter?}` →
`{logprobs, version}`, one log-prob for every id but the first of each sequence; `GET /checksums`, of the live weights;
`GET /stats?check=1`.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from rollout_server import messages as m
from rollout_server.api.errors import ApiError
from rollout_server.api.front.wire import json_body, json_response
from rollout_server.api.services import Services

T = TypeVar("T")


Version = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
TokenNumber = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class UpdateBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Version
    path: str | None = None
    """Short for a source of type `directory`."""
    source: m.WeightSource | None = None
    adapter: str = ""
    """Empty: the policy itself."""
    running: m.Running = "reprefill"
    expected_checksum: str | None = None
    """The publisher's own; another one live is error `checksum_mismatch`."""

    def where(self) -> m.WeightSource:
        """Raises ApiError unless there is exactly one, and the engine can be told of it."""
        if self.path is not None and self.source is None:
            return m.Directory(path=self.path)
        if self.source is not None and self.path is None:
            try:
                msgspec.msgpack.encode(self.source)
            except OverflowError as error:
                raise ApiError(400, "a number has more than 64 bits", param="source", code="invalid_value") from error
            return self.source
        raise ApiError(400, "give either path or source", param="source", code="invalid_value")


class LoadAdapterBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    lora_name: str
    lora_path: str
    load_inplace: bool = False
    """Replace an adapter of this name."""
    version: Version | None = None
    """Default: one more than the name's last."""


class UnloadAdapterBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    lora_name: str


class PauseBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mode: m.Running = "keep"


class SleepBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    level: Literal[1, 2] = 1


class EmptyBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class ScoreBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sequences: list[list[TokenNumber]]
    adapter: str = ""


async def update_weights(services: Services, http: Request) -> Response:
    body = await _body(http, UpdateBody)
    source = body.where()
    if body.adapter:
        _check_name(services, body.adapter)
    updated = await services.engine.update_weights(
        source,
        body.version,
        adapter=body.adapter,
        running=body.running,
        expected_checksum=body.expected_checksum,
    )
    return json_response({"version": updated.version, "checksum": updated.checksum})


async def load_adapter(services: Services, http: Request) -> Response:
    body = await _body(http, LoadAdapterBody)
    _check_name(services, body.lora_name)
    if body.lora_name in services.engine.adapters and not body.load_inplace:
        raise ApiError(
            400,
            f"adapter {body.lora_name!r} is loaded already; load_inplace replaces it",
            param="lora_name",
            code="invalid_value",
        )
    updated = await services.engine.update_weights(
        m.Directory(path=body.lora_path), body.version, adapter=body.lora_name
    )
    return json_response({"lora_name": body.lora_name, "version": updated.version, "checksum": updated.checksum})


async def unload_adapter(services: Services, http: Request) -> Response:
    body = await _body(http, UnloadAdapterBody)
    await services.engine.unload_adapter(body.lora_name)
    return json_response({"lora_name": body.lora_name})


async def pause(services: Services, http: Request) -> Response:
    body = await _body(http, PauseBody)
    await services.engine.pause(body.mode)
    return json_response({"paused": True, "mode": body.mode})


async def resume(services: Services, http: Request) -> Response:
    await _body(http, EmptyBody)
    await services.engine.resume()
    return json_response({"paused": False})


async def sleep(services: Services, http: Request) -> Response:
    body = await _body(http, SleepBody)
    await services.engine.sleep(body.level)
    return json_response({"asleep": True, "level": body.level})


async def wake_up(services: Services, http: Request) -> Response:
    await _body(http, EmptyBody)
    await services.engine.wake()
    return json_response({"asleep": False})


async def score(services: Services, http: Request) -> Response:
    body = await _body(http, ScoreBody)
    scored = await asyncio.gather(*(services.engine.score(ids, body.adapter) for ids in body.sequences))
    versions = {entry.version for entry in scored}
    if len(versions) > 1:
        raise ApiError(409, "the policy changed while the sequences were scored", code="policy_changed")
    return json_response({"logprobs": [entry.logprobs for entry in scored], "version": max(versions, default=None)})


async def stats(services: Services, http: Request) -> Response:
    check = http.query_params.get("check", "0")
    if check not in ("0", "1"):
        raise ApiError(400, f"check is 0 or 1, not {check!r}", param="check", code="invalid_value")
    return json_response(await services.engine.stats(check=check == "1"))


async def checksums(services: Services, http: Request) -> Response:
    return json_response({"checksums": await services.engine.checksums()})


def _check_name(services: Services, name: str) -> None:
    """An adapter's name comes before the aliases, but must not hide the policy's own."""
    if not name or name == services.config.served_name:
        raise ApiError(400, f"an adapter cannot be called {name!r}", param="lora_name", code="invalid_value")


async def _body(http: Request, kind: type[T]) -> T:
    """No body at all is an empty object."""
    body = await json_body(http) if await http.body() else {}
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise ApiError(400, str(error), code="invalid_value") from error
