"""`lrl bench tracing`: the same agent untraced and traced, in turns, against one web process; beside it other tracers.

Every kind of agent has processes of its own, all started and warm before the first round; who is not playing waits at its
standard input. In each round every kind plays twice: episodes one after the other, where each call is timed, and many at once.
The order rotates. Each tracer is compared with its own agent untraced, in its own environment, in the same round.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lightning_rl.episode import Outcome
from lightning_rl.errors import ServerError
from lightning_rl.store import Store
from rollout_server.api.rendering.render import Renderer
from rollout_server.bench import tracing_agent
from rollout_server.bench.processes import processor_seconds
from rollout_server.bench.report import machine
from rollout_server.bench.scripted_engine import Script, ScriptedServer
from rollout_server.bench.tracing_report import Played, TracingRow, row
from rollout_server.launch import RolloutServer
from rollout_server.models.catalog import resolve_model

PEER = "agentlightning"
PEER_DRIVER = Path(__file__).resolve().parents[2] / "tests/bench/peers/agentlightning_driver.py"
SCRIPTED = "scripted"
SCRIPTED_MODEL = "tiny-llama"
"""Whose tokenizer and template the web process uses."""
ANSWER = '<tool_call>{"name": "add", "arguments": {"a": 17, "b": 42}}</tool_call>'
ROOT = Path(__file__).resolve().parents[2]


class Plan(NamedTuple):
    real: str | None
    """A model's name; None: a scripted engine."""
    token_ms: float
    """The scripted engine's time between two ids."""
    calls: int
    episodes: int
    """That each kind of agent runs one after the other in a round."""
    at_once: int
    waves: int
    """So many times `at_once` episodes follow in the round."""
    rounds: int
    peer_python: Path | None
    peer_processes: int
    date: str


class Kind(NamedTuple):
    tracer: str
    traced: bool
    processes: int


def measure(plan: Plan, scratch: Path, say: Callable[[str], None]) -> list[TracingRow]:
    """Raises ServerError if a process ends before its time."""
    store = scratch / "episodes.db"
    kinds = [Kind("lrl", traced, 1) for traced in (False, True)]
    if plan.peer_python is not None:
        kinds += [Kind(PEER, traced, plan.peer_processes) for traced in (False, True)]
    played: dict[Kind, list[Played]] = {kind: [] for kind in kinds}
    with _server(plan, store, scratch) as server, contextlib.ExitStack() as processes:
        agents = {
            kind: [
                processes.enter_context(AgentProcess(kind, plan, server.base_url, store, scratch / f"{number}.log"))
                for number in range(kind.processes)
            ]
            for kind in kinds
        }
        for number in range(-1, plan.rounds):
            say("warming up" if number < 0 else f"round {number + 1} of {plan.rounds}")
            turn = number % len(kinds)
            for kind in kinds[turn:] + kinds[:turn]:
                result = _play(agents[kind], plan, server.pids["web"])
                if number >= 0:
                    played[kind].append(result)
    _check_recorded(store, plan)
    return [
        row(
            tracer,
            played[Kind(tracer, False, processes_of)],
            played[Kind(tracer, True, processes_of)],
            {
                "engine": plan.real or SCRIPTED,
                "calls_per_episode": plan.calls,
                "at_once": _at_once(plan, processes_of, tracer),
                "processes": processes_of,
                "machine": machine(),
                "date": plan.date,
            },
        )
        for tracer, _, processes_of in kinds[::2]
    ]


def _check_recorded(store: Path, plan: Plan) -> None:
    """Each of our traced episodes is there with all its calls, made in its span: else the comparison means nothing."""
    each = plan.episodes + plan.at_once * plan.waves
    with Store.open(store) as opened:
        episodes = opened.episodes()
    whole = [
        episode
        for episode in episodes
        if episode.outcome is Outcome.COMPLETED
        and [call.span_id for call in episode.calls] == [episode.spans[0].id] * plan.calls
    ]
    if not len(whole) == len(episodes) == each * (plan.rounds + 1):
        raise ServerError(
            f"of {each * (plan.rounds + 1)} traced episodes {len(episodes)} were recorded, {len(whole)} as they were"
        )


def _server(plan: Plan, store: Path, logs: Path) -> RolloutServer:
    model = resolve_model(plan.real or SCRIPTED_MODEL)
    settings: dict[str, Any] = {"log_dir": logs, "store": store, "device": "cpu" if plan.real is None else "auto"}
    if plan.real is not None:
        return RolloutServer(model, "bench", "bfloat16", **settings)
    renderer = Renderer(model)
    assert renderer.turn_end_id is not None
    ids = [*renderer.encode(ANSWER), renderer.turn_end_id]
    return ScriptedServer(model, "bench", "float32", **settings).follow(Script(ids=ids, token_s=plan.token_ms / 1e3))


def _at_once(plan: Plan, processes: int, tracer: str) -> int:
    """What runs one episode at a time in a process runs as many as it has processes."""
    return plan.at_once if tracer != PEER else processes


def _play(agents: list[AgentProcess], plan: Plan, web: int) -> Played:
    processor = processor_seconds(web)
    alone = agents[0].play(plan.episodes, 1)
    count = max(1, plan.at_once * plan.waves // len(agents))
    at_once = max(1, _at_once(plan, len(agents), agents[0].kind.tracer) // len(agents))
    for agent in agents:
        agent.order(count, at_once)
    together = [agent.result() for agent in agents]
    processor = processor_seconds(web) - processor + sum(result["processor_s"] for result in (alone, *together))
    return Played(
        alone=alone["calls"],
        alone_s=alone["seconds"],
        episodes=plan.episodes,
        processor_s=processor / plan.calls / (plan.episodes + count * len(agents)),
        together_episodes_per_s=count * len(agents) / max(result["seconds"] for result in together),
    )


class AgentProcess:
    """`with AgentProcess(…) as agent:` returns when it is ready to play."""

    def __init__(self, kind: Kind, plan: Plan, url: str, store: Path, log: Path) -> None:
        self.kind = kind
        self._log = log.with_name(f"{kind.tracer}-{'traced' if kind.traced else 'untraced'}-{log.name}")
        settings = {
            "url": url,
            "model": "bench",
            "calls": plan.calls,
            "traced": kind.traced,
            "store": str(store),
            "agent": tracing_agent.__file__,
            "extra": {"ignore_eos": True} if plan.real is not None else {},
        }
        if kind.tracer == PEER:
            command = [str(plan.peer_python), str(PEER_DRIVER), json.dumps(settings)]
        else:
            command = [sys.executable, tracing_agent.__file__, json.dumps(settings)]
        self._command = command

    def __enter__(self) -> AgentProcess:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={
                    **{name: value for name, value in os.environ.items() if not name.startswith("LRL_")},
                    **({"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"} if self.kind.tracer != PEER else {}),
                },
            )
        if self._heard() != "ready\n":
            raise self._failure()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def play(self, episodes: int, at_once: int) -> dict[str, Any]:
        self.order(episodes, at_once)
        return self.result()

    def order(self, episodes: int, at_once: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"episodes": episodes, "at_once": at_once}) + "\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        line = self._heard()
        if not line:
            raise self._failure()
        return dict(json.loads(line))

    def _heard(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def _failure(self) -> ServerError:
        self._process.kill()
        self._process.wait()
        words = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
        traced = "traced" if self.kind.traced else "untraced"
        return ServerError(f"the {traced} agent of {self.kind.tracer} ended; last words:\n{words}")
