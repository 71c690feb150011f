"""`as_json`: any Python value as JSON that every store, socket and file of ours can hold. Nothing is refused, nothing raises."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

DEEPEST = 64
"""Levels of nesting that are kept; what is deeper, or holds itself, becomes its repr."""


def as_json(value: Any, _depth: int = 0) -> Any:
    """Text, whole numbers of 64 bits, finite numbers, booleans, None, lists and dicts stay; all else becomes its repr.

    Keys become text; halves of surrogate pairs, which UTF-8 cannot hold, are written as escapes.
    """
    match value:
        case None | bool():
            return value
        case str():
            return _utf8(value)
        case Integral() if -(2**63) <= int(value) < 2**63:
            return int(value)
        case float() | Real() if not isinstance(value, Integral) and _is_finite(value):
            return float(value)
        case dict() if _depth < DEEPEST:
            return {
                _utf8(key) if isinstance(key, str) else _repr(key): as_json(item, _depth + 1)
                for key, item in value.items()
            }
        case list() | tuple() if _depth < DEEPEST:
            return [as_json(item, _depth + 1) for item in value]
    return _repr(value)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (OverflowError, TypeError, ValueError):
        return False


def _repr(value: Any) -> str:
    try:
        return _utf8(repr(value))
    except Exception as error:
        return f"<{type(value).__name__} whose repr raises {type(error).__name__}>"


def _utf8(text: str) -> str:
    return str.__str__(text) if text.isascii() else text.encode(errors="backslashreplace").decode()
