"""OTLP's JSON encoding: protobuf's mapping to JSON, but ids are hex digits and enumerations are numbers.

Read leniently where protobuf is: 64-bit numbers come as text or numbers, null is what is not there, fields that nobody
knows are skipped. What has another shape is refused with the name of the field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec

from lightning_rl.otlp.records import MAX_DEPTH, MAX_VALUES, OtelEvent, OtelSpan, OtlpError, TraceRequest

_STRING = re.compile(rb'"[^"]*"?')
_HEX = frozenset("0123456789abcdef")
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def decode(body: bytes) -> list[OtelSpan]:
    if _values(body) > MAX_VALUES and _is_too_much(body):
        raise OtlpError(f"the request has more than {MAX_VALUES} values", too_large=True)
    request = _loaded(body.decode("utf-8", "replace"))
    if not isinstance(request, dict):
        _wrong("the request", "an object")
    spans: list[OtelSpan] = []
    for of_resource in _objects(request, "resourceSpans"):
        resource = _attributes(_object(of_resource, "resource"))
        for of_scope in _objects(of_resource, "scopeSpans"):
            spans += [_span(span, resource) for span in _objects(of_scope, "spans")]
    return spans


def _values(bare: bytes) -> int:
    return bare.count(b"{") + bare.count(b"[") + bare.count(b",")


def _is_too_much(body: bytes) -> bool:
    """Whether there are more than `MAX_VALUES`, not counting what stands inside text. A value has at most two texts."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    values = at = 0
    for number, text in enumerate(_STRING.finditer(plain)):
        values += _values(plain[at : text.start()])
        at = text.end()
        if values > MAX_VALUES or number > 2 * MAX_VALUES:
            return True
    return values + _values(plain[at:]) > MAX_VALUES


def _loaded(text: str) -> Any:
    """JavaScript writes halves of surrogate pairs as escapes, and Python NaN: only the standard library reads those."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OtlpError("the request is no JSON") from error


def _span(span: dict[str, Any], resource: Mapping[str, Any]) -> OtelSpan:
    status = _object(span, "status")
    return OtelSpan(
        id=_hex(span, "spanId"),
        trace_id=_hex(span, "traceId"),
        parent_id=_hex(span, "parentSpanId") or None,
        name=_text(span, "name"),
        kind=_whole(span, "kind"),
        start_ns=_whole(span, "startTimeUnixNano"),
        end_ns=_whole(span, "endTimeUnixNano"),
        attributes=_attributes(span),
        events=[
            OtelEvent(name=_text(event, "name"), time_ns=_whole(event, "timeUnixNano"), attributes=_attributes(event))
            for event in _objects(span, "events")
        ],
        status=_whole(status, "code"),
        status_message=_text(status, "message"),
        resource=resource,
    )


def _attributes(owner: dict[str, Any], depth: int = 0, name: str = "attributes") -> dict[str, Any]:
    return {_text(pair, "key"): _any(_object(pair, "value"), depth) for pair in _objects(owner, name)}


def _any(value: dict[str, Any], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise OtlpError(f"an attribute is nested more than {MAX_DEPTH} deep", too_large=True)
    for kind, held in value.items():
        if held is None:
            continue
        match kind:
            case "stringValue" | "bytesValue":
                return _text(value, kind)
            case "boolValue":
                return held if type(held) is bool else _wrong(kind, "true or false")
            case "intValue":
                return _whole(value, kind, low=-(2**63), high=2**63)
            case "doubleValue":
                return _real(held, kind)
            case "arrayValue":
                return [_any(inner, depth + 1) for inner in _objects(_object(value, kind), "values")]
            case "kvlistValue":
                return _attributes(_object(value, kind), depth + 1, "values")
    return None


def _objects(owner: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = owner.get(name)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        _wrong(name, "a list of objects")
    return found


def _object(owner: dict[str, Any], name: str) -> dict[str, Any]:
    found = owner.get(name)
    if found is None:
        return {}
    return found if isinstance(found, dict) else _wrong(name, "an object")


def _text(owner: dict[str, Any], name: str) -> str:
    found = owner.get(name)
    if found is None:
        return ""
    if not isinstance(found, str):
        _wrong(name, "text")
    return found if found.isascii() else found.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _hex(owner: dict[str, Any], name: str) -> str:
    found = _text(owner, name).lower()
    return found if _HEX.issuperset(found) else _wrong(name, "hex digits")


def _whole(owner: dict[str, Any], name: str, low: int = 0, high: int = 2**64) -> int:
    found = owner.get(name)
    if found is None:
        return 0
    if isinstance(found, str) and len(found) <= 20:
        try:
            found = int(found)
        except ValueError:
            _wrong(name, "a whole number")
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if type(found) is not int or not low <= found < high:
        _wrong(name, "a whole number of 64 bits")
    return found


def _real(held: Any, name: str) -> float:
    if isinstance(held, str) and held in _SPECIAL:
        return _SPECIAL[held]
    try:
        return float(held) if type(held) in (int, float, str) else _wrong(name, "a number")
    except (ValueError, OverflowError):
        _wrong(name, "a number")


def _wrong(name: str, what: str) -> NoReturn:
    raise OtlpError(f"{name} must be {what}")


def encode(request: TraceRequest) -> bytes:
    scope_spans = {"scope": {"name": request.scope}, "spans": [_written_span(span) for span in request.spans]}
    resource_spans = {"resource": {"attributes": _written_pairs(request.resource)}, "scopeSpans": [scope_spans]}
    return msgspec.json.encode({"resourceSpans": [resource_spans]})


def answer(rejected: int, message: str) -> bytes:
    partial = {"rejectedSpans": str(rejected), "errorMessage": message} if message else {}
    return msgspec.json.encode({"partialSuccess": partial})


def refusal(body: bytes) -> tuple[int, str]:
    said = _loaded(body.decode("utf-8", "replace"))
    partial = _object(said if isinstance(said, dict) else _wrong("the answer", "an object"), "partialSuccess")
    return _whole(partial, "rejectedSpans"), _text(partial, "errorMessage")


def status(code: int, message: str) -> bytes:
    return msgspec.json.encode({"code": code, "message": message})


def _written_span(span: OtelSpan) -> dict[str, Any]:
    return {
        "traceId": span.trace_id,
        "spanId": span.id,
        **({"parentSpanId": span.parent_id} if span.parent_id else {}),
        "name": span.name,
        "kind": span.kind,
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end_ns),
        "attributes": _written_pairs(span.attributes),
        "events": [
            {
                "timeUnixNano": str(event.time_ns),
                "name": event.name,
                "attributes": _written_pairs(event.attributes),
            }
            for event in span.events
        ],
        "status": {"message": span.status_message, "code": span.status},
    }


def _written_pairs(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _written_any(value)} for key, value in values.items()]


def _written_any(value: Any) -> dict[str, Any]:
    match value:
        case None:
            return {}
        case bool():
            return {"boolValue": value}
        case int() if -(2**63) <= value < 2**63:
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value if math.isfinite(value) else _spelt(value)}
        case list() | tuple():
            return {"arrayValue": {"values": [_written_any(inner) for inner in value]}}
        case dict():
            return {"kvlistValue": {"values": _written_pairs(value)}}
    return {"stringValue": str(value)}


def _spelt(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
