"""How records become rows of the episode store and come back. Pure: prompts and requests of calls are put together elsewhere."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec
from sqlalchemy import Row

from lightning_rl.episode import Call, Episode, EpisodeStart, Outcome, Reward, Sampling, Span, Task
from lightning_rl.errors import StoreError
from lightning_rl.store.deltas import Delta, Texts, request_of, request_texts
from lightning_rl.store.schema import visible

P = ParamSpec("P")
T = TypeVar("T")
Values = dict[str, Any]
MAX_ID_BYTES = 1000
"""Of what is a key in the tables: two of them fit into an entry of PostgreSQL's indexes."""

UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
"""What columns that hold something else than we write are answered with when they are read."""


def damaged(what: str, why: object) -> StoreError:
    return StoreError(
        f"{what} {why}",
        hint="the store is damaged, or only a part of it was copied; take `lrl traces export` for parts",
    )


def _of_rows(
    kind: str, column: str = "id"
) -> Callable[[Callable[Concatenate[Row[Any], P], T]], Callable[Concatenate[Row[Any], P], T]]:
    """For readers of a table's rows: what cannot be read is a StoreError that names the row by a column."""

    def checked(read: Callable[Concatenate[Row[Any], P], T]) -> Callable[Concatenate[Row[Any], P], T]:
        @functools.wraps(read)
        def or_damaged(row: Row[Any], /, *args: P.args, **named: P.kwargs) -> T:
            try:
                return read(row, *args, **named)
            except UNREADABLE as error:
                why = f"cannot be read: {type(error).__name__}: {str(error)[:200]}"
                raise damaged(f"{kind} {row._mapping[column]}", why) from error

        return or_damaged

    return checked


def start_row(start: EpisodeStart) -> Values:
    _check_id(start.id, "episode", hint="give tasks shorter ids: `input` may be as long as it likes")
    _check_id(start.phase, "phase")
    values = msgspec.structs.asdict(start)
    del values["task"]
    task = {"task_id": start.task.id, "task_input": dump_json(start.task.input, f"the input of task {start.task.id}")}
    imposed = {name: value for name, value in msgspec.structs.asdict(start.sampling).items() if value is not None}
    return values | task | {"sampling": dump_json(imposed, "the sampling")}


@_of_rows("episode")
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


def end_row(
    episode_id: str, outcome: Outcome, answer: Any, error: str | None, counted: bool, ended_at: float
) -> Values:
    return {
        "outcome": outcome.value,
        "answer": None if answer is None else dump_json(answer, f"the answer of episode {episode_id}"),
        "error": error,
        "counted": counted,
        "ended_at": ended_at,
    }


@_of_rows("episode")
def episode_of(row: Row[Any], calls: list[Call], spans: list[Span], rewards: list[Reward]) -> Episode:
    return Episode(
        start=start_of(row),
        calls=calls,
        spans=spans,
        rewards=rewards,
        outcome=outcome_of(row),
        answer=None if row.answer is None else json.loads(row.answer),
        error=row.error,
        counted=row.counted,
        ended_at=row.ended_at,
    )


@_of_rows("episode")
def outcome_of(row: Row[Any]) -> Outcome | None:
    return None if row.outcome is None else Outcome(row.outcome)


def call_row(call: Call) -> Values:
    """All but the prompt and the request: see `delta_columns`."""
    if not len(call.sampled_ids) == len(call.logprobs) == len(call.versions):
        raise StoreError(
            f"call {call.id} has {len(call.sampled_ids)} sampled ids, {len(call.logprobs)} log-probs and "
            f"{len(call.versions)} versions; it must have one of each per token"
        )
    for name, given in (("entropies", call.entropies), ("alternatives", call.alternatives)):
        if given and len(given) != len(call.sampled_ids):
            raise StoreError(
                f"call {call.id} has {name} of {len(given)} tokens and {len(call.sampled_ids)} sampled ids; it must have those "
                "of every token, or none"
            )
    _check_id(call.id, "call")
    values = msgspec.structs.asdict(call)
    del values["prompt_ids"], values["request"]
    return values | {
        "sampled_ids": pack_ids(call.sampled_ids, call.id),
        "sampled_tokens": len(call.sampled_ids),
        "logprobs": _pack("d", call.logprobs),
        "versions": pack_ids(call.versions, call.id),
        "restricted": dump_json(call.restricted, f"what restricted call {call.id}"),
        "response": dump_json(call.response, f"the response of call {call.id}"),
        "entropies": _pack("f", call.entropies) or None,
        "alternatives": pack_alternatives(call.alternatives, call.id),
    }


def delta_columns(stored: Delta) -> Values:
    values = msgspec.structs.asdict(stored)
    values["prompt_ids"] = values.pop("prompt_rest")
    return values


def texts_of(call: Call) -> Texts:
    try:
        return request_texts(call.request)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"the request of call {call.id} cannot be written as JSON: {error}") from error


@_of_rows("call")
def call_of(row: Row[Any], prompt: bytes, sampled: bytes, request: Texts) -> Call:
    """Columns that were not asked for (`reading.load_episodes`) are as in a call without them."""
    values = row._asdict()
    for column in ("sampled_tokens", "base_id", "base_tokens"):
        del values[column]
    return Call(
        **values
        | {
            "prompt_ids": unpack_ids(prompt),
            "sampled_ids": unpack_ids(sampled),
            "logprobs": unpack_floats(row.logprobs),
            "versions": unpack_ids(row.versions),
            "restricted": json.loads(row.restricted),
            "request": request_of(request),
            "response": _object(row.response),
            "entropies": _unpack("f", values.get("entropies") or b""),
            "alternatives": unpack_alternatives(values.get("alternatives")),
        }
    )


@_of_rows("call")
def outlined_call_of(row: Row[Any], request: Callable[[], dict[str, Any]]) -> Call:
    """Without its prompt and what else is large: `store.outlines`."""
    return Call(
        **{name: value for name, value in row._mapping.items() if name in Call.__struct_fields__}
        | {
            "prompt_ids": [],
            "sampled_ids": unpack_ids(row.sampled_ids),
            "logprobs": unpack_floats(row.logprobs),
            "versions": unpack_ids(row.versions),
            "restricted": json.loads(row.restricted),
            "request": request(),
            "response": _object(row.response),
        }
    )


def span_row(span: Span) -> Values:
    _check_id(span.id, "span")
    return msgspec.structs.asdict(span) | {"attributes": dump_json(span.attributes, f"the attributes of {span.name}")}


@_of_rows("span")
def span_of(row: Row[Any]) -> Span:
    return Span(**row._asdict() | {"attributes": _object(row.attributes)})


def reward_rows(rewards: Sequence[Reward]) -> list[Values]:
    """Equal rewards that are given together count each; given once more, the same ones have the same keys."""
    seen: Counter[Reward] = Counter()
    rows = []
    for reward in rewards:
        if not _is_finite(reward.value):
            shown = "too large" if isinstance(reward.value, int) else str(reward.value)
            raise StoreError(f"reward {reward.name!r} of episode {reward.episode_id} is {shown}, not a number")
        texts = [_as_text(text) for text in (reward.name, reward.call_id, reward.span_id, reward.source)]
        said = repr((*texts, reward.value + 0.0, reward.time + 0.0, seen[reward]))  # 0.0 for -0.0, as databases have it
        seen[reward] += 1
        key = hashlib.blake2b(said.encode(), digest_size=12).hexdigest()
        rows.append(msgspec.structs.asdict(reward) | {"key": key, "value": float(reward.value)})
    return rows


@_of_rows("reward", "number")
def reward_of(row: Row[Any]) -> Reward:
    values = row._asdict()
    del values["number"], values["key"]
    return Reward(**values)


