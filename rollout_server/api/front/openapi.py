"""The server's OpenAPI document (version 3.1), made from its table of routes and the very models that check requests.

Pure: routes in, a document out. What the models cannot say (fields that exclude each other, limits of the model served) is
left to the errors, which all routes describe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from rollout_server.api.dialects.messages_stream import anthropic_error
from rollout_server.api.dialects.otlp import otlp_error
from rollout_server.api.errors import ApiError
from rollout_server.api.front.endpoint import Shape
from rollout_server.api.front.routes import Route, fields, shown
from rollout_server.api.front.wire import json_response
from rollout_server.api.services import Services

_REF = "#/components/schemas/"
_ERRORS = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    },
    "AnthropicError": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {"type": {"const": "error"}, "error": dict(fields(type="string", message="string"))},
    },
    "Status": dict(fields(code="integer", message="string")),
}
_SHAPES: dict[Shape, str] = {ApiError.body: "Error", anthropic_error: "AnthropicError", otlp_error: "Status"}
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}
_SECURITY: dict[str, list[dict[str, list[str]]]] = {
    "open": [{}],
    "client": [{"client": []}, {"client_header": []}],
    "admin": [{"admin": []}],
}


def describing(routes: Sequence[Route]) -> Route:
    """`GET /openapi.json`, which describes `routes` and itself."""

    @cache
    def document() -> dict[str, Any]:
        return openapi([*routes, described])

    async def handler(services: Services, http: Request, episode_id: str | None) -> Response:
        return json_response(document())

    described = Route(
        method="GET",
        path="/openapi.json",
        handler=handler,
        access="client",
        summary="This document.",
        answer=fields(openapi="string", paths="object"),
    )
    return described


def openapi(routes: Sequence[Route]) -> dict[str, Any]:
    schemas, reference = _body_schemas([route.body for route in routes if route.body is not None])
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        here = shown(route.path)
        for path in [here, *([f"/e/{{episode}}{here}"] if route.recorded else [])]:
            paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, reference)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Lightning RL rollout server", "version": version("lightning-rl")},
        "paths": paths,
        "components": {
            "schemas": {**_ERRORS, **schemas},
            "securitySchemes": {
                "client": {"type": "http", "scheme": "bearer"},
                "client_header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "admin": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _operation(route: Route, path: str, reference: Callable[[type], dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {route.media: {"schema": route.answer}}
    if route.streams:
        content["text/event-stream"] = {"schema": _EVENT}
    error = _SHAPES[route.shape]
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"{(\w+)}", path)
    ] + [{"name": name, "in": "query", "schema": schema} for name, schema in route.query]
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()} {path}").strip("_"),
        "summary": route.summary,
        "security": _SECURITY[route.access],
        "responses": {
            "200": {"description": "Done.", "content": content},
            "default": {
                "description": "Refused, or failed.",
                "content": {"application/json": {"schema": {"$ref": _REF + error}}},
            },
        },
    }
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        content = {"application/json": {"schema": reference(route.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _anything(kind: type) -> dict[str, Any]:
    assert kind is object, kind
    return {"description": "Anything."}


def _body_schemas(kinds: Sequence[type]) -> tuple[dict[str, Any], Callable[[type], dict[str, Any]]]:
    """All schemas by name, and the reference to that of a kind."""
    models: list[type[BaseModel]] = [kind for kind in kinds if issubclass(kind, BaseModel)]
    structs = [kind for kind in kinds if not issubclass(kind, BaseModel)]
    of_models, definitions = models_json_schema(
        [(kind, "validation") for kind in models], ref_template=_REF + "{model}"
    )
    of_structs, components = msgspec.json.schema_components(
        structs, ref_template=_REF + "{name}", schema_hook=_anything
    )
    references: dict[type, dict[str, Any]] = dict(zip(structs, of_structs, strict=True))
    references |= {kind: schema for (kind, _), schema in of_models.items()}
    return {**definitions.get("$defs", {}), **components}, references.__getitem__
