"""Follows OpenTelemetry in this process: whichever tracer provider it has, now or later, gets our span processor.

OpenTelemetry takes one global provider for good, and makes no spans before. So while the agent has set none, a standby makes them,
and `set_tracer_provider` finds the place free all the same: the standby hands everything on to the agent's, and who asks for
the provider gets the agent's.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from typing import TYPE_CHECKING

from opentelemetry import trace

if TYPE_CHECKING:
    from tracers.frameworks.otel_spans import Bridge, StandbyProvider


_started = False


def install() -> None:
    """Called after OpenTelemetry's API is imported.

    Without its SDK nobody can make a span, and there is nothing to follow; if the SDK is what imports the API, it comes next.
    """
    if importlib.util.find_spec("opentelemetry.sdk") is not None and not _half_imported("opentelemetry.sdk"):
        install_with_sdk()


def install_with_sdk() -> None:
    """Called after OpenTelemetry's SDK is imported."""
    global _started
    if _started:
        return
    _started = True  # the next import may call this again
    from tracers.frameworks.otel_spans import Bridge, StandbyProvider

    bridge, provider = Bridge(), trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider):
        provider = StandbyProvider()
        trace.set_tracer_provider(provider)
        _make_room(provider, bridge)
    _follow(provider, bridge)


def _half_imported(package: str) -> bool:
    specs = [
        getattr(module, "__spec__", None) for name, module in list(sys.modules.items()) if name.startswith(package)
    ]
    return any(getattr(spec, "_initializing", False) for spec in specs)


def _make_room(standby: StandbyProvider, bridge: Bridge) -> None:
    original, original_get = trace.set_tracer_provider, trace.get_tracer_provider

    @functools.wraps(original)
    def set_tracer_provider(tracer_provider: trace.TracerProvider) -> None:
        if standby.successor is not None:
            original(tracer_provider)  # which says that there is one already
            return
        _follow(tracer_provider, bridge)
        standby.successor = tracer_provider

    @functools.wraps(original_get)
    def get_tracer_provider() -> trace.TracerProvider:
        return standby.successor or original_get()

    trace.set_tracer_provider = set_tracer_provider
    trace.get_tracer_provider = get_tracer_provider
    logging.getLogger("opentelemetry.context").addFilter(lambda record: not _is_our_noise(standby, record))


def _is_our_noise(standby: StandbyProvider, record: logging.LogRecord) -> bool:
    """Whether it is about a generator that was left before its end, where the agent itself has no spans to be told of."""
    return standby.successor is None and record.msg == "Failed to detach context"


def _follow(provider: trace.TracerProvider, bridge: Bridge) -> None:
    from tracers.frameworks.otel_spans import Watched

    add = getattr(provider, "add_span_processor", None)
    if add is not None:
        add(bridge)
    own = getattr(provider, "sampler", None)
    if own is not None:
        provider.sampler = Watched(own)  # type: ignore[attr-defined]
