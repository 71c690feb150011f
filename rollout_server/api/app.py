"""The web application: services, and an endpoint for every path of the table of routes.

`/v1/…` serves anybody, and records the calls of an agent's episode where a request says whose it is: by its header, its key, or its
path `/e/<episode>/v1/…`. With an API key set, both need it; the
trainer's routes need the admin key always. `/health` is open and answers 200 only if the engine can serve.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as WebRoute

from lightning_rl.errors import ServerError
from lightning_rl.redact import Redactor, environment_keys, store_passwords
from lightning_rl.store import Store
from rollout_server.api.config import WebConfig
from rollout_server.api.dialects.response_store import ResponseStore
from rollout_server.api.engine.engine_client import EngineClient
from rollout_server.api.engine.replicas import Replicas
from rollout_server.api.errors import ApiError
from rollout_server.api.front.access import Access, Keys, Origins
from rollout_server.api.front.endpoint import Bodies, Endpoint, Handler, House, Shape
from rollout_server.api.front.limits import Admission
from rollout_server.api.front.metrics import Metrics
from rollout_server.api.front.openapi import describing
from rollout_server.api.front.patience import PatientRenderer
from rollout_server.api.front.routes import ROUTES, Route, shown
from rollout_server.api.front.text_size import TextSize
from rollout_server.api.recorder import Recorder
from rollout_server.api.redaction import Redaction
from rollout_server.api.rendering.conversation import ConversationIndex
from rollout_server.api.rendering.render import Renderer
from rollout_server.api.replies.reasoning import REASONING_FORMATS, ReasoningFormat, detect_reasoning
from rollout_server.api.replies.tool_formats import FORMATS, ToolFormat, detect
from rollout_server.api.services import Services
from rollout_server.grammar import Grammars

T = TypeVar("T")


def build_app(config: WebConfig) -> Starlette:
    services = _services(config)
    house = House(
        services=services,
        limits=config.limits,
        metrics=services.metrics,
        keys=Keys(config.api_key, config.admin_key),
        origins=Origins(config.cors_origins),
        bodies=Bodies(config.limits),
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        services.engine.start()
        yield
        services.engine.hang_up()
        await asyncio.gather(*services.tasks, return_exceptions=True)  # they still record what was sampled
        await services.lines.close()
        services.engine.close()
        if services.recorder is not None:
            services.recorder.close()

    app = Starlette(lifespan=lifespan, routes=_web_routes(house, [*ROUTES, describing(ROUTES)]))
    app.router.redirect_slashes = False
    app.router.default = Endpoint(house, "unknown", dict.fromkeys(_METHODS, ("open", _unknown)))
    app.state.services = services
    return app


def _services(config: WebConfig) -> Services:
    renderer = PatientRenderer(Path(config.model_dir))
    engine = Replicas(
        [EngineClient(Path(directory)) for directory in config.ipc_dirs], config.kv_tokens + config.host_kv_tokens
    )
    admission = Admission(config.limits)
    return Services(
        config=config,
        context_limit=config.context_limit(),
        vocab_size=config.vocab_size(),
        engine=engine,
        renderer=renderer,
        conversations=ConversationIndex(renderer),
        recorder=Recorder(Store.open(config.store), _redaction(config, renderer)) if config.store is not None else None,
        tool_format=_tool_format(config, renderer),
        reasoning=_reasoning(config, renderer),
        grammars=Grammars(Path(config.model_dir), config.vocab_size()),
        responses=ResponseStore(),
        admission=admission,
        metrics=Metrics(config.served_name, admission, engine.stats),
        text_size=TextSize(renderer.tokenizer, config.context_limit()),
    )


def _redaction(config: WebConfig, renderer: Renderer) -> Redaction:
    """Of what the recipe says, and of every key that this process knows."""
    keys = [config.api_key, *(provider.api_key for provider in config.upstreams.values())]
    passwords = store_passwords(config.store, os.environ)
    redactor = Redactor(config.redact, [*keys, *config.known_keys, *passwords, *environment_keys(os.environ)])
    return Redaction(redactor, renderer.tokenizer, min(renderer.stop_ids, default=0))


def _tool_format(config: WebConfig, renderer: Renderer) -> ToolFormat:
    if config.tool_parser is None:
        return detect(renderer.template)
    return _named(FORMATS, config.tool_parser, "tool parser")


def _reasoning(config: WebConfig, renderer: Renderer) -> ReasoningFormat | None:
    if config.reasoning_parser is None:
        return detect_reasoning(renderer.template)
    return _named(REASONING_FORMATS, config.reasoning_parser, "reasoning parser")


def _named(known: Mapping[str, T], name: str, what: str) -> T:
    if name not in known:
        raise ServerError(f"there is no {what} {name!r}", hint=f"there are {', '.join(known)}")
    return known[name]


_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")


async def _unknown(services: Services, http: Request, episode_id: str | None) -> Response:
    raise ApiError(404, f"there is nothing at {http.url.path[:200]}", code="unknown_route")


def _web_routes(house: House, routes: Iterable[Route]) -> list[WebRoute]:
    """One endpoint for every path, whatever its methods."""
    handlers: dict[str, dict[str, tuple[Access, Handler]]] = {}
    shapes: dict[str, Shape] = {}
    recorded: set[str] = set()
    for route in routes:
        for path in [route.path, *([f"/e/{{episode}}{route.path}"] if route.recorded else [])]:
            handlers.setdefault(path, {})[route.method] = (route.access, route.handler)
            shapes[path] = route.shape
            if route.recorded:
                recorded.add(path)
    return [
        WebRoute(
            path, Endpoint(house, shown(path), handlers[path], shapes[path], path in recorded), include_in_schema=False
        )
        for path in handlers
    ]
