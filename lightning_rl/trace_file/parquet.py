"""Trace files in Parquet: one row an episode, typed by `datasets.Features`, so that `datasets.load_dataset("parquet", …)` reads
them as they are. What has no fixed shape (task input, request, response, attributes, answer) is JSON text. Arrow writes no lone
surrogates: in names and messages they become U+FFFD, as in a store; in JSON text they stay.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from lightning_rl.episode import Episode
from lightning_rl.errors import MissingExtra, TraceFileError
from lightning_rl.store.schema import visible
from lightning_rl.trace_file.records import FORMAT, Header, episode_of, header_of

GROUP_BYTES = 16_000_000
"""A row group is written when its texts, four bytes for each token and 32 for each alternative have come to so many: what is held
in memory."""
ROWS_READ = 4
COMPRESSION = "zstd"

Row = dict[str, Any]


def write_parquet(path: Path, episodes: Iterable[Episode]) -> None:
    arrow, parquet, schema = _libraries()
    header = header_of(None)
    metadata = {**schema.metadata, FORMAT: json.dumps(header)}
    with parquet.ParquetWriter(path, schema.with_metadata(metadata), compression=COMPRESSION) as writer:
        rows: list[Row] = []
        size = 0
        for episode in episodes:
            rows.append(_row_of(episode))
            size += _size(rows[-1])
            if size >= GROUP_BYTES or len(rows) >= 1000:
                writer.write_table(_table(arrow, schema, rows))
                rows, size = [], 0
        if rows:
            writer.write_table(_table(arrow, schema, rows))


def read_parquet(path: Path) -> Iterator[tuple[str, Episode]]:
    arrow, parquet, _ = _libraries()
    try:
        with parquet.ParquetFile(path) as file:
            said = (file.schema_arrow.metadata or {}).get(FORMAT.encode())
            Header.of(json.loads(said) if said else None, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_READ):
                for row in batch.to_pylist():
                    number += 1
                    place = f"{path}, row {number}"
                    yield place, episode_of(_plain(row, place), place)
    except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError) as error:
        raise TraceFileError(f"{path} is damaged, or no Parquet file: {error}", hint="copy the file again") from error
    except OSError as error:
        raise TraceFileError(f"cannot read {path}: {error}") from error


def features() -> Any:
    """The columns, as `datasets.Features`."""
    from datasets import Features, List, Value

    text, free, number, time = Value("string"), Value("large_string"), Value("int64"), Value("float64")
    return Features(
        {
            "start": {
                "id": text,
                "task": {"id": text, "input": free},
                "phase": text,
                "step": number,
                "sample": number,
                "attempt": number,
                "group": text,
                "sampling": {
                    "temperature": time,
                    "top_p": time,
                    "max_tokens": number,
                    "seed": number,
                    "top_logprobs": number,
                },
                "started_at": time,
            },
            "calls": List(
                {
                    "id": text,
                    "episode_id": text,
                    "index": number,
                    "model": text,
                    "prompt_ids": List(Value("int32")),
                    "sampled_ids": List(Value("int32")),
                    "logprobs": List(Value("float64")),
                    "versions": List(number),
                    "temperature": time,
                    "finish_reason": text,
                    "parent_id": text,
                    "relation": text,
                    "parted_at": number,
                    "span_id": text,
                    "agent": text,
                    "response_id": text,
                    "upstream": text,
                    "redacted": Value("bool"),
                    "restricted": List(text),
                    "entropies": List(Value("float32")),
                    "alternatives": List(List({"id": Value("int32"), "logprob": Value("float32")})),
                    "experts": Value("large_binary"),
                    "cached_tokens": number,
                    "request": free,
                    "response": free,
                    "started_at": time,
                    "ended_at": time,
                }
            ),
            "spans": List(
                {
                    "id": text,
                    "episode_id": text,
                    "name": text,
                    "kind": text,
                    "parent_id": text,
                    "started_at": time,
                    "ended_at": time,
                    "attributes": free,
                    "error": free,
                }
            ),
            "rewards": List(
                {
                    "episode_id": text,
                    "name": text,
                    "value": time,
                    "time": time,
                    "call_id": text,
                    "span_id": text,
                    "source": text,
                }
            ),
            "outcome": text,
            "answer": free,
            "error": free,
            "counted": Value("bool"),
            "ended_at": time,
        }
    )


@functools.cache
def _libraries() -> tuple[Any, Any, Any]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        return arrow, parquet, features().arrow_schema
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "trace files in Parquet need the packages datasets and pyarrow",
            hint="pip install datasets, or write JSON Lines: a name that ends in .jsonl.gz",
        ) from error


def _table(arrow: Any, schema: Any, rows: list[Row]) -> Any:
    try:
        return arrow.Table.from_pylist(rows, schema=schema)
    except (arrow.ArrowException, OverflowError, TypeError) as error:
        ids = ", ".join(row["start"]["id"] for row in rows[:3])
        raise TraceFileError(f"the episodes {ids}, … do not fit into Parquet's columns: {error}") from error


def _free_fields(row: Row) -> Iterator[tuple[Row, str]]:
    """Where values have no fixed shape."""
    yield row["start"]["task"], "input"
    for call in row["calls"]:
        yield call, "request"
        yield call, "response"
    for span in row["spans"]:
        yield span, "attributes"
    if row["answer"] is not None:
        yield row, "answer"


def _row_of(episode: Episode) -> Row:
    try:
        row: Row = msgspec.to_builtins(episode, builtin_types=(bytes,))
        for values, field in _free_fields(row):
            values[field] = json.dumps(values[field], separators=(",", ":"))
        for call in row["calls"]:
            call["alternatives"] = [
                [{"id": token_id, "logprob": logprob} for token_id, logprob in likeliest]
                for likeliest in call["alternatives"]
            ]
    except (TypeError, ValueError, RecursionError) as error:
        raise TraceFileError(f"episode {episode.id} cannot be written as JSON: {error}") from error
    _make_visible(row)
    return row


def _size(row: Row) -> int:
    """In bytes, about."""
    tokens = sum(len(call["prompt_ids"]) + len(call["sampled_ids"]) for call in row["calls"])
    alternatives = sum(len(likeliest) for call in row["calls"] for likeliest in call["alternatives"])
    return (
        4 * tokens
        + 32 * alternatives
        + sum(len(values[field]) for values, field in _free_fields(row))
        + len(row["error"] or "")
    )


def _make_visible(values: Row) -> None:
    for name, value in values.items():
        if isinstance(value, str):
            values[name] = visible(value)
        elif isinstance(value, dict):
            _make_visible(value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                _make_visible(item)


def _plain(row: Row, place: str) -> Row:
    """Fields that are not there at all are left to the check of records to name."""
    try:
        for values, field in _free_fields(row):
            values[field] = json.loads(values[field])
        for call in row["calls"]:
            if "alternatives" in call:
                call["alternatives"] = [
                    [(one["id"], one["logprob"]) for one in likeliest] for likeliest in call["alternatives"]
                ]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise TraceFileError(f"{place} is damaged: {type(error).__name__}: {error}") from error
    return row
