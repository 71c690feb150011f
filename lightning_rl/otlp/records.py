"""What an OTLP request holds, as records: spans, their events, and the bounds within which they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct, field

from lightning_rl.errors import LightningError

INTERNAL, CLIENT = 1, 3
"""Kinds of span, in OpenTelemetry's own sense."""
UNSET, OK, ERROR = 0, 1, 2
"""Statuses."""
MAX_VALUES = 300_000
"""Fields, of all depths, that a request may have; a batch of 512 spans has about 30,000."""
MAX_DEPTH = 32
"""Of lists and objects in an attribute's value."""


class OtlpError(LightningError):
    """Bytes that are no OTLP request. `too_large`: one with more in it than anybody should have to read."""

    def __init__(self, message: str, *, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


class OtelEvent(Struct, frozen=True, kw_only=True):
    """Something that happened while a span was open."""

    name: str
    time_ns: int = 0
    attributes: dict[str, Any] = field(default_factory=dict)


class OtelSpan(Struct, frozen=True, kw_only=True):
    """A span as OpenTelemetry knows it, its resource at hand. Attributes are what JSON has, and bytes as base64."""

    id: str
    """16 hex digits; anything else came from outside and is for the reader to refuse."""
    trace_id: str = ""
    """32 hex digits."""
    parent_id: str | None = None
    name: str = ""
    kind: int = INTERNAL
    start_ns: int = 0
    """Nanoseconds since the epoch."""
    end_ns: int = 0
    """0 for a span that has not ended."""
    attributes: dict[str, Any] = field(default_factory=dict)
    events: list[OtelEvent] = field(default_factory=list)
    status: int = UNSET
    status_message: str = ""
    resource: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of the process that it comes from; one object for all its spans."""


class TraceRequest(Struct, frozen=True, kw_only=True):
    """An ExportTraceServiceRequest: spans of one process, written by one instrumentation scope."""

    resource: Mapping[str, Any]
    scope: str
    spans: Sequence[OtelSpan]
