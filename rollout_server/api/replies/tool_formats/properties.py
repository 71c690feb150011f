"""The schema of a tool's arguments taken apart, for the formats that write and type each argument by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rollout_server.api.replies.tool_formats.schemas import SchemaError, parts

ALL_KINDS = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})

_PLAIN = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "title", "description"} | {
    "default", "examples", "$schema", "$id", "$comment", "strict", "x-guidance", "deprecated", "readOnly", "writeOnly"
}  # fmt: skip


@dataclass(frozen=True)
class Property:
    name: str
    schema: Mapping[str, Any]
    """Complete in itself: the definitions that it refers to are part of it."""
    required: bool


@dataclass(frozen=True)
class Properties:
    listed: tuple[Property, ...]
    others: Mapping[str, Any] | None
    """What any further argument must be; None: there is none."""


def properties(schema: Mapping[str, Any]) -> Properties:
    """The arguments one by one. Raises SchemaError if more is said about them together than which are required."""
    unknown = set(schema) - _PLAIN
    if unknown:
        raise SchemaError(f"this model's form of calls cannot express {min(unknown)!r} beside the properties")
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    listed = schema.get("properties") or {}
    required = schema.get("required") or []
    if (
        not isinstance(listed, Mapping)
        or not isinstance(required, list)
        or not all(isinstance(n, str) for n in required)
    ):
        raise SchemaError("'properties' must be an object and 'required' a list of names")
    rest = schema.get("additionalProperties", True)
    others = None if rest is False else {} if rest is True else rest
    for part in parts({"properties": listed, "additionalProperties": rest, **definitions}):
        target = part.get("$ref", "#/$defs/")
        if not (isinstance(target, str) and target.startswith(("#/$defs/", "#/definitions/"))):
            raise SchemaError("this model's form of calls can express references to $defs only")
    names = [*listed, *(name for name in required if name not in listed)]
    found = []
    for name in names:
        value = listed.get(name, others)
        value = {} if value is True else value
        if not isinstance(value, Mapping):
            raise SchemaError(f"there is no schema for the property {name[:64]!r}")
        found.append(Property(name, {**value, **definitions}, name in required))
    if others is not None and not isinstance(others, Mapping):
        raise SchemaError("'additionalProperties' must be a schema")
    return Properties(tuple(found), None if others is None else {**others, **definitions})


def kinds(schema: Any, definitions: Mapping[str, Any] | None = None) -> frozenset[str]:
    """The JSON types that a value of this schema may have, as far as its types, choices and references tell."""
    return frozenset(_kinds(schema, definitions if definitions is not None else schema, 0))


def kind_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case int():
            return "integer"
        case float():
            return "number"
        case list():
            return "array"
        case _:
            return "object"


def resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a chain of references into the root's definitions leads to; the empty one if it leads nowhere."""
    for _ in range(16):
        target = schema.get("$ref")
        if not isinstance(target, str):
            return schema
        node: Any = root
        for step in target.removeprefix("#/").split("/"):
            node = node.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
        if not isinstance(node, Mapping):
            return {}
        schema = node
    return {}


def _kinds(schema: Any, root: Any, depth: int) -> set[str]:
    if not isinstance(schema, Mapping) or depth > 16:
        return set(ALL_KINDS)
    schema = resolved(schema, root if isinstance(root, Mapping) else {})
    found = set(ALL_KINDS)
    if "const" in schema:
        found = {kind_of(schema["const"])}
    elif isinstance(schema.get("enum"), list):
        found = {kind_of(value) for value in schema["enum"]}
    named = schema.get("type")
    if isinstance(named, str):
        found &= _widened({named})
    elif isinstance(named, list):
        found &= _widened({name for name in named if isinstance(name, str)})
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            found &= set().union(*(_kinds(option, root, depth + 1) for option in schema[key]))
    if isinstance(schema.get("allOf"), list):
        for option in schema["allOf"]:
            found &= _kinds(option, root, depth + 1)
    return found


def _widened(names: set[str]) -> set[str]:
    return names | {"integer"} if "number" in names else names
