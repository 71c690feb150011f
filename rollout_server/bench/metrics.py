"""From transcripts to a row of the table: rates and latencies of one round, medians over the rounds. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from rollout_server.bench.scenarios import Scenario
from rollout_server.bench.transcript import Transcript
from rollout_server.bench.unique_tokens import unique_tokens


class Round(NamedTuple):
    """One engine, one scenario, once. Times in seconds."""

    tokens_per_second: float
    """Sampled tokens over the wall time from the first request to the last id, pauses included."""
    least_seconds: float
    """The machine's limit for what was asked, see `limits`."""
    limit_tokens_per_second: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    prefill_tokens: int | None
    unique_tokens: int
    peak_memory_bytes: int


def measure(scenario: Scenario, transcript: Transcript, least_seconds: float, peak_memory_bytes: int) -> Round:
    first, gaps = latencies(transcript)
    sampled = transcript.sampled_tokens
    return Round(
        tokens_per_second=sampled / transcript.wall_s,
        least_seconds=least_seconds,
        limit_tokens_per_second=sampled / least_seconds,
        ttft_p50=percentile(first, 50),
        ttft_p99=percentile(first, 99),
        itl_p50=percentile(gaps, 50),
        itl_p99=percentile(gaps, 99),
        prefill_tokens=transcript.prefill_tokens,
        unique_tokens=unique_tokens(scenario, transcript),
        peak_memory_bytes=peak_memory_bytes,
    )


def latencies(transcript: Transcript) -> tuple[list[float], list[float]]:
    """(time to the first token of each choice, time between one token and the next); 0 for tokens that came together."""
    choices = [
        (exchange.submitted, choice.arrivals) for exchange in transcript.exchanges for choice in exchange.choices
    ]
    first = [arrivals[0] - submitted for submitted, arrivals in choices]
    gaps = [after - before for _, arrivals in choices for before, after in pairwise(arrivals)]
    return first, gaps


def percentile(values: Sequence[float], q: float) -> float:
    """Linear between the nearest ranks; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    at = (len(ordered) - 1) * q / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def median_round(rounds: Sequence[Round]) -> Round:
    """Field by field; counts take the lower middle, so that they are counts that occurred."""
    prefilled = [r.prefill_tokens for r in rounds if r.prefill_tokens is not None]
    return Round(
        tokens_per_second=statistics.median(r.tokens_per_second for r in rounds),
        least_seconds=statistics.median(r.least_seconds for r in rounds),
        limit_tokens_per_second=statistics.median(r.limit_tokens_per_second for r in rounds),
        ttft_p50=statistics.median(r.ttft_p50 for r in rounds),
        ttft_p99=statistics.median(r.ttft_p99 for r in rounds),
        itl_p50=statistics.median(r.itl_p50 for r in rounds),
        itl_p99=statistics.median(r.itl_p99 for r in rounds),
        prefill_tokens=statistics.median_low(prefilled) if len(prefilled) == len(rounds) else None,
        unique_tokens=statistics.median_low([r.unique_tokens for r in rounds]),
        peak_memory_bytes=statistics.median_low([r.peak_memory_bytes for r in rounds]),
    )
