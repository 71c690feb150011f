"""What is known of a request before anybody reads it: whose it is, since when, and what has to be given back at its end.

The endpoint leaves it with the request; handlers and what they call pick it up with `visit(http)`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from starlette.requests import Request

_KEY = "lrl.visit"


@dataclass(frozen=True)
class Visit:
    flow: str
    """Who asks, for limits and fairness: the episode, or a digest of key and address."""
    started: float
    """`time.perf_counter()` at the request's head."""
    at_end: ExitStack
    """Closed when the last byte of the answer is sent, or the client is gone."""
    span_id: str | None = None
    """The agent's span that made it, if the request says so."""


def leave_with(http: Request, visit: Visit) -> None:
    http.scope[_KEY] = visit


def visit(http: Request) -> Visit:
    found = http.scope[_KEY]
    assert isinstance(found, Visit)
    return found
