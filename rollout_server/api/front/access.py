"""Who may call: keys, and web pages.

A key comes as a bearer token or, as Anthropic's clients send it, as `x-api-key`; a client's key may say behind its end whose calls
are made with it (`KEY/e/EPISODE`). Digests are compared in constant time, so that
neither content nor length shows in how long a refusal takes; keys are in no error and in no log. A request that names an
`Origin` comes from a web page: it is refused unless the origin is configured, whatever its key. Otherwise any page that a user of
this machine opens could call a server on its loopback.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Collection, Mapping
from hashlib import blake2b, sha256
from typing import Literal

from starlette.requests import Request

from lightning_rl.join import split_key
from rollout_server.api.errors import ApiError

Access = Literal["open", "client", "admin"]
"""Anybody; whoever has the clients' key, if there is one; whoever has the admin key."""

_BEARER = re.compile(rb"bearer[ \t]+(\S.*?)[ \t]*", re.IGNORECASE | re.DOTALL)

CORS_METHODS = "GET, POST, DELETE"
CORS_AGE_S = 600


class Keys:
    def __init__(self, client: str | None, admin: str) -> None:
        """`client` None lets everybody in to what is a client's."""
        self._digests = {
            "client": None if client is None else _digest(client.encode()),
            "admin": _digest(admin.encode()),
        }

    def check(self, http: Request, access: Access) -> None:
        """Raises ApiError 401."""
        expected = None if access == "open" else self._digests[access]
        if expected is None:
            return
        given = presented(http)
        if given is not None:
            whole = hmac.compare_digest(_digest(given), expected)
            before = hmac.compare_digest(_digest(_split(given)[0]), expected)
            if whole or (before and access == "client"):
                return
        raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def episode(self, http: Request) -> str | None:
        """The episode that the key says; a key that ends so by itself says none."""
        given, own = presented(http), self._digests["client"]
        if given is None or (own is not None and hmac.compare_digest(_digest(given), own)):
            return None
        return _split(given)[1]


def presented(http: Request) -> bytes | None:
    """The key that the request shows, right or wrong; None unless there is exactly one."""
    found = []
    for name, value in http.scope["headers"]:
        if name == b"x-api-key":
            found.append(bytes(value))
        elif name == b"authorization":
            match = _BEARER.fullmatch(value)
            found.append(match[1] if match else b"")
    return found[0] if len(set(found)) == 1 else None


def flow_of(http: Request, episode_id: str | None) -> str:
    """Who asks: the episode, or else the key shown and the address."""
    if episode_id is not None:
        return f"e:{episode_id}"
    host = http.client.host if http.client else ""
    return "k:" + blake2b((presented(http) or b"") + b"\n" + host.encode(), digest_size=12).hexdigest()


class Origins:
    """`allowed` are exact, as `https://example.org`."""

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = frozenset(allowed)

    def check(self, http: Request) -> None:
        """Raises ApiError 403 for a web page that may not call."""
        origin = http.headers.get("origin")
        if origin is not None and origin not in self._allowed:
            raise ApiError(403, "web pages of this origin may not call this server", code="origin_not_allowed")

    def headers(self, http: Request) -> Mapping[str, str]:
        """Of every answer: what lets the page read it."""
        origin = http.headers.get("origin")
        if origin is None or origin not in self._allowed:
            return {}
        return {
            "access-control-allow-origin": origin,
            "access-control-expose-headers": "retry-after",
            "vary": "origin",
        }

    def preflight(self, http: Request) -> Mapping[str, str]:
        """Of an answer to `OPTIONS`. Raises ApiError 403."""
        self.check(http)
        return {
            "access-control-allow-methods": CORS_METHODS,
            "access-control-allow-headers": http.headers.get("access-control-request-headers", "*"),
            "access-control-max-age": str(CORS_AGE_S),
        }


def _split(given: bytes) -> tuple[bytes, str | None]:
    key, episode_id = split_key(given.decode("latin-1"))
    return key.encode("latin-1"), episode_id


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()
