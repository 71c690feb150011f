"""What the forms of trace files have in common: the header, and an episode as plain values, checked as strictly as it is written.

The plain values are the fields of `episode.Episode` and of what is in it, by their names; bytes are base64. Fields that have a
default may be missing. Pure: no files.
"""

from __future__ import annotations

import functools
import typing
from importlib.metadata import PackageNotFoundError, version
from types import UnionType
from typing import Any, Self, TypeVar

import msgspec
from msgspec import Struct

from lightning_rl.episode import Call, Episode, Reward, Span
from lightning_rl.errors import TraceFileError

T = TypeVar("T")

FORMAT = "lightning-rl-traces"
VERSION = 1


class Header(Struct, frozen=True, kw_only=True):
    """What a file says of itself before the first episode."""

    format: str
    version: int
    created_by: str = ""
    episodes: int | None = None
    """How many follow, if that was known."""

    @classmethod
    def of(cls, value: Any, place: str) -> Self:
        """Raises TraceFileError for a file that is none of ours, or newer."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise TraceFileError(f"{place}: this is not a trace file of Lightning RL")
        known = value.get("version")
        if not isinstance(known, int) or not 1 <= known <= VERSION:
            raise TraceFileError(
                f"{place}: the file has version {known!r} of the format, and this release reads versions up to {VERSION}",
                hint="read it with the release of Lightning RL that wrote it, or with a newer one",
            )
        refuse_unknown(value, cls, place)
        return _converted(value, cls, place)


def header_of(episodes: int | None) -> dict[str, Any]:
    try:
        created_by = f"lightning-rl {version('lightning-rl')}"
    except PackageNotFoundError:  # run from a checkout
        created_by = "lightning-rl"
    header = Header(format=FORMAT, version=VERSION, created_by=created_by, episodes=episodes)
    return typing.cast("dict[str, Any]", msgspec.to_builtins(header))


def episode_of(value: Any, place: str) -> Episode:
    """Raises TraceFileError that names the field: unknown, missing, or of another type."""
    refuse_unknown(value, Episode, place)
    episode = _converted(value, Episode, place)
    records: list[Call | Span | Reward] = [*episode.calls, *episode.spans, *episode.rewards]
    for record in records:
        if record.episode_id != episode.id:
            raise TraceFileError(f"{place}: episode {episode.id} has a record of episode {record.episode_id}")
    return episode


def refuse_unknown(value: Any, record: type, place: str, path: str = "") -> None:
    """Names the first field, at any depth, that the record does not have."""
    if not isinstance(value, dict):
        return
    fields = _fields(record)
    for name, inner in value.items():
        if name not in fields:
            raise TraceFileError(
                f"{place}: unknown field {path}{name}",
                hint="the file was made by a newer release of Lightning RL, or changed by hand",
            )
        kind, is_list = fields[name]
        if kind is None:
            continue
        if not is_list:
            refuse_unknown(inner, kind, place, f"{path}{name}.")
        elif isinstance(inner, list):
            for number, item in enumerate(inner):
                refuse_unknown(item, kind, place, f"{path}{name}[{number}].")


@functools.cache
def _fields(record: type) -> dict[str, tuple[type | None, bool]]:
    """What each field holds, see `_record_in`."""
    return {name: _record_in(annotation) for name, annotation in typing.get_type_hints(record).items()}


def _record_in(annotation: Any) -> tuple[type | None, bool]:
    """The record type that a field holds, and whether it holds a list of them."""
    if isinstance(annotation, type) and not isinstance(annotation, UnionType) and issubclass(annotation, Struct):
        return annotation, False
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is list and isinstance(arguments[0], type) and issubclass(arguments[0], Struct):
        return arguments[0], True
    return None, False


def _converted(value: Any, record: type[T], place: str) -> T:
    try:
        return msgspec.convert(value, record)
    except msgspec.ValidationError as error:
        raise TraceFileError(f"{place}: {error}") from error
