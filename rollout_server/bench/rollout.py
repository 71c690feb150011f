"""The order of a bench: per scenario all engines are loaded and frozen, then take turns, one round after the other.

A round gives every engine the same ids, drawn for this round only, so that nothing is cached from an earlier one. The
engines' order rotates. The machine's limit is measured before and after each engine's turn, while all are frozen: other
tenants of the machine change it from minute to minute. Each concurrency level is preceded by a short round that is thrown
away.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from lightning_rl.memory import keep_freed_memory
from rollout_server.bench import engines, limits
from rollout_server.bench.adapters import write_adapter
from rollout_server.bench.engine_process import EngineProcess, Launch, Played
from rollout_server.bench.limits import Limits
from rollout_server.bench.metrics import Round, measure, median_round
from rollout_server.bench.probe import probe
from rollout_server.bench.report import Row, machine
from rollout_server.bench.scenarios import SCENARIOS, Room, Scenario
from rollout_server.bench.wire import Setup
from rollout_server.models.catalog import resolve_model
from rollout_server.models.config import read_config

FIRST_ID = 256
"""Below lie the special ids of most vocabularies."""
_FEWEST_ROWS = 16
"""Products of fewer rows are bound by reading the weights: their rate says nothing about arithmetic."""


class Plan(NamedTuple):
    model: str
    dtype: str
    threads: int
    kv_tokens: int
    quick: bool
    repeat: int
    seed: int
    peers: list[str]
    peers_dir: Path | None
    variants: list[str]
    date: str


class Turn(NamedTuple):
    """One engine's turn in one round."""

    launch: Launch
    scenario: Scenario
    played: Played
    machine: Limits
    """The better of what was measured just before and just after."""


