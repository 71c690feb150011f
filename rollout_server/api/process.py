"""The web process: `python -m rollout_server.api.process CONFIG.json`, started by `rollout_server.launch`.

SIGTERM ends it: what is under way has `drain_s` to finish while new requests are refused, then whoever still waits is told why
there will be no answer. A second one changes nothing: the first may have come to all processes, and the parent sends its own.
A SIGINT ends it at once then.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from lightning_rl.lifetime import die_with_parent
from rollout_server.api.app import build_app
from rollout_server.api.config import WebConfig, read_web_config
from rollout_server.api.front.connections import guarded, make_room
from rollout_server.api.front.draining import Door
from rollout_server.api.services import Services

NICENESS = 5
"""Where cores are few, the worker comes first: what the web process does fits into the gaps between passes."""


class WebServer(uvicorn.Server):
    def __init__(self, app: Starlette) -> None:
        self._services: Services = app.state.services
        self._door = Door(app)
        super().__init__(
            uvicorn.Config(
                self._door,
                access_log=False,
                log_config=None,
                log_level="warning",
                lifespan="on",
                http=guarded(self._services.config.limits),
                ws="none",
                timeout_keep_alive=75,
                timeout_graceful_shutdown=2,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._door.drain(self._services.config.drain_s, lambda: self.force_exit)
        self._services.engine.hang_up()
        await super().shutdown(sockets)


def serve(config: WebConfig) -> None:
    WebServer(build_app(config)).run(sockets=[socket.socket(fileno=config.listen_fd)])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    settings = read_web_config(Path(sys.argv[1]))
    die_with_parent(settings.parent_pid)
    make_room(settings.limits)
    os.nice(NICENESS)
    serve(settings)
