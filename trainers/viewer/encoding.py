"""Records as JSON that every browser reads."""

from __future__ import annotations

from typing import Any

import msgspec


def encoded(value: Any) -> bytes:
    """NaN and the infinities become null. A lone surrogate, which UTF-8 has no bytes for, becomes U+FFFD."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return msgspec.json.encode(_writable(msgspec.to_builtins(value)))


def writable(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _writable(value: Any) -> Any:
    if isinstance(value, str):
        return writable(value)
    if isinstance(value, list | tuple):
        return [_writable(each) for each in value]
    if isinstance(value, dict):
        return {_writable(key): _writable(each) for key, each in value.items()}
    return value
