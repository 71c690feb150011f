"""What clients mean by a model's name: the policy, an adapter, or an alias of either; and what answers them in its place. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from msgspec import Struct

from lightning_rl.agents import Caller, fits
from rollout_server.api.errors import ApiError

POLICY = "policy"
"""What an alias or a route may call the policy, whatever name it is served under."""


class AgentRoute(Struct, frozen=True, kw_only=True):
    """Who answers some of the requests, whatever model they name."""

    match: str
    """Glob for the name of the agent, or of the model that is asked for."""
    to: str
    """`policy`, or the name of an adapter or an upstream."""


def route_of(routes: Sequence[AgentRoute], agent: str | None, model: str) -> str | None:
    """Where the first route leads that fits; None if none does."""
    if not routes:
        return None
    caller = Caller(agent=agent, model=model)
    return next((route.to for route in routes if fits([route.match], caller)), None)


def routed_adapter(to: str, adapters: Collection[str]) -> str:
    """The adapter that a route names; "" is the policy. Raises ApiError 404 for an adapter that is not loaded."""
    if to == POLICY:
        return ""
    if to not in adapters:
        raise _unknown(f"a route leads this request to the adapter {to!r}, which is not loaded")
    return to


def adapter_of(name: str, served_name: str, aliases: Sequence[str], adapters: Collection[str]) -> str:
    """The adapter that is meant; "" is the policy.

    An alias is `GLOB`, for the policy, or `GLOB=MODEL`; the first that fits counts. Names that are served come before all aliases.

    Raises ApiError 404 for a name that means nothing, or an adapter that is not loaded.
    """
    if name in adapters:
        return name
    if name == served_name:
        return ""
    for alias in aliases:
        glob, _, target = alias.rpartition("=") if "=" in alias else (alias, "", "")
        if not fnmatchcase(name, glob):
            continue
        if target in ("", POLICY, served_name):
            return ""
        if target in adapters:
            return target
        raise _unknown(f"the model {name!r} is an alias of {target!r}, which is not loaded")
    known = ", ".join([served_name, *aliases, *adapters])
    raise _unknown(f"the model {name[:200]!r} does not exist; served here: {known}")


def _unknown(message: str) -> ApiError:
    return ApiError(404, message, param="model", code="model_not_found")
