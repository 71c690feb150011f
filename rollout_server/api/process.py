"""The web process: `python -m rollout_server.api.process CONFIG.json`, started by `rollout_server.launch`."""

from __future__ import annotations

import logging
import socket
import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from lightning_rl.lifetime import die_with_parent
from rollout_server.api.app import build_app
from rollout_server.api.config import WebConfig, read_web_config
from rollout_server.api.exchange import Services


class WebServer(uvicorn.Server):
    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                access_log=False,
                log_config=None,
                log_level="warning",
                lifespan="on",
                timeout_keep_alive=75,
                timeout_graceful_shutdown=2,
            )
        )
        self._services: Services = app.state.services

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Whoever still waits for a reply is told at once why there will be none."""
        self._services.engine.hang_up()
        await super().shutdown(sockets)


def serve(config: WebConfig) -> None:
    WebServer(build_app(config)).run(sockets=[socket.socket(fileno=config.listen_fd)])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    settings = read_web_config(Path(sys.argv[1]))
    die_with_parent(settings.parent_pid)
    serve(settings)
