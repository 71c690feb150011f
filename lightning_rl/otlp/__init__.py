"""OpenTelemetry spans as OTLP carries them: the records, and what stands between them and bytes.

`decode` and `encode` speak both encodings of OTLP/HTTP, protobuf and JSON, without a dependency: the messages of a trace are
few, and a reader of our own bounds what a hostile body may cost. What a span means to us is in `otlp.read`, what an
episode looks like as spans in `otlp.write`.

Source: the OpenTelemetry protocol, version 1.x (`opentelemetry/proto/trace/v1/trace.proto` and its collector service).
"""

from __future__ import annotations

from typing import Literal

from lightning_rl.otlp import json_form, protobuf_form
from lightning_rl.otlp.records import (
    CLIENT,
    ERROR,
    INTERNAL,
    MAX_VALUES,
    OK,
    UNSET,
    OtelEvent,
    OtelSpan,
    OtlpError,
    TraceRequest,
)

__all__ = [
    "CLIENT",
    "ERROR",
    "INTERNAL",
    "JSON",
    "MAX_VALUES",
    "OK",
    "PROTOBUF",
    "UNSET",
    "Encoding",
    "OtelEvent",
    "OtelSpan",
    "OtlpError",
    "TraceRequest",
    "answer",
    "decode",
    "encode",
    "encoding_of",
    "refusal",
    "status",
]

Encoding = Literal["application/x-protobuf", "application/json"]

PROTOBUF: Encoding = "application/x-protobuf"
JSON: Encoding = "application/json"


def encoding_of(content_type: str) -> Encoding | None:
    """What a content type says, without its parameters; None for what is neither."""
    match content_type.partition(";")[0].strip().lower():
        case "application/x-protobuf" | "application/protobuf":
            return PROTOBUF
        case "application/json":
            return JSON
    return None


def decode(body: bytes, encoding: Encoding) -> list[OtelSpan]:
    """The spans of an ExportTraceServiceRequest, in its order. Raises OtlpError."""
    return protobuf_form.decode(body) if encoding == PROTOBUF else json_form.decode(body)


def encode(request: TraceRequest, encoding: Encoding) -> bytes:
    return protobuf_form.encode(request) if encoding == PROTOBUF else json_form.encode(request)


def answer(encoding: Encoding, rejected: int, message: str) -> bytes:
    """An ExportTraceServiceResponse; all is well without a message."""
    return (protobuf_form if encoding == PROTOBUF else json_form).answer(rejected, message)


def refusal(body: bytes, encoding: Encoding) -> tuple[int, str]:
    """How many spans an ExportTraceServiceResponse refuses, and why. Raises OtlpError."""
    return (protobuf_form if encoding == PROTOBUF else json_form).refusal(body)


def status(encoding: Encoding, code: int, message: str) -> bytes:
    """A google.rpc.Status."""
    return (protobuf_form if encoding == PROTOBUF else json_form).status(code, message)