class Bench:
    """`run` measures one scenario at all its concurrency levels. `say` gets a line of progress at a time.

    Raises:
        ModelError: the model cannot be resolved, or has no limit worked out.
        MissingExtra: a peer's environment is not there.
        ServerError: an engine died or took too long.
    """

    def __init__(self, plan: Plan, scratch: Path, say: Callable[[str], None]) -> None:
        keep_freed_memory()
        self._plan, self._scratch, self._say = plan, scratch, say
        self._model_dir = resolve_model(plan.model)
        self._config = read_config(self._model_dir)
        self._dtype = torch.bfloat16 if plan.dtype == "bfloat16" else torch.float32
        self._shape = limits.shape_of(self._config, self._dtype.itemsize)
        self._machine = machine()

    def run(self, name: str) -> list[Row]:
        launches = self._launches(self._make(name, self._plan.seed))
        with ExitStack() as stack:
            processes = []
            for launch in launches:
                self._say(f"{name}: loading {launch.label}")
                log = self._scratch / f"{name}-{launch.label.replace(':', '-')}.log"
                processes.append(stack.enter_context(EngineProcess(launch, log)))
            levels = range(len(self._make(name, self._plan.seed)))
            return [row for level in levels for row in self._level(name, level, processes)]

    def _level(self, name: str, level: int, processes: list[EngineProcess]) -> list[Row]:
        for process in processes:
            process.play(self._warm_up(name, level))
        turns: list[Turn] = []
        rows = max(_FEWEST_ROWS, self._make(name, self._plan.seed)[level].max_sequences)
        before = probe(self._shape, [rows], self._plan.threads)
        for number in range(self._plan.repeat):
            scenario = self._make(name, self._plan.seed + number)[level]
            start = number % len(processes)
            for process in processes[start:] + processes[:start]:
                played = process.play(scenario)
                after = probe(self._shape, [rows], self._plan.threads)
                turns.append(Turn(process.launch, scenario, played, limits.best([before, after])))
                before = after
                self._say(self._progress(turns[-1], number))
        return [self._row(process.launch, turns) for process in processes]

    def _row(self, launch: Launch, turns: list[Turn]) -> Row:
        own = [turn for turn in turns if turn.launch is launch]
        rounds = [self._measure(turn) for turn in own]
        middle, scenario = median_round(rounds), own[0].scenario
        return Row(
            scenario=scenario.name,
            concurrency=scenario.concurrency,
            engine=launch.engine,
            variant=launch.variant,
            tokens_per_second=middle.tokens_per_second,
            fraction_of_limit=statistics.median(r.tokens_per_second / r.limit_tokens_per_second for r in rounds),
            limit_tokens_per_second=middle.limit_tokens_per_second,
            ttft_p50=middle.ttft_p50,
            ttft_p99=middle.ttft_p99,
            itl_p50=middle.itl_p50,
            itl_p99=middle.itl_p99,
            prefill_tokens=middle.prefill_tokens,
            unique_tokens=middle.unique_tokens,
            peak_memory_bytes=middle.peak_memory_bytes,
            rounds=len(rounds),
            tokens_per_second_all=[r.tokens_per_second for r in rounds],
            read_bytes_per_second=statistics.median(turn.machine.read_bytes_s for turn in own),
            gemm_flop_per_second=statistics.median(turn.machine.rate(scenario.max_sequences) for turn in own),
            quick=self._plan.quick,
            machine=self._machine,
            date=self._plan.date,
            dtype=self._plan.dtype,
            model=self._plan.model,
        )

    def _measure(self, turn: Turn) -> Round:
        waves = limits.waves(turn.scenario, turn.played.transcript)
        least = limits.least_seconds(self._shape, turn.machine, waves)
        return measure(turn.scenario, turn.played.transcript, least, turn.played.peak_memory_bytes)

    def _progress(self, turn: Turn, number: int) -> str:
        transcript = turn.played.transcript
        return (
            f"{turn.scenario.name} at {turn.scenario.concurrency}, round {number + 1} of {self._plan.repeat}, "
            f"{turn.launch.label}: {transcript.sampled_tokens / transcript.wall_s:.1f} tokens/s"
        )

    def _make(self, name: str, seed: int) -> list[Scenario]:
        return SCENARIOS[name](self._room(self._plan.quick, self._plan.kv_tokens), seed)

    def _warm_up(self, name: str, level: int) -> Scenario:
        seed = self._plan.seed - 1  # of no round, see scenarios.ROUNDS
        return SCENARIOS[name](self._room(True, min(4096, self._plan.kv_tokens)), seed)[level]

    def _room(self, quick: bool, kv_tokens: int) -> Room:
        return Room(
            first_id=FIRST_ID,
            vocab=self._config.vocab,
            max_positions=self._config.max_positions,
            kv_tokens=kv_tokens,
            quick=quick,
        )

    def _launches(self, levels: list[Scenario]) -> list[Launch]:
        setup = self._setup(levels)
        launches = [engines.ours(setup, variant) for variant in ("", *self._plan.variants)]
        for name in self._plan.peers:
            if setup.adapters and name in engines.WITHOUT_ADAPTERS:
                self._say(f"{levels[0].name}: {name} is left out, it cannot serve several adapters at once")
                continue
            assert self._plan.peers_dir is not None
            launches.append(engines.peer(name, setup, self._plan.peers_dir))
        return launches

    def _setup(self, levels: list[Scenario]) -> Setup:
        names = sorted({name for scenario in levels for name in scenario.adapters})
        return Setup(
            model_dir=str(self._model_dir),
            dtype=self._plan.dtype,
            threads=self._plan.threads,
            kv_tokens=self._plan.kv_tokens,
            kv_bytes=self._plan.kv_tokens * self._shape.kv_bytes,
            max_sequences=max(scenario.max_sequences for scenario in levels),
            max_context=max(scenario.max_context for scenario in levels),
            adapters={name: str(self._adapter(name, seed)) for seed, name in enumerate(names)},
            scratch=str(self._scratch),
        )

    def _adapter(self, name: str, seed: int) -> Path:
        directory = self._scratch / "adapters" / name
        if not directory.is_dir():
            write_adapter(directory, self._config, self._dtype, seed)
        return directory
