"""The records as TypeScript: `python -m trainers.viewer.typescript > trainers/viewer/web/src/records.ts`."""

from __future__ import annotations

import enum
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from msgspec import Struct
from msgspec import inspect as types

from lightning_rl.episode import Outcome
from trainers.credit_view import report
from trainers.viewer import records

HEADER = "// Made by `python -m trainers.viewer.typescript` from trainers/viewer/records.py: not to be edited.\n"
SHARED = (report.CallCredit, report.RuleCredit, report.CallFacts, report.RolloutFacts, report.GroupReport)
"""Records of others that the page gets as they are."""


def typescript() -> str:
    own = [value for _, value in inspect.getmembers(records, _is_record) if value.__module__ == records.__name__]
    own.sort(key=lambda record: inspect.getsourcelines(record)[1])
    return HEADER + _enumeration(Outcome) + "".join(f"\n{_interface(record)}" for record in (*own, *SHARED))


def _enumeration(cls: type[enum.Enum]) -> str:
    return f"\nexport type {cls.__name__} = {' | '.join(_literal(member.value) for member in cls)};\n"


def _is_record(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Struct) and value is not Struct


def _interface(record: type[Struct]) -> str:
    info = types.type_info(record)
    assert isinstance(info, types.StructType)
    return "\n".join([*_comment(record.__doc__), f"export interface {record.__name__} {{", *_fields(info), "}"]) + "\n"


def _comment(text: str | None) -> Iterator[str]:
    if text and not text.startswith("Struct("):
        yield f"/** {' '.join(textwrap.dedent(text).split())} */"


def _fields(info: types.StructType) -> Iterator[str]:
    if info.tag_field is not None:
        yield f"  {info.tag_field}: {_literal(info.tag)};"
    for field in info.fields:
        yield f"  {field.encode_name}: {_type(field.type)};"


def _type(kind: types.Type) -> str:
    match kind:
        case types.StrType():
            return "string"
        case types.IntType() | types.FloatType():
            return "number"
        case types.BoolType():
            return "boolean"
        case types.NoneType():
            return "null"
        case types.AnyType():
            return "unknown"
        case types.LiteralType():
            return " | ".join(map(_literal, kind.values))
        case types.EnumType():
            return kind.cls.__name__
        case types.StructType():
            return kind.cls.__name__
        case types.UnionType():
            return " | ".join(dict.fromkeys(map(_type, kind.types)))
        case types.ListType() | types.VarTupleType():
            return f"({_type(kind.item_type)})[]" if " " in _type(kind.item_type) else f"{_type(kind.item_type)}[]"
        case types.TupleType():
            return f"[{', '.join(map(_type, kind.item_types))}]"
        case types.DictType():
            return f"Record<string, {_type(kind.value_type)}>"
        case _:
            raise TypeError(f"no TypeScript for {kind}")


def _literal(value: Any) -> str:
    return f'"{value}"'


if __name__ == "__main__":
    print(typescript(), end="")
