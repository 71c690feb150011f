"""Driver processes: frozen between scenarios, measured, named when they die, and gone when the bench is done."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_rl.errors import MissingExtra, ServerError
from rollout_server.bench import cli, engines, processes
from rollout_server.bench.engine_process import EngineProcess, Launch
from rollout_server.bench.scenarios import Conversation, Scenario, Turn
from rollout_server.bench.wire import Setup

ROOT = Path(__file__).resolve().parents[2]
DRIVER = """
import subprocess, sys
from contextlib import asynccontextmanager
from rollout_server.bench.wire import drive

class Counter:
    async def prepare(self, scenario):
        print("noise on stdout")
        if scenario.name == "die":
            raise RuntimeError("out of luck")
    async def ask(self, ask, deliver):
        held = bytearray(ask.prompt[0] << 20)
        held[::4096] = b"x" * len(held[::4096])
        deliver(0, list(range(ask.max_tokens)), [0.0] * ask.max_tokens)
    async def prefill_tokens(self):
        return None

@asynccontextmanager
async def start(setup):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    assert setup.scratch
    yield Counter()
    if setup.dtype == "orderly":
        child.kill()
        child.wait()

drive(start)
"""
SETUP = Setup(
    model_dir="",
    dtype="orderly",
    threads=1,
    kv_tokens=1,
    kv_bytes=1,
    max_sequences=1,
    max_context=1,
    adapters={},
    scratch="",
)


def _launch(tmp_path: Path, setup: Setup = SETUP) -> Launch:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return Launch("counter", "", [sys.executable, str(script)], environment, setup)


def _scenario(name: str, mebibytes: int) -> Scenario:
    return Scenario(
        name=name,
        concurrency=1,
        seed=0,
        conversations=[Conversation(turns=[Turn(append=[mebibytes], max_tokens=3)])],
    )


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _pids(engine: EngineProcess) -> list[int]:
    assert engine._process is not None
    return processes.tree(engine._process.pid)


@pytest.mark.parametrize("dtype", ["orderly", "leaves a child behind"])
def test_an_engine_is_frozen_except_while_it_plays(tmp_path: Path, dtype: str) -> None:
    import msgspec

    setup = msgspec.structs.replace(SETUP, dtype=dtype)
    with EngineProcess(_launch(tmp_path, setup), tmp_path / "log") as engine:
        pids = _pids(engine)
        assert len(pids) == 2
        assert [_state(pid) for pid in pids] == ["T", "T"]
        small = engine.play(_scenario("a", 1))
        assert small.transcript.exchanges[0].choices[0].ids == [0, 1, 2]
        large, again = engine.play(_scenario("b", 200)), engine.play(_scenario("c", 1))
        assert [_state(pid) for pid in pids] == ["T", "T"]
        assert large.peak_memory_bytes > small.peak_memory_bytes + 150 * 2**20
        assert again.peak_memory_bytes < large.peak_memory_bytes - 100 * 2**20  # each scenario has its own peak
    deadline = time.monotonic() + 60.0
    while any(Path(f"/proc/{pid}").exists() and _state(pid) != "Z" for pid in pids):
        assert time.monotonic() < deadline, "a process outlived its bench"
        time.sleep(0.05)
    assert "noise on stdout" in (tmp_path / "log").read_text()


def test_a_death_is_told_with_last_words(tmp_path: Path) -> None:
    with (
        EngineProcess(_launch(tmp_path), tmp_path / "log") as engine,
        pytest.raises(ServerError, match="out of luck") as caught,
    ):
        engine.play(_scenario("die", 1))
    assert "counter" in str(caught.value)
    assert str(tmp_path / "log") in (caught.value.hint or "")


def test_the_tree_has_parents_before_children() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        pids = processes.tree(os.getpid())
        assert pids[0] == os.getpid()
        assert child.pid in pids
        assert processes.peak_memory(os.getpid()) > 2**20
    finally:
        child.kill()
        child.communicate()


def test_a_missing_environment_names_the_script(tmp_path: Path) -> None:
    with pytest.raises(MissingExtra) as caught:
        engines.peer("vllm", SETUP, tmp_path)
    assert "tests/bench/peers/make.sh" in (caught.value.hint or "")
    assert (ROOT / engines.MAKE).is_file()


def test_a_peer_is_started_in_its_own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    for name in engines.PEERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / ".complete").touch()
        launch = engines.peer(name, SETUP, tmp_path)
        assert launch.command[0].startswith(str(tmp_path / name))
        assert Path(launch.command[1]).is_file()
        assert launch.setup.home == str(tmp_path / name)
        assert "GOMP_SPINCOUNT" not in launch.environment
        assert launch.environment["OMP_NUM_THREADS"] == "1"


def test_variants_are_settings_of_the_engine() -> None:
    from rollout_server.bench.lrl_driver import engine_config

    assert engine_config(engines.ours(SETUP).setup, "x").batch_invariant is False
    assert engine_config(engines.ours(SETUP, "batch-invariant").setup, "x").batch_invariant is True
    for variant in engines.VARIANTS:
        assert engine_config(engines.ours(SETUP, variant).setup, "x") != engine_config(engines.ours(SETUP).setup, "x")


def _parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.configure(parser)
    return parser.parse_args(["rollout", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--peers", "sglang", "--peers-dir", "x"], "no peer 'sglang'"),
        (["--peers", "vllm"], "--peers-dir"),
        (["--repeat", "0"], "at least one round"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(words: list[str], message: str) -> None:
    with pytest.raises(ServerError, match=message):
        cli.run(_parse(*words))


def test_arguments() -> None:
    args = _parse("--scenario", "single", "--scenario", "group", "--batch-invariant", "--variant", "no-lookahead")
    assert args.scenario == ["single", "group"]
    assert args.variant == ["batch-invariant", "no-lookahead"]
