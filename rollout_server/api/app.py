"""The web application: routes, keys, and every error in OpenAI's shape.

`/v1/…` serves anybody; `/e/<episode>/v1/…` serves an agent's episode and records it. With an API key set, both need it
as a bearer token; the trainer's routes need the admin key always. `/health` is open and answers 200 only if the engine
does.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lightning_rl.errors import LightningError
from lightning_rl.store import Store
from rollout_server.api import admin
from rollout_server.api.chat import chat_completions
from rollout_server.api.completions import completions
from rollout_server.api.config import WebConfig
from rollout_server.api.conversation import ConversationIndex
from rollout_server.api.engine_client import EngineClient
from rollout_server.api.errors import ApiError, EngineError
from rollout_server.api.exchange import ClientGone, Services
from rollout_server.api.recorder import Recorder
from rollout_server.api.render import Renderer
from rollout_server.api.replicas import Replicas
from rollout_server.api.wire import as_api_error, json_response

HEALTH_TIMEOUT_S = 5.0

Handler = Callable[[Request], Awaitable[Response]]


def build_app(config: WebConfig) -> FastAPI:
    services = _services(config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services.engine.start()
        yield
        services.engine.hang_up()
        await asyncio.gather(*services.tasks, return_exceptions=True)  # they still record what was sampled
        services.engine.close()
        if services.recorder is not None:
            services.recorder.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.services = services
    _add_errors(app)
    _add_dialects(app, services)
    _add_trainer_routes(app, services)
    return app


def _services(config: WebConfig) -> Services:
    renderer = Renderer(Path(config.model_dir))
    return Services(
        config=config,
        context_limit=config.context_limit(),
        vocab_size=config.vocab_size(),
        engine=Replicas(
            [EngineClient(Path(directory)) for directory in config.ipc_dirs], config.kv_tokens + config.host_kv_tokens
        ),
        renderer=renderer,
        conversations=ConversationIndex(renderer),
        recorder=Recorder(Store.open(config.store)) if config.store is not None else None,
    )


def _add_dialects(app: FastAPI, services: Services) -> None:
    created = int(time.time())

    async def chat_route(http: Request) -> Response:
        return await chat_completions(services, http, http.path_params.get("episode"))

    async def completions_route(http: Request) -> Response:
        return await completions(services, http, http.path_params.get("episode"))

    async def models_route(http: Request) -> Response:
        served = services.config.served_name
        common = {
            "object": "model",
            "created": created,
            "owned_by": "lightning-rl",
            "max_model_len": services.context_limit,
        }
        adapters = [{"id": name, **common, "parent": served} for name in services.engine.adapters]
        return json_response({"object": "list", "data": [{"id": served, **common, "parent": None}, *adapters]})

    async def health(http: Request) -> Response:
        try:
            await asyncio.wait_for(services.engine.stats(), HEALTH_TIMEOUT_S)
        except TimeoutError as error:
            raise ApiError(503, "the engine does not answer yet", code="engine_unavailable") from error
        return json_response({"status": "ok"})

    key = services.config.api_key
    for prefix in ("/v1", "/e/{episode}/v1"):
        app.add_route(f"{prefix}/chat/completions", _guarded(chat_route, key), methods=["POST"])
        app.add_route(f"{prefix}/completions", _guarded(completions_route, key), methods=["POST"])
        app.add_route(f"{prefix}/models", _guarded(models_route, key), methods=["GET"])
    app.add_route("/health", health, methods=["GET"])


def _add_trainer_routes(app: FastAPI, services: Services) -> None:
    def bound(work: Callable[[Services, Request], Awaitable[Response]]) -> Handler:
        async def route(http: Request) -> Response:
            return await work(services, http)

        return _guarded(route, services.config.admin_key)

    for path, work in (
        ("/update_weights", admin.update_weights),
        ("/v1/load_lora_adapter", admin.load_adapter),
        ("/v1/unload_lora_adapter", admin.unload_adapter),
        ("/pause", admin.pause),
        ("/resume", admin.resume),
        ("/sleep", admin.sleep),
        ("/wake_up", admin.wake_up),
        ("/score", admin.score),
    ):
        app.add_route(path, bound(work), methods=["POST"])
    app.add_route("/stats", bound(admin.stats), methods=["GET"])


def _guarded(handler: Handler, key: str | None) -> Handler:
    if key is None:
        return handler
    expected = f"Bearer {key}".encode()

    async def checked(http: Request) -> Response:
        given = http.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, expected):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        return await handler(http)

    return checked


def _add_errors(app: FastAPI) -> None:
    async def deliberate(http: Request, error: Exception) -> Response:
        told = as_api_error(error)
        return json_response(told.body(), told.status)

    async def routing(http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}", code="unknown_route")
        return json_response(told.body(), told.status)

    async def gone(http: Request, error: Exception) -> Response:
        return Response(status_code=499)

    app.add_exception_handler(ApiError, deliberate)
    app.add_exception_handler(EngineError, deliberate)
    app.add_exception_handler(LightningError, deliberate)
    app.add_exception_handler(HTTPException, routing)
    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(Exception, deliberate)
