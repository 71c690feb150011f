"""The viewer's web server, from its sockets to Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from lightning_rl.errors import ServerError

TRIES = 50
BACKLOG = 128
NICENESS = 10
"""A run that goes on beside it comes first."""
PATIENCE_S = 0.5
SWITCH_S = 0.0005
"""Who asks for a page goes before the thread that reads for the index: Python's own 5 ms each time add up to half a second."""
_TAKEN = (errno.EADDRINUSE, errno.EACCES)


def listen(host: str, port: int, *, is_asked_for: bool) -> socket.socket:
    """At the port, or at the next free one if nobody asked for it. Raises ServerError."""
    last = port if is_asked_for or not port else min(port + TRIES, 65535)
    for number in range(port, last + 1):
        try:
            return _listening(host, number)
        except OSError as error:
            if error.errno in _TAKEN and number < last:
                continue
            raise ServerError(
                f"cannot listen at {host}:{number}: {error.strerror or error}",
                hint="--port 0 takes any free port"
                if error.errno in _TAKEN
                else "is --host an address of this machine?",
            ) from error
    raise AssertionError


def _listening(host: str, port: int) -> socket.socket:
    """Two viewers that start at once may be bound to one port: the second to listen there is told so."""
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def serve(app: ASGIApp, listener: socket.socket, on_start: Callable[[], None], on_stop: Callable[[], None]) -> None:
    """Until Ctrl-C or SIGTERM. `on_stop` tells those who make answers to end; who does not within a second is left behind."""
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    sys.setswitchinterval(SWITCH_S)
    server = _Server(
        uvicorn.Config(
            app,
            access_log=False,  # addresses may have the token in them
            log_level="warning",
            lifespan="on",
            ws="none",
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
        ),
        on_start,
        on_stop,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # raised again by uvicorn when all is closed
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        server.run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None], on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start, self._on_stop = on_start, on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it reports what it breaks off
        self._on_stop()
        await super().shutdown(sockets)


def end_if_busy(code: int = 0) -> None:
    """End the process where threads still make answers that nobody waits for: Python would wait for them."""
    deadline = time.monotonic() + PATIENCE_S
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    for thread in (thread for thread in others if not thread.daemon):
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
