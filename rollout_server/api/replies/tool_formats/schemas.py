"""JSON schemas as constrained replies use them: closed where nothing else was said, and fit to stand in one another. Pure
functions of the schema; what llguidance cannot serve, it says itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

MAX_DEPTH = 100
"""Of a schema as JSON."""

FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
"""Those that llguidance enforces; any other `format` is an annotation, as JSON Schema has it."""

_IN_PLACE = ("anyOf", "oneOf", "allOf", "$ref", "if", "then", "else", "not", "dependentSchemas")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("additionalProperties", "items", "not", "if", "then", "else", "contains", "propertyNames")


class SchemaError(ValueError):
    """What cannot be served, in words for the client."""


def check_depth(value: Any) -> None:
    """Raises SchemaError for JSON that is nested too deeply to be worked on."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise SchemaError(f"it is nested deeper than {MAX_DEPTH} levels")


def strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The same schema, where objects that list properties and do not speak of others have no others (as xgrammar's
    strict mode, the default of vLLM and SGLang, has it: a constrained model else invents properties without end), and
    without formats that are annotations. Schemas in which keywords are combined in place are only closed where that
    cannot contradict them.
    """
    plain = _mapped(schema, _without_annotations)
    combined = any(_is_combined(part) for part in parts(schema))
    return dict(plain if combined else _mapped(plain, _closed))


def moved(schema: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The same schema for a place in another one, a JSON pointer: its references to itself are led there."""

    def led(part: dict[str, Any]) -> dict[str, Any]:
        target = part.get("$ref")
        if isinstance(target, str) and (target == "#" or target.startswith("#/")):
            return {**part, "$ref": f"#{place}{target[1:]}"}
        return part

    return dict(_mapped(schema, led))


def arguments_schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schema of a tool's arguments, which are always an object; without parameters it is an empty one.

    Raises SchemaError if the parameters can be no object.
    """
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping):
        raise SchemaError("the schema of arguments is an object")
    check_depth(parameters)
    kind = parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise SchemaError("arguments are an object, so its type must be 'object'")
    return strict({**parameters, "type": "object"})


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    listed, required = schema.get("properties"), schema.get("required", [])
    spoken = {"additionalProperties", "patternProperties", "unevaluatedProperties"} & set(schema)
    if spoken or not isinstance(listed, Mapping) or not isinstance(required, list):
        return schema
    if not all(isinstance(name, str) and name in listed for name in required):
        return schema
    return {**schema, "additionalProperties": False}


def _without_annotations(schema: dict[str, Any]) -> dict[str, Any]:
    if isinstance(schema.get("format"), str) and schema["format"] not in FORMATS:
        return {key: value for key, value in schema.items() if key != "format"}
    return schema


def _mapped(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """The schema with `change` done to all schemas in it, and to itself last."""
    if not isinstance(schema, Mapping):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, Mapping):
            made[key] = {name: _mapped(inner, change) for name, inner in value.items()}
        elif key in _LISTS and isinstance(value, list):
            made[key] = [_mapped(inner, change) for inner in value]
        elif key in _SINGLE:
            made[key] = _mapped(value, change)
        else:
            made[key] = value
    return change(made)


def _is_combined(schema: Mapping[str, Any]) -> bool:
    """Whether several sub-schemas look at the same value, so that closing one may contradict another."""
    appliers = [key for key in _IN_PLACE if key in schema]
    if appliers in (["anyOf"], ["oneOf"], ["$ref"]):
        return "properties" in schema or "additionalProperties" in schema
    return bool(appliers)


def parts(schema: Any) -> Iterator[Mapping[str, Any]]:
    """The schema and all schemas in it."""
    pending = [schema]
    while pending:
        part = pending.pop()
        if not isinstance(part, Mapping):
            continue
        yield part
        for key in _MAPS:
            if isinstance(part.get(key), Mapping):
                pending += part[key].values()
        for key in _LISTS:
            if isinstance(part.get(key), list):
                pending += part[key]
        pending += [part[key] for key in _SINGLE if key in part]


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []
