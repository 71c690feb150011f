"""The tables of the episode store, and how records become rows and come back.

Token ids and versions are packed as little-endian int32, log-probs as float64, so that what is read is bit for bit what
was sampled. What has no fixed shape (task input, request, response, answer, attributes) is JSON text.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Boolean, Column, Float, ForeignKey, Index, Integer, LargeBinary, MetaData, Row, Table, Text

from lightning_rl.episode import Call, Episode, EpisodeStart, Outcome, Reward, Sampling, Span, Task
from lightning_rl.errors import StoreError

SCHEMA_VERSION = 2

UPGRADES = {
    1: (
        "ALTER TABLE calls ADD COLUMN relation TEXT NOT NULL DEFAULT 'root'",
        "ALTER TABLE calls ADD COLUMN parted_at INTEGER",
    ),
}
"""What turns a file of one version into one of the next."""

metadata = MetaData()
episodes = Table(
    "episodes",
    metadata,
    Column("id", Text, primary_key=True),
    Column("phase", Text, nullable=False),
    Column("step", Integer, nullable=False),
    Column("task_id", Text, nullable=False),
    Column("task_input", Text, nullable=False),
    Column("sample", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("group", Text, nullable=False),
    Column("sampling", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("outcome", Text),
    Column("counted", Boolean, nullable=False, default=False),
    Column("answer", Text),
    Column("error", Text),
    Column("ended_at", Float, nullable=False, default=0.0),
    Index("episodes_by_phase", "phase", "step"),
)
calls = Table(
    "calls",
    metadata,
    Column("id", Text, primary_key=True),
    Column("episode_id", ForeignKey("episodes.id"), nullable=False, index=True),
    Column("index", Integer, nullable=False),
    Column("model", Text, nullable=False),
    Column("prompt_ids", LargeBinary, nullable=False),
    Column("sampled_ids", LargeBinary, nullable=False),
    Column("sampled_tokens", Integer, nullable=False),
    Column("logprobs", LargeBinary, nullable=False),
    Column("versions", LargeBinary, nullable=False),
    Column("temperature", Float, nullable=False),
    Column("finish_reason", Text, nullable=False),
    Column("parent_id", Text),
    Column("relation", Text, nullable=False),
    Column("parted_at", Integer),
    Column("span_id", Text),
    Column("experts", LargeBinary),
    Column("cached_tokens", Integer, nullable=False),
    Column("request", Text, nullable=False),
    Column("response", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float, nullable=False),
)
spans = Table(
    "spans",
    metadata,
    Column("episode_id", ForeignKey("episodes.id"), primary_key=True),
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("parent_id", Text),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float, nullable=False),
    Column("attributes", Text, nullable=False),
    Column("error", Text),
)
rewards = Table(
    "rewards",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("episode_id", ForeignKey("episodes.id"), nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("value", Float, nullable=False),
    Column("time", Float, nullable=False),
    Column("call_id", Text),
    Column("span_id", Text),
)

Values = dict[str, Any]


def start_row(start: EpisodeStart) -> Values:
    values = msgspec.structs.asdict(start)
    del values["task"]
    task = {"task_id": start.task.id, "task_input": dump_json(start.task.input, f"the input of task {start.task.id}")}
    return values | task | {"sampling": dump_json(msgspec.structs.asdict(start.sampling), "the sampling")}


def start_of(row: Row[Any]) -> EpisodeStart:
    return EpisodeStart(
        id=row.id,
        task=Task(id=row.task_id, input=json.loads(row.task_input)),
        phase=row.phase,
        step=row.step,
        sample=row.sample,
        attempt=row.attempt,
        group=row.group,
        sampling=Sampling(**json.loads(row.sampling)),
        started_at=row.started_at,
    )


def episode_of(row: Row[Any], calls: list[Call], spans: list[Span], rewards: list[Reward]) -> Episode:
    return Episode(
        start=start_of(row),
        calls=calls,
        spans=spans,
        rewards=rewards,
        outcome=None if row.outcome is None else Outcome(row.outcome),
        answer=None if row.answer is None else json.loads(row.answer),
        error=row.error,
        counted=row.counted,
        ended_at=row.ended_at,
    )


def call_row(call: Call) -> Values:
    if not len(call.sampled_ids) == len(call.logprobs) == len(call.versions):
        raise StoreError(
            f"call {call.id} has {len(call.sampled_ids)} sampled ids, {len(call.logprobs)} log-probs and "
            f"{len(call.versions)} versions; it must have one of each per token"
        )
    values = msgspec.structs.asdict(call)
    return values | {
        "prompt_ids": _pack("i", call.prompt_ids),
        "sampled_ids": _pack("i", call.sampled_ids),
        "sampled_tokens": len(call.sampled_ids),
        "logprobs": _pack("d", call.logprobs),
        "versions": _pack("i", call.versions),
        "request": dump_json(call.request, f"the request of call {call.id}"),
        "response": dump_json(call.response, f"the response of call {call.id}"),
    }


def call_of(row: Row[Any]) -> Call:
    values = row._asdict()
    del values["sampled_tokens"]
    return Call(
        **values
        | {
            "prompt_ids": _unpack("i", row.prompt_ids),
            "sampled_ids": _unpack("i", row.sampled_ids),
            "logprobs": _unpack("d", row.logprobs),
            "versions": _unpack("i", row.versions),
            "request": json.loads(row.request),
            "response": json.loads(row.response),
        }
    )


def span_row(span: Span) -> Values:
    return msgspec.structs.asdict(span) | {"attributes": dump_json(span.attributes, f"the attributes of {span.name}")}


def span_of(row: Row[Any]) -> Span:
    return Span(**row._asdict() | {"attributes": json.loads(row.attributes)})


def reward_of(row: Row[Any]) -> Reward:
    values = row._asdict()
    del values["number"]
    return Reward(**values)


def dump_json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{what} cannot be written as JSON: {error}") from error


def _pack(kind: str, values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}{kind}", *values)


def _unpack(kind: str, blob: bytes) -> list[Any]:
    return list(struct.unpack(f"<{len(blob) // struct.calcsize('<' + kind)}{kind}", blob))
