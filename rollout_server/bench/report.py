"""Rows of results: as JSON for whoever compares runs, as a table for people."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct
from rich.table import Table


class Row(Struct, frozen=True, kw_only=True):
    """One engine on one scenario at one concurrency: medians over the rounds. Times in seconds."""

    scenario: str
    concurrency: int
    """Conversations open at once."""
    engine: str
    """`lrl`, `transformers`, `vllm` or `llamacpp`."""
    variant: str
    """Which settings of lrl; empty for the standard ones."""
    tokens_per_second: float
    fraction_of_limit: float
    limit_tokens_per_second: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    prefill_tokens: int | None
    """None: the engine does not say."""
    unique_tokens: int
    peak_memory_bytes: int
    rounds: int
    tokens_per_second_all: list[float]
    read_bytes_per_second: float
    gemm_flop_per_second: float
    """At as many rows as decode together."""
    quick: bool
    machine: str
    date: str
    dtype: str
    model: str

    @property
    def label(self) -> str:
        return f"{self.engine} ({self.variant})" if self.variant else self.engine


def write_json(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=2) + b"\n")


def table(rows: Sequence[Row]) -> Table:
    result = Table(title=_title(rows[0]) if rows else None)
    for heading in ("scenario", "at once", "engine"):
        result.add_column(heading, justify="left")
    for heading in (
        "tokens/s",
        "lrl is",
        "first token ms\np50 / p99",
        "next token ms\np50 / p99",
        "prefilled /\nunique",
        "peak MiB",
        "of limit",
    ):
        result.add_column(heading, justify="right")
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or _place(rows[i + 1]) != _place(row)
        result.add_row(*_cells(row, rows), end_section=last)
    return result


def _title(row: Row) -> str:
    return f"{row.model} {row.dtype}, {row.machine}, {row.date}{', quick' if row.quick else ''}"


def _place(row: Row) -> tuple[str, int]:
    return row.scenario, row.concurrency


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    prefilled = "?" if row.prefill_tokens is None else f"{row.prefill_tokens:,}"
    return [
        row.scenario,
        str(row.concurrency),
        row.label,
        f"{row.tokens_per_second:,.1f}",
        ratio(row, rows),
        f"{row.ttft_p50 * 1e3:,.0f} / {row.ttft_p99 * 1e3:,.0f}",
        f"{row.itl_p50 * 1e3:,.1f} / {row.itl_p99 * 1e3:,.1f}",
        f"{prefilled} / {row.unique_tokens:,}",
        f"{row.peak_memory_bytes / 2**20:,.0f}",
        f"{row.fraction_of_limit:.0%}",
    ]


def ratio(row: Row, rows: Sequence[Row]) -> str:
    """How many times this row's tokens a second our engine makes in its standard settings."""
    ours = [r for r in rows if r.engine == "lrl" and not r.variant and _place(r) == _place(row)]
    if not ours or ours[0] is row:
        return ""
    return f"{ours[0].tokens_per_second / row.tokens_per_second:.2f}×"


def machine() -> str:
    """Processor, processors that may be used, memory."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{name}, {len(os.sched_getaffinity(0))} CPUs, {memory / 2**30:.0f} GiB"
