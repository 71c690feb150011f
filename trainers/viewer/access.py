"""Who may look: on loopback everybody of this machine, elsewhere whoever has the token. And what a browser is told about the page.

The page itself holds nothing that is secret, so it is given to everybody; what is read from stores is not. A page of another site
that a user of this machine has open is refused: by the address it asks for (its name may lead to loopback), by its origin, by
what its browser says of the request.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
from collections.abc import Mapping
from hashlib import sha256

from starlette.requests import Request

TOKEN_BYTES = 24
_BEARER = re.compile(r"bearer[ \t]+(\S+)[ \t]*", re.IGNORECASE)
_HOST = re.compile(r"\[(?P<six>[^\]]*)\](:\d*)?|(?P<name>[^:]*)(:\d*)?")


class Refusal(Exception):
    """With the status and the words of the answer."""

    def __init__(self, status: int, error: str, hint: str = "") -> None:
        super().__init__(error)
        self.status, self.error, self.hint = status, error, hint


class Access:
    """`token` None lets everybody in who reaches the address."""

    def __init__(self, host: str, port: int, token: str | None) -> None:
        self._host, self._token = host, token
        self._is_loopback = is_loopback(host)
        self.cookie = f"lrl-ui-{port}"
        """Cookies are a host's, whatever the port: two viewers have one each."""

    def check_asker(self, http: Request) -> None:
        """Raises Refusal for what a page of another site sent."""
        name = host_name(http.headers.get("host", ""))
        if self._is_loopback and not (is_loopback(name) or name == self._host.lower()):
            raise Refusal(
                403,
                "this viewer is for this machine alone, and was asked for by another name",
                "open the address that `lrl ui` printed; --host makes it reachable from elsewhere",
            )
        origin = http.headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != http.headers.get("host", "").lower():
            raise Refusal(403, "pages of other sites may not read this")
        is_visit = http.headers.get("sec-fetch-mode") == "navigate" and http.headers.get("sec-fetch-dest") == "document"
        if http.headers.get("sec-fetch-site") in ("cross-site", "same-site") and not is_visit:
            raise Refusal(403, "pages of other sites may not read this")

    def check_token(self, http: Request) -> None:
        """Raises Refusal."""
        if self._token is None:
            return
        bearer = _BEARER.fullmatch(http.headers.get("authorization", ""))
        shown = bearer[1] if bearer else http.cookies.get(self.cookie, "")
        if not self.fits(shown):
            raise Refusal(
                401, "this viewer asks for a token", "open the link that `lrl ui` printed, with ?token= in it"
            )

    def fits(self, shown: str) -> bool:
        """In a time that says nothing about the token."""
        return self._token is not None and hmac.compare_digest(_digest(shown), _digest(self._token))


def needs_token(host: str) -> bool:
    return not is_loopback(host)


def new_token() -> str:
    return secrets.token_urlsafe(TOKEN_BYTES)


def is_loopback(host: str) -> bool:
    """Whether the name, or the address, is this machine and nothing else."""
    host = host.strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def host_name(header: str) -> str:
    """Of a `Host` header, without the port; "" for what is none."""
    match = _HOST.fullmatch(header.strip())
    return (match["six"] or match["name"] or "").lower() if match else ""


def headers(nonce: str = "") -> dict[str, str]:
    """Of every answer. Styles that the page makes need its nonce; scripts that are not its file do not run."""
    style = f"style-src 'self' 'nonce-{nonce}'" if nonce else "style-src 'self'"
    policy = (
        "default-src 'none'",
        "script-src 'self'",
        style,
        "img-src 'self' data:",
        "font-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return {
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=()",
    }


def new_nonce() -> str:
    return secrets.token_urlsafe(16)


def cookie_header(name: str, token: str) -> Mapping[str, str]:
    return {"set-cookie": f"{name}={token}; Path=/; HttpOnly; SameSite=Strict"}


def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogateescape")).digest()
