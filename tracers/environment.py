"""The environment variables that tell an agent's SDKs where to call, while rollouts of this process share them.

The environment is one for all threads, and clients keep what they read there for longer than a rollout. So it names the
server alone, and requests say for themselves whose they are (`requests`). It also tells processes that are started here
that they are none of the rollouts'. What was there before comes back when the last rollout has gone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tracers.forking import after_fork

SPAWNER = "LRL_ROLLOUTS_IN"
"""Id of the process whose rollouts these are: in any other, and in no rollout, what is emitted cannot reach them."""

_lock = threading.Lock()
_users = 0
_before: dict[str, str | None] = {}


@contextmanager
def pointing_at(server_url: str) -> Iterator[None]:
    global _users
    with _lock:
        variables = _addresses(server_url.rstrip("/"))
        if _users == 0:
            variables |= _missing_keys()
            _before.update({name: os.environ.get(name) for name in variables})
        _users += 1
        os.environ.update(variables)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _restore()


def _addresses(base: str) -> dict[str, str]:
    return {"OPENAI_BASE_URL": f"{base}/v1", "ANTHROPIC_BASE_URL": base, SPAWNER: str(os.getpid())}


def _missing_keys() -> dict[str, str]:
    """The SDKs refuse to start without a key; a server that wants none takes any."""
    return {name: "lrl" for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY") if name not in os.environ}


def _restore() -> None:
    for name, value in _before.items():
        if value is not None:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)
    _before.clear()


@after_fork
def _forget() -> None:
    """In a forked child: what it inherited is its environment from now on."""
    global _lock, _users
    _lock, _users = threading.Lock(), 0
    _before.clear()
