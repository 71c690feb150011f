"""Requests to the rollout server say which episode, span and agent they come from, whatever address their client was built with.

The SDKs of OpenAI and Anthropic offer `_prepare_request` to add headers to a finished request; plain HTTP clients are met in
their public `send`, what is built on the standard library's (urllib, urllib3) where it ends its headers, and aiohttp in the
tracing that it offers. Requests to any other host are left alone. Where several rollouts run and nothing says which one is
meant (a bare thread), the request goes out as the agent made it.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from lightning_rl.errors import LightningError
from lightning_rl.join import AGENT_HEADER, EPISODE_HEADER, SPAN_HEADER, encode_agent, episode_url
from tracers.context import current_place, current_rollout, enclosing_rollout, running_rollouts

OPENAI_URL = "https://api.openai.com/v1"
PORTS = {"http": 80, "https": 443}
DEFAULT_HOSTS = {"api.openai.com": "OPENAI_BASE_URL", "api.anthropic.com": "ANTHROPIC_BASE_URL"}
"""Where the SDKs go that nobody told anything, and the variable that tells them."""
_MARKED = "_lightning_rl_marked"


def base_url() -> str:
    """Where the current episode's calls go, `…/e/<episode>/v1`, for agents that speak plain HTTP.

    Outside of a rollout it is what the openai SDK would use: OPENAI_BASE_URL, or OpenAI itself. Raises LightningError
    where several rollouts run and this thread belongs to none.
    """
    rollout = current_rollout()
    if rollout is None or not rollout.server_url:
        return os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    return f"{episode_url(rollout.server_url, rollout.episode_id)}/v1"


def join_headers(url: str) -> dict[str, str]:
    """What a request to `url` must carry to be joined; empty unless the URL is the current rollout's server."""
    try:
        rollout = current_rollout()
    except LightningError:
        rollout = None
    if rollout is None:
        _say_unmarked(url)
        return {}
    if not rollout.server_url or _origin(url) != _origin(rollout.server_url):
        return {}
    headers = {EPISODE_HEADER: rollout.episode_id}
    place = current_place()
    if place is not None:
        headers[SPAN_HEADER] = place.span_id
        if place.agent:
            headers[AGENT_HEADER] = encode_agent(place.agent)
    return headers


def _say_unmarked(url: str) -> None:
    if any(rollout.server_url and _origin(url) == _origin(rollout.server_url) for rollout in running_rollouts()):
        warnings.warn(
            "a request to the rollout server comes from a thread or task that belongs to no running rollout; unless its "
            "URL names an episode it is not recorded: start threads with contextvars.copy_context().run, or use a thread pool",
            RuntimeWarning,
            stacklevel=2,
        )


@functools.lru_cache(maxsize=1024)
def _origin(url: str) -> tuple[str, str | None, int | None] | None:
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port or PORTS.get(parts.scheme)
    except ValueError:
        return None


def mark(request: Any) -> None:
    """Add the headers to a request of httpx's or requests' kind, unless it carries an episode already."""
    if EPISODE_HEADER not in request.headers:
        request.headers.update(join_headers(str(request.url)))


def mark_sdk(request: Any) -> None:
    """`mark`, for a request of a provider's own SDK, which goes to that provider unless it was told where the server is."""
    mark(request)
    host = request.url.host
    variable = DEFAULT_HOSTS.get(host)
    rollout = enclosing_rollout() if variable is not None else None
    if rollout is not None and rollout.server_url and not rollout.process_wide:
        warnings.warn(
            f"a request of a rollout goes to {host} and is not recorded: if its client was made before the rollout, "
            f"set {variable} before the program starts ($LRL_SERVER{'/v1' if variable == 'OPENAI_BASE_URL' else ''})",
            RuntimeWarning,
            stacklevel=2,
        )


def hook_openai() -> None:
    sdk = sys.modules["openai"]
    _mark_before(sdk.OpenAI, "_prepare_request", mark_sdk)
    _mark_before_async(sdk.AsyncOpenAI, "_prepare_request", mark_sdk)


def hook_anthropic() -> None:
    sdk = sys.modules["anthropic"]
    _mark_before(sdk.Anthropic, "_prepare_request", mark_sdk)
    _mark_before_async(sdk.AsyncAnthropic, "_prepare_request", mark_sdk)


def hook_httpx() -> None:
    _hook_clients("httpx")


def hook_httpx2() -> None:
    _hook_clients("httpx2")


def hook_requests() -> None:
    _mark_before(sys.modules["requests"].Session, "send")


def hook_http_client() -> None:
    """`http.client`, and with it urllib and urllib3."""
    connection = sys.modules["http.client"].HTTPConnection
    put_header, end_headers = connection.putheader, connection.endheaders

    @functools.wraps(put_header)
    def putheader(self: Any, header: str | bytes, *values: Any) -> None:
        name = header.decode("latin-1") if isinstance(header, bytes) else header
        if name.lower() == EPISODE_HEADER:
            self.__dict__[_MARKED] = True
        put_header(self, header, *values)

    @functools.wraps(end_headers)
    def endheaders(self: Any, *args: Any, **kwargs: Any) -> None:
        if not self.__dict__.pop(_MARKED, False) and running_rollouts():
            scheme = "https" if self.default_port == PORTS["https"] else "http"
            host = str(self.host)
            at = f"[{host}]" if ":" in host else host
            for name, value in join_headers(f"{scheme}://{at}:{self.port}").items():
                put_header(self, name, value)
        end_headers(self, *args, **kwargs)

    connection.putheader, connection.endheaders = putheader, endheaders


def hook_aiohttp() -> None:
    library = sys.modules["aiohttp"]
    config = library.TraceConfig()

    async def on_request_start(_: Any, __: Any, request: Any) -> None:
        if EPISODE_HEADER not in request.headers:
            request.headers.update(join_headers(str(request.url)))

    config.on_request_start.append(on_request_start)
    original = library.ClientSession.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, trace_configs: Any = None, **kwargs: Any) -> None:
        original(self, *args, trace_configs=[*(trace_configs or ()), config], **kwargs)

    library.ClientSession.__init__ = init


def _hook_clients(name: str) -> None:
    library = sys.modules[name]
    _mark_before(library.Client, "send")
    _mark_before_async(library.AsyncClient, "send")


def _mark_before(cls: Any, name: str, mark: Callable[[Any], None] = mark) -> None:
    original: Callable[..., Any] = getattr(cls, name)

    @functools.wraps(original)
    def marked(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        mark(request)
        return original(self, request, *args, **kwargs)

    setattr(cls, name, marked)


def _mark_before_async(cls: Any, name: str, mark: Callable[[Any], None] = mark) -> None:
    original: Callable[..., Any] = getattr(cls, name)

    @functools.wraps(original)
    async def marked(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        mark(request)
        return await original(self, request, *args, **kwargs)

    setattr(cls, name, marked)
