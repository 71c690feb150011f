"""`lrl bench rollout` for real, without peers: the engine's own processes, every scenario that a tiny model can show."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from rollout_server.bench import probe
from rollout_server.cli import COMMANDS


def bench(*words: str) -> int:
    _, configure, run = COMMANDS["bench"]
    parser = argparse.ArgumentParser()
    configure(parser)
    return run(parser.parse_args(["rollout", "--model", "tiny-llama", "--quick", "--repeat", "1", *words]))


@pytest.fixture(autouse=True)
def _quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limit is measured twice a row: figures of it are for benches, not for tests."""
    monkeypatch.setattr(probe, "_BUDGET_S", 0.005)
    monkeypatch.setattr(probe, "STREAM_BYTES", 2**26)


def test_quick_rollout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "rows.json"
    names = ["single", "group", "agents", "rag", "adapters"]
    scenarios = [word for name in names for word in ("--scenario", name)]
    assert bench(*scenarios, "--dtype", "float32", "--threads", "1", "--json", str(target)) == 0
    rows = json.loads(target.read_text())
    assert [(row["scenario"], row["concurrency"]) for row in rows] == [
        *[("single", 1), ("single", 16), ("single", 64)],
        *[("group", 4), ("agents", 8), ("rag", 8), ("adapters", 8)],
    ]
    for row in rows:
        assert row["engine"] == "lrl"
        assert row["tokens_per_second"] > 0
        assert 0 < row["fraction_of_limit"] < 1
        assert 0 < row["ttft_p50"] <= row["ttft_p99"]
        assert row["peak_memory_bytes"] > 2**26
        assert row["prefill_tokens"] == row["unique_tokens"], row["scenario"]
    assert "tiny-llama" in capsys.readouterr().out


def test_a_scenario_larger_than_the_cache(tmp_path: Path) -> None:
    """Pages are evicted, so more is computed than is unique, and everything is answered all the same."""
    target = tmp_path / "rows.json"
    assert bench("--scenario", "long", "--kv-tokens", "4096", "--threads", "1", "--json", str(target)) == 0
    (row,) = json.loads(target.read_text())
    assert row["prefill_tokens"] >= row["unique_tokens"]
