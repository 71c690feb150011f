"""`lrl bench tracing` for real, with tiny numbers and without peers; and its arithmetic."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from rollout_server.bench.tracing_report import Played, percentile, row
from rollout_server.cli import COMMANDS


def test_a_tiny_run_records_every_episode_and_says_what_it_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, configure, run = COMMANDS["bench"]
    parser = argparse.ArgumentParser()
    configure(parser)
    target = tmp_path / "rows.json"
    small = "tracing --calls 2 --episodes 2 --at-once 4 --waves 1 --repeat 1 --json"
    assert run(parser.parse_args([*small.split(), str(target)])) == 0
    (result,) = json.loads(target.read_text())
    assert (result["tracer"], result["engine"], result["calls"], result["at_once"]) == ("lrl", "scripted", 4, 4)
    assert 0 < result["untraced_p50_ms"] <= result["untraced_p99_ms"]
    assert result["traced_episodes_per_s"] > 0
    assert "tracing adds" in capsys.readouterr().out


def test_differences_are_taken_within_a_round() -> None:
    def played(call_ms: float, rate: float) -> Played:
        return Played(
            alone=[call_ms / 1e3] * 10,
            alone_s=call_ms / 100,
            episodes=5,
            processor_s=call_ms / 2e3,
            together_episodes_per_s=rate,
        )

    quiet_then_busy = [played(10, 100), played(40, 20), played(12, 100)]
    traced = [played(11, 97), played(42, 19), played(13, 98)]
    facts = {"engine": "scripted", "calls_per_episode": 2, "at_once": 64, "processes": 1, "machine": "m", "date": "d"}
    result = row("lrl", quiet_then_busy, traced, facts)
    assert result.added_p50_ms == pytest.approx(1)
    assert result.added_p99_ms == pytest.approx(2)
    assert result.added_episode_ms == pytest.approx(2)
    assert result.added_processor_ms == pytest.approx(0.5)
    assert result.lost_throughput == pytest.approx(0.03)
    assert result.calls == 30


def test_a_percentile_is_one_of_the_values() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(at) for at in range(1, 101)], 0.99) == 99.0
    assert percentile([5.0], 0.99) == 5.0
