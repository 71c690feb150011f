"""Makes the hooks of every framework that this process has imported, or will import, report to the current rollout.

Nothing is imported here for its own sake: a framework's hooks are loaded right after the framework itself. They cost
nothing while no rollout runs. A hook that does not fit the installed version warns and leaves the agent as it is:
its requests still say whose they are by their URL.
"""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from collections.abc import Callable

from tracers.forking import after_fork

HOOKS: dict[str, str] = {
    "openai": "tracers.requests:hook_openai",
    "anthropic": "tracers.requests:hook_anthropic",
    "httpx": "tracers.requests:hook_httpx",
    "httpx2": "tracers.requests:hook_httpx2",
    "requests": "tracers.requests:hook_requests",
    "http.client": "tracers.requests:hook_http_client",
    "aiohttp": "tracers.requests:hook_aiohttp",
    "concurrent.futures.thread": "tracers.threads:hook_thread_pools",
    "langchain_core.tracers.context": "tracers.frameworks.langchain:install",
    "agents.tracing": "tracers.frameworks.openai_agents:install",
    "opentelemetry.trace": "tracers.frameworks.otel:install",
    "opentelemetry.sdk.trace": "tracers.frameworks.otel:install_with_sdk",
    "autogen_core": "tracers.frameworks.autogen:install",
}
"""For a module that an agent may import: the function of ours, `module:function` without arguments, that is called once
after it. Imports of a package's inner modules count only if they are named here."""

_lock = threading.RLock()
_installed: set[str] = set()


def install() -> None:
    """Idempotent, from any thread, before or after the frameworks are imported; when it returns the hooks are in place."""
    from wrapt import register_post_import_hook

    with _lock:
        for name in HOOKS:
            if name in _installed:
                continue
            _installed.add(name)
            if name in sys.modules:
                importlib.import_module(name)  # another thread may be in the middle of it: wait until it is whole
            register_post_import_hook(_hook(name, HOOKS[name]), name)


def _hook(name: str, target: str) -> Callable[[object], None]:
    def hook(_: object) -> None:
        module, function = target.split(":")
        try:
            getattr(importlib.import_module(module), function)()
        except Exception as error:
            # The agent's own import of the framework must not fail because of us.
            warnings.warn(
                f"Lightning RL cannot follow {name} ({type(error).__name__}: {error}); its spans will be missing",
                RuntimeWarning,
                stacklevel=2,
            )

    return hook


@after_fork
def _forget() -> None:
    """In a forked child: another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()
