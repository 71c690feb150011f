"""OTLP's protobuf encoding, read and written by hand.

The reader takes any order of fields and skips those that it does not know. It counts what it reads, so that two bytes on the wire,
which may stand for a whole message, never cost more than `MAX_VALUES` of them; text that is no UTF-8 shows U+FFFD instead.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_rl.otlp.records import MAX_DEPTH, MAX_VALUES, OtelEvent, OtelSpan, OtlpError, TraceRequest

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_U64 = 2**64
_double = struct.Struct("<d")
_fixed = struct.Struct("<Q")


def decode(body: bytes) -> list[OtelSpan]:
    reader = _Reader(body)
    spans: list[OtelSpan] = []
    for number, part in reader.fields(0, len(body)):
        if number == 1 and type(part) is tuple:
            _resource_spans(reader, part, spans)
    return spans


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._left = MAX_VALUES

    def fields(self, at: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
        """Field numbers with numbers as they are on the wire, or where the bytes are."""
        data = self._data
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise OtlpError(f"the request has more than {MAX_VALUES} values", too_large=True)
            key = data[at]
            at += 1
            if key > 0x7F:
                key, at = self._varint(at - 1, end)
            number, kind = key >> 3, key & 7
            value: int | tuple[int, int]
            if kind == _BYTES:
                size = data[at] if at < end else 0x80
                at += 1
                if size > 0x7F:
                    size, at = self._varint(at - 1, end)
                if size > end - at:
                    raise _malformed()
                value = (at, at + size)
                at += size
            elif kind == _VARINT:
                value, at = self._varint(at, end)
            elif kind in (_FIXED64, _FIXED32):
                size = 8 if kind == _FIXED64 else 4
                if size > end - at:
                    raise _malformed()
                value = int.from_bytes(data[at : at + size], "little")
                at += size
            else:
                raise _malformed()
            if not number:
                raise _malformed()
            yield number, value

    def text(self, where: tuple[int, int]) -> str:
        return self._data[where[0] : where[1]].decode("utf-8", "replace")

    def raw(self, where: tuple[int, int]) -> bytes:
        return self._data[where[0] : where[1]]

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value % _U64, at
            shift += 7
        raise _malformed()


def _malformed() -> OtlpError:
    return OtlpError("the request is no protobuf of an ExportTraceServiceRequest")


def _resource_spans(reader: _Reader, where: tuple[int, int], spans: list[OtelSpan]) -> None:
    resource: dict[str, Any] = {}
    scopes = []
    for number, part in reader.fields(*where):
        match number, part:
            case 1, (_, _):
                for inner, attribute in reader.fields(*part):
                    if inner == 1 and type(attribute) is tuple:
                        _key_value(reader, attribute, resource)
            case 2, (_, _):
                scopes.append(part)
    for scope in scopes:
        for number, part in reader.fields(*scope):
            if number == 2 and type(part) is tuple:
                spans.append(_span(reader, part, resource))


def _span(reader: _Reader, where: tuple[int, int], resource: Mapping[str, Any]) -> OtelSpan:
    values: dict[str, Any] = {"id": "", "kind": 0, "attributes": {}, "events": [], "resource": resource}
    for number, part in reader.fields(*where):
        match number, part:
            case 1, (_, _):
                values["trace_id"] = reader.raw(part).hex()
            case 2, (_, _):
                values["id"] = reader.raw(part).hex()
            case 4, (_, _):
                values["parent_id"] = reader.raw(part).hex() or None
            case 5, (_, _):
                values["name"] = reader.text(part)
            case 6, int(kind):
                values["kind"] = kind
            case 7, int(time):
                values["start_ns"] = time
            case 8, int(time):
                values["end_ns"] = time
            case 9, (_, _):
                _key_value(reader, part, values["attributes"])
            case 11, (_, _):
                values["events"].append(_event(reader, part))
            case 15, (_, _):
                for inner, value in reader.fields(*part):
                    if inner == 2 and type(value) is tuple:
                        values["status_message"] = reader.text(value)
                    elif inner == 3 and type(value) is int:
                        values["status"] = value
    return OtelSpan(**values)


def _event(reader: _Reader, where: tuple[int, int]) -> OtelEvent:
    name, time_ns = "", 0
    attributes: dict[str, Any] = {}
    for number, part in reader.fields(*where):
        match number, part:
            case 1, int(time):
                time_ns = time
            case 2, (_, _):
                name = reader.text(part)
            case 3, (_, _):
                _key_value(reader, part, attributes)
    return OtelEvent(name=name, time_ns=time_ns, attributes=attributes)


def _key_value(reader: _Reader, where: tuple[int, int], into: dict[str, Any], depth: int = 0) -> None:
    key, value = "", None
    for number, part in reader.fields(*where):
        match number, part:
            case 1, (_, _):
                key = reader.text(part)
            case 2, (_, _):
                value = _any(reader, part, depth)
    into[key] = value


def _any(reader: _Reader, where: tuple[int, int], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise OtlpError(f"an attribute is nested more than {MAX_DEPTH} deep", too_large=True)
    value: Any = None
    for number, part in reader.fields(*where):
        match number, part:
            case 1, (_, _):
                value = reader.text(part)
            case 2, int(bit):
                value = bool(bit)
            case 3, int(unsigned):
                value = unsigned - _U64 if unsigned >= _U64 // 2 else unsigned
            case 4, int(bits):
                value = _double.unpack(_fixed.pack(bits))[0]
            case 5, (_, _):
                inside = [inner for number, inner in reader.fields(*part) if number == 1 and type(inner) is tuple]
                value = [_any(reader, inner, depth + 1) for inner in inside if type(inner) is tuple]
            case 6, (_, _):
                value = {}
                for number, inner in reader.fields(*part):
                    if number == 1 and type(inner) is tuple:
                        _key_value(reader, inner, value, depth + 1)
            case 7, (_, _):
                value = base64.b64encode(reader.raw(part)).decode()
    return value


def encode(request: TraceRequest) -> bytes:
    resource = b"".join(_part(1, _written_pair(*pair)) for pair in request.resource.items())
    spans = b"".join(_part(2, _written_span(span)) for span in request.spans)
    scope_spans = _part(1, _text(1, request.scope)) + spans
    return _part(1, _part(1, resource) + _part(2, scope_spans))


def answer(rejected: int, message: str) -> bytes:
    return _part(1, _number(1, rejected) + _text(2, message)) if message else b""


def refusal(body: bytes) -> tuple[int, str]:
    reader, rejected, message = _Reader(body), 0, ""
    for number, part in reader.fields(0, len(body)):
        if number == 1 and type(part) is tuple:
            for inner, value in reader.fields(*part):
                match inner, value:
                    case 1, int(count):
                        rejected = count
                    case 2, (_, _):
                        message = reader.text(value)
    return rejected, message


def status(code: int, message: str) -> bytes:
    return _number(1, code) + _text(2, message)


def _written_span(span: OtelSpan) -> bytes:
    status = _text(2, span.status_message) + _number(3, span.status)
    return b"".join(
        [
            _part(1, bytes.fromhex(span.trace_id)),
            _part(2, bytes.fromhex(span.id)),
            _part(4, bytes.fromhex(span.parent_id)) if span.parent_id else b"",
            _text(5, span.name),
            _number(6, span.kind),
            _fixed64(7, span.start_ns),
            _fixed64(8, span.end_ns),
            *(_part(9, _written_pair(*pair)) for pair in span.attributes.items()),
            *(_part(11, _written_event(event)) for event in span.events),
            _part(15, status),
        ]
    )


def _written_event(event: OtelEvent) -> bytes:
    pairs = (_part(3, _written_pair(*pair)) for pair in event.attributes.items())
    return _fixed64(1, event.time_ns) + _text(2, event.name) + b"".join(pairs)


def _written_pair(key: str, value: Any) -> bytes:
    return _text(1, key) + _part(2, _written_any(value))


def _written_any(value: Any) -> bytes:
    """Of what JSON has. An integer that 64 bits do not hold is written as text."""
    match value:
        case None:
            return b""
        case bool():
            return _varint_field(2, int(value))
        case int() if -(2**63) <= value < 2**63:
            return _varint_field(3, value % _U64)
        case float():
            return _varint(4 << 3 | _FIXED64) + _double.pack(value)
        case list() | tuple():
            return _part(5, b"".join(_part(1, _written_any(inner)) for inner in value))
        case dict():
            return _part(6, b"".join(_part(1, _written_pair(str(key), inner)) for key, inner in value.items()))
    return _part(1, str(value).encode("utf-8", "replace"))


def _part(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(data)) + data


def _text(number: int, value: str) -> bytes:
    return _part(number, value.encode("utf-8", "replace")) if value else b""


def _number(number: int, value: int) -> bytes:
    return _varint_field(number, value) if value else b""


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3 | _VARINT) + _varint(value)


def _fixed64(number: int, value: int) -> bytes:
    return _varint(number << 3 | _FIXED64) + _fixed.pack(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
