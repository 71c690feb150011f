"""Rates, latencies, medians, and how they are shown."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rollout_server.bench.metrics import Round, latencies, measure, median_round, percentile
from rollout_server.bench.report import Row, ratio, table, write_json
from rollout_server.bench.scenarios import Conversation, Scenario, Turn
from rollout_server.bench.transcript import Choice, Exchange, Transcript

SCENARIO = Scenario(
    name="single",
    concurrency=1,
    seed=0,
    conversations=[Conversation(turns=[Turn(append=[1, 2, 3], max_tokens=4, n=2)])],
)
TRANSCRIPT = Transcript(
    wall_s=2.0,
    exchanges=[
        Exchange(
            conversation=0,
            turn=0,
            submitted=0.5,
            choices=[
                Choice(ids=[1, 2, 3, 4], arrivals=[1.0, 1.5, 1.5, 2.0]),
                Choice(ids=[1, 2, 3, 4], arrivals=[1.25, 1.5, 1.75, 2.0]),
            ],
        )
    ],
    prefill_tokens=3,
)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=30), st.sampled_from([0, 50, 99, 100]))
def test_percentiles_are_numpys(values: list[float], q: int) -> None:
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)))


def test_latencies() -> None:
    first, gaps = latencies(TRANSCRIPT)
    assert first == [0.5, 0.75]
    assert gaps == [0.5, 0.0, 0.5, 0.25, 0.25, 0.25]


def test_a_round() -> None:
    measured = measure(SCENARIO, TRANSCRIPT, least_seconds=0.5, peak_memory_bytes=7)
    assert (measured.tokens_per_second, measured.limit_tokens_per_second) == (4.0, 16.0)
    assert (measured.ttft_p50, measured.itl_p50) == (0.625, 0.25)
    assert (measured.prefill_tokens, measured.unique_tokens, measured.peak_memory_bytes) == (3, 3, 7)


def test_medians_are_taken_field_by_field() -> None:
    base = measure(SCENARIO, TRANSCRIPT, 0.5, 7)
    rounds = [
        base._replace(tokens_per_second=1.0, ttft_p50=9.0, prefill_tokens=5),
        base._replace(tokens_per_second=3.0, ttft_p50=1.0, prefill_tokens=4),
        base._replace(tokens_per_second=2.0, ttft_p50=2.0, prefill_tokens=6),
    ]
    middle = median_round(rounds)
    assert (middle.tokens_per_second, middle.ttft_p50, middle.prefill_tokens) == (2.0, 2.0, 5)
    unsaid: list[Round] = [*rounds, base._replace(prefill_tokens=None)]
    assert median_round(unsaid).prefill_tokens is None


def _row(engine: str, rate: float, variant: str = "", prefilled: int | None = 3) -> Row:
    return Row(
        scenario="single",
        concurrency=1,
        engine=engine,
        variant=variant,
        tokens_per_second=rate,
        fraction_of_limit=0.5,
        limit_tokens_per_second=2 * rate,
        ttft_p50=0.1,
        ttft_p99=0.2,
        itl_p50=0.01,
        itl_p99=0.02,
        prefill_tokens=prefilled,
        unique_tokens=3,
        peak_memory_bytes=2**30,
        rounds=3,
        tokens_per_second_all=[rate] * 3,
        read_bytes_per_second=2e10,
        gemm_flop_per_second=3e11,
        quick=False,
        machine="a machine",
        date="2026-01-01",
        dtype="bfloat16",
        model="smollm2-135m",
    )


def test_ratios_are_against_our_standard_settings() -> None:
    rows = [_row("lrl", 60.0), _row("lrl", 30.0, "batch-invariant"), _row("vllm", 40.0, prefilled=None)]
    assert [ratio(row, rows) for row in rows] == ["", "2.00×", "1.50×"]
    assert ratio(rows[2], rows[1:]) == ""


def test_the_table_shows_every_row() -> None:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(table([_row("lrl", 60.0), _row("lrl", 30.0, "batch-invariant"), _row("vllm", 40.0, prefilled=None)]))
    text = console.export_text()
    for expected in ("lrl (batch-invariant)", "1.50×", "3 / 3", "? / 3", "100 / 200", "10.0 / 20.0", "1,024", "50%"):
        assert expected in text


def test_json_is_a_list_of_rows(tmp_path: Path) -> None:
    rows = [_row("lrl", 60.0), _row("vllm", 40.0, prefilled=None)]
    write_json(rows, tmp_path / "deep" / "rows.json")
    written = json.loads((tmp_path / "deep" / "rows.json").read_text())
    assert [row["engine"] for row in written] == ["lrl", "vllm"]
    assert {"scenario", "concurrency", "tokens_per_second", "fraction_of_limit", "tokens_per_second_all"} <= set(
        written[0]
    )
    assert msgspec.convert(written, list[Row]) == rows
