"""Whose a request is: the episode that it says, and the span that made it (`lightning_rl.join` has what both ends agree on).

The episode is in a header, in the path, or at the end of the key; the first that is there counts, so that a client which was made
in one rollout and is used in the next is joined to the next. The span is in a header of ours, or is the parent of a W3C
`traceparent`. What is said and makes no sense is refused, never left out: such a request would be recorded in the wrong place.
"""

from __future__ import annotations

import re

from starlette.requests import Request

from lightning_rl.join import AGENT_HEADER, EPISODE_HEADER, SPAN_HEADER, decode_agent
from rollout_server.api.errors import ApiError
from rollout_server.api.front.access import Keys

_ID = re.compile(r"[!-~]{1,128}")
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


def episode_of(http: Request, keys: Keys) -> str | None:
    """None: it is nobody's. Raises ApiError 400 for a header that is no id, 404 for a path or a key without one."""
    said = _said(http, EPISODE_HEADER)
    if said is not None:
        return said
    said = http.path_params.get("episode")
    if said is None:
        said = keys.episode(http)
    if said is not None and not _ID.fullmatch(said):
        raise ApiError(404, "no episode has such an id", code="episode_not_found")
    return said


def span_of(http: Request) -> str | None:
    """None: it does not say. Raises ApiError 400."""
    said = _said(http, SPAN_HEADER)
    if said is None:
        match = _TRACEPARENT.fullmatch(http.headers.get("traceparent", ""))
        return match[1] if match else None
    return said


def agent_of(http: Request) -> str:
    """The name of the agent or node that makes it; "" if it says none."""
    return decode_agent(http.headers.get(AGENT_HEADER, ""))


def _said(http: Request, header: str) -> str | None:
    values = set(http.headers.getlist(header))
    if not values:
        return None
    value = values.pop()
    if values or not _ID.fullmatch(value):
        raise ApiError(
            400,
            f"the header {header} must be one id of 1 to 128 visible ASCII characters",
            param=header,
            code="invalid_header",
        )
    return value