def as_stored(episode: Episode) -> Values:
    """What the store keeps of an episode, whatever order its records are in: two that are alike in this are the same."""

    def by_id(rows: Sequence[Values], key: str) -> dict[str, Values]:
        return {visible(row[key]): {name: _as_text(value) for name, value in row.items()} for row in rows}

    calls = [
        call_row(call) | {"prompt_ids": pack_ids(call.prompt_ids, call.id), "request": texts_of(call)}
        for call in episode.calls
    ]
    end = episode.outcome and end_row(
        episode.id, episode.outcome, episode.answer, episode.error, episode.counted, episode.ended_at
    )
    return {
        "start": {name: _as_text(value) for name, value in start_row(episode.start).items()},
        "end": end and {name: _as_text(value) for name, value in end.items()},
        "calls": by_id(calls, "id"),
        "spans": by_id([span_row(span) for span in episode.spans], "id"),
        "rewards": by_id(reward_rows(episode.rewards), "key"),
    }


def without_places(episode: Episode) -> Episode:
    """As it may have been before it was said which spans its calls, spans and rewards belong to."""
    replace = msgspec.structs.replace
    return replace(
        episode,
        calls=[replace(call, span_id=None) for call in episode.calls],
        spans=[replace(span, parent_id=None) for span in episode.spans],
        rewards=[replace(reward, span_id=None) for reward in episode.rewards],
    )


def begins(earlier: Episode, later: Episode) -> bool:
    """Whether this is an unfinished episode that may have become that one."""
    if earlier.outcome is not None:
        return False
    before, after = as_stored(without_places(earlier)), as_stored(without_places(later))
    return before["start"] == after["start"] and all(
        before[kind].items() <= after[kind].items() for kind in ("calls", "spans", "rewards")
    )


def _as_text(value: Any) -> Any:
    return visible(value) if isinstance(value, str) else value


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} where an object is expected")
    return value


def dump_json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{what} cannot be written as JSON: {error}") from error


def _check_id(text: str, what: str, hint: str | None = None) -> None:
    if len(text) > MAX_ID_BYTES // 4 and len(visible(text).encode()) > MAX_ID_BYTES:
        raise StoreError(f"the id of {what} {text[:40]!r}… is longer than {MAX_ID_BYTES} bytes", hint=hint)


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def pack_alternatives(alternatives: Sequence[Sequence[tuple[int, float]]], call_id: str) -> bytes | None:
    """How many tokens there are, how many alternatives each has, all their ids (int32 so far), all their log-probs (float32)."""
    if not alternatives:
        return None
    numbers = [len(alternatives), *map(len, alternatives)]
    ids = [token_id for likeliest in alternatives for token_id, _ in likeliest]
    logprobs = [logprob for likeliest in alternatives for _, logprob in likeliest]
    return pack_ids(numbers + ids, call_id) + _pack("f", logprobs)


def unpack_alternatives(blob: bytes | None) -> list[list[tuple[int, float]]]:
    if not blob:
        return []
    tokens = unpack_ids(blob[:4])[0]
    ends = 4 + 4 * tokens
    counts = unpack_ids(blob[4:ends])
    middle = ends + 4 * sum(counts)
    pairs = list(zip(unpack_ids(blob[ends:middle]), _unpack("f", blob[middle:]), strict=True))
    return [pairs[start:end] for start, end in pairwise(accumulate(counts, initial=0))]


def pack_ids(ids: Sequence[int], call_id: str) -> bytes:
    try:
        return _pack("i", ids)
    except (OverflowError, TypeError) as error:
        raise StoreError(f"call {call_id} has an id that is not an int32: {error}") from error


def unpack_ids(blob: bytes) -> list[int]:
    return _unpack("i", blob)


def unpack_floats(blob: bytes) -> list[float]:
    return _unpack("d", blob)


def _pack(kind: str, values: Sequence[float]) -> bytes:
    packed = array(kind, values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _unpack(kind: str, blob: bytes) -> list[Any]:
    packed = array(kind)
    packed.frombytes(blob)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()
