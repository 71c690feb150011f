"""What tracing costs, from rounds in which traced and untraced agents took turns: arithmetic, JSON rows and the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct
from rich.table import Table


class Played(Struct, frozen=True, kw_only=True):
    """One agent process group in one round."""

    alone: list[float]
    """Seconds of each call, one episode after the other."""
    together_episodes_per_s: float
    """Many episodes at once."""
    alone_s: float
    """Of all episodes that ran one after the other."""
    episodes: int
    """How many these were."""
    processor_s: float
    """Of agents and web process, for a call, over both."""


class TracingRow(Struct, frozen=True, kw_only=True):
    """One tracer beside the same agent without it: medians over the rounds of differences and ratios within a round."""

    tracer: str
    engine: str
    """`scripted`, or the model's name."""
    calls_per_episode: int
    at_once: int
    processes: int
    rounds: int
    calls: int
    """Timed calls of each kind in all rounds."""
    untraced_p50_ms: float
    untraced_p99_ms: float
    added_p50_ms: float
    """To a call, as the agent sees it."""
    added_p99_ms: float
    """Of all rounds' calls together."""
    added_episode_ms: float
    """To a whole episode that runs alone, its beginning and end included."""
    untraced_episodes_per_s: float
    traced_episodes_per_s: float
    lost_throughput: float
    """0.03: three per cent fewer episodes a second."""
    untraced_processor_ms: float
    """Of agent and web process together, for a call."""
    added_processor_ms: float
    machine: str
    date: str


def row(tracer: str, untraced: Sequence[Played], traced: Sequence[Played], facts: dict[str, str | int]) -> TracingRow:
    pairs = list(zip(untraced, traced, strict=True))
    plain, followed = ([call for played in side for call in played.alone] for side in (untraced, traced))
    return TracingRow(
        tracer=tracer,
        rounds=len(pairs),
        calls=len(followed),
        untraced_p50_ms=1e3 * statistics.median(percentile(played.alone, 0.5) for played in untraced),
        untraced_p99_ms=1e3 * percentile(plain, 0.99),
        added_p50_ms=1e3 * statistics.median(percentile(b.alone, 0.5) - percentile(a.alone, 0.5) for a, b in pairs),
        added_p99_ms=1e3 * (percentile(followed, 0.99) - percentile(plain, 0.99)),
        added_episode_ms=1e3 * statistics.median(b.alone_s / b.episodes - a.alone_s / a.episodes for a, b in pairs),
        untraced_episodes_per_s=statistics.median(played.together_episodes_per_s for played in untraced),
        traced_episodes_per_s=statistics.median(played.together_episodes_per_s for played in traced),
        untraced_processor_ms=1e3 * statistics.median(played.processor_s for played in untraced),
        added_processor_ms=1e3 * statistics.median(b.processor_s - a.processor_s for a, b in pairs),
        lost_throughput=1 - statistics.median(b.together_episodes_per_s / a.together_episodes_per_s for a, b in pairs),
        **facts,  # type: ignore[arg-type]
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def write_json(rows: Sequence[TracingRow], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=2) + b"\n")


def table(rows: Sequence[TracingRow]) -> Table:
    result = Table(title=f"{rows[0].machine}, {rows[0].date}, engine: {rows[0].engine}")
    result.add_column("tracer")
    for heading in (
        "a call untraced ms\np50 / p99",
        "tracing adds ms\np50 / p99",
        "to an episode\nms",
        "processor ms a call\nuntraced, added",
        "at once\n(processes)",
        "episodes/s\nuntraced → traced",
        "lost",
    ):
        result.add_column(heading, justify="right")
    for one in rows:
        result.add_row(
            one.tracer,
            f"{one.untraced_p50_ms:.2f} / {one.untraced_p99_ms:.2f}",
            f"{one.added_p50_ms:+.2f} / {one.added_p99_ms:+.2f}",
            f"{one.added_episode_ms:+.1f}",
            f"{one.untraced_processor_ms:.2f} {one.added_processor_ms:+.2f}",
            f"{one.at_once} ({one.processes})",
            f"{one.untraced_episodes_per_s:.1f} → {one.traced_episodes_per_s:.1f}",
            f"{one.lost_throughput:+.1%}",
        )
    return result
