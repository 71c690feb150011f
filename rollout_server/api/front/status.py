"""What the server tells of itself: models, health, metrics."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rollout_server.api.front.metrics import CONTENT_TYPE
from rollout_server.api.front.wire import json_response
from rollout_server.api.services import Services

_STARTED = int(time.time())


async def models(services: Services, http: Request, episode_id: str | None) -> Response:
    """With an episode in the request, this also says whether calls of it would be recorded: 404 if not."""
    await services.episode(episode_id)
    return json_response({"object": "list", "data": [_model(services, name) for name in _names(services)]})


async def model(services: Services, http: Request, episode_id: str | None) -> Response:
    """An alias is answered with the policy itself."""
    return json_response(_model(services, services.adapter(http.path_params["model"])))


def _names(services: Services) -> list[str]:
    return ["", *services.engine.adapters]


def _model(services: Services, adapter: str) -> dict[str, Any]:
    served = services.config.served_name
    return {
        "id": adapter or served,
        "object": "model",
        "created": _STARTED,
        "owned_by": "lightning-rl",
        "max_model_len": services.context_limit,
        "parent": served if adapter else None,
    }


async def health(services: Services, http: Request, episode_id: str | None) -> Response:
    """200 while any replica can serve; `down` says what is wrong with those that cannot."""
    down = await services.engine.health()
    return json_response({"status": "ok", "down": {str(number): why for number, why in down.items()}})


async def metrics(services: Services, http: Request, episode_id: str | None) -> Response:
    return Response(await services.metrics.page(), headers={"content-type": CONTENT_TYPE})
