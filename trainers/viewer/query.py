"""The arguments of `/episodes` as an EpisodeQuery: `outcome=timeout&outcome=completed&step=3,5&reward.good=0.5,&counted=true`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_type_hints

import msgspec

from lightning_rl.errors import LightningError
from trainers.viewer.records import EpisodeQuery

MOST_ROWS = 500
LONGEST = 1000
"""Of a text that is looked for."""
_HINTS = get_type_hints(EpisodeQuery)
_REWARD = "reward."


class QueryError(LightningError):
    """An argument that says nothing."""


def episode_query(arguments: Sequence[tuple[str, str]]) -> EpisodeQuery:
    """Raises QueryError."""
    given: dict[str, Any] = {}
    for name, text in arguments:
        if len(text) > LONGEST:
            raise QueryError(f"{name} is longer than {LONGEST} characters")
        if name.startswith(_REWARD):
            given.setdefault("reward", {})[name.removeprefix(_REWARD)] = _range(name, text)
        elif name not in _HINTS or name == "reward":
            raise QueryError(f"episodes have no {name} to choose by", hint=f"there are {', '.join(sorted(_HINTS))}")
        elif _HINTS[name] == tuple[str, ...]:
            given[name] = (*given.get(name, ()), text)
        elif _HINTS[name] == tuple[float | None, float | None]:
            given[name] = _range(name, text)
        else:
            given[name] = text
    try:
        query = msgspec.convert(given, EpisodeQuery, strict=False)
    except msgspec.ValidationError as error:
        raise QueryError(f"the address says something wrong: {error}") from error
    if query.offset < 0 or not 0 <= query.limit <= MOST_ROWS:
        raise QueryError(f"offset is at least 0 and limit at most {MOST_ROWS}")
    return query


def _range(name: str, text: str) -> tuple[float | None, float | None]:
    low, comma, high = text.partition(",")
    if not comma:
        raise QueryError(f"{name} is a range, with a comma: {name}=0.5,1 or {name}=0.5,")
    return _end(name, low), _end(name, high)


def _end(name: str, text: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise QueryError(f"{name}: {text!r} is not a number")
    return value
