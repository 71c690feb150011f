"""`lrl bench rollout`: scenarios × engines × rounds, interleaved, then the table. `lrl bench tracing`: what tracing costs."""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_rl.errors import ServerError
from rollout_server.bench.engines import MAKE, PEERS, VARIANTS
from rollout_server.bench.scenarios import SCENARIOS

if TYPE_CHECKING:
    from rollout_server.bench.report import Row

Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measure what the package promises to be fast at."
    commands = parser.add_subparsers(dest="bench", required=True, metavar="WHAT", title="what to measure")
    rollout = commands.add_parser(
        "rollout",
        help="the rollout engine beside its peers, and against the machine's own limit",
        description="Run the engine and its peers in turn on the same token ids; print tokens/s, latencies, prefill work, "
        "memory and the fraction of the machine's own limit, measured in the same run. See docs/bench.md.",
    )
    add = rollout.add_argument
    add("--model", default="smollm2-135m", help="built-in name, checkpoint directory or hub id (%(default)s)")
    add(
        "--scenario",
        action="append",
        choices=sorted(SCENARIOS),
        help="may be given several times (default: single, group, agents)",
    )
    add("--peers", default="", metavar="NAMES", help=f"comma-separated, of {', '.join(PEERS)} (default: none)")
    add("--peers-dir", type=Path, metavar="DIR", help=f"what {MAKE} made")
    add("--variant", action="append", default=[], choices=sorted(VARIANTS), help="measure lrl with these settings too")
    add(
        "--batch-invariant",
        action="append_const",
        dest="variant",
        const="batch-invariant",
        help="the same as --variant batch-invariant",
    )
    add("--json", type=Path, metavar="FILE", help="write the rows here, after each scenario")
    add("--repeat", type=int, default=3, metavar="R", help="rounds; medians are reported (%(default)s)")
    add("--quick", action="store_true", help="shorten every scenario, for a first look")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of every engine (%(default)s)")
    add("--threads", type=int, help="threads of every engine (default: all processors)")
    add("--kv-tokens", type=int, default=65536, help="tokens that an engine's KV cache holds (%(default)s)")
    add("--seed", type=int, default=0, help="of prompts and sampling (%(default)s)")
    _configure_tracing(commands)


def _configure_tracing(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    tracing = commands.add_parser(
        "tracing",
        help="what tracing adds to an agent's calls, beside the same agent untraced",
        description="Run one agent untraced and traced in turns against a web process in front of a scripted engine; print "
        "what tracing adds to a call and takes from the throughput. See docs/bench.md.",
    )
    add = tracing.add_argument
    add(
        "--real",
        nargs="?",
        const="tiny-llama",
        metavar="MODEL",
        help="a real engine with this model (%(const)s) instead of a scripted one",
    )
    add("--token-ms", type=float, default=0.0, help="a scripted engine's time for a token (%(default)s)")
    add("--calls", type=int, default=4, help="of an episode (%(default)s)")
    add("--episodes", type=int, default=20, help="one after the other, of each kind in each round (%(default)s)")
    add("--at-once", type=int, default=64, help="episodes at once where throughput is measured (%(default)s)")
    add("--waves", type=int, default=4, help="so many times --at-once episodes in each round (%(default)s)")
    add("--repeat", type=int, default=10, metavar="R", help="rounds (%(default)s)")
    add("--peer-python", type=Path, metavar="PATH", help=f"python of an environment with agentlightning ({MAKE})")
    add(
        "--peer-processes",
        type=int,
        default=4,
        metavar="N",
        help="agentlightning runs one episode in each (%(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write the rows here")


def _run_tracing(args: argparse.Namespace) -> int:
    from rich.console import Console

    from rollout_server.bench.tracing import Plan, measure
    from rollout_server.bench.tracing_report import table, write_json

    for name in ("calls", "episodes", "at_once", "waves", "repeat", "peer_processes"):
        if getattr(args, name) < 1:
            raise ServerError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
    plan = Plan(
        real=args.real,
        token_ms=args.token_ms,
        calls=args.calls,
        episodes=args.episodes,
        at_once=args.at_once,
        waves=args.waves,
        rounds=args.repeat,
        peer_python=args.peer_python,
        peer_processes=args.peer_processes,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    with tempfile.TemporaryDirectory(prefix="lrl-bench-") as scratch:
        rows = measure(plan, Path(scratch), Console(stderr=True).print)
    if args.json is not None:
        write_json(rows, args.json)
    Console(width=None if os.isatty(1) else 160).print(table(rows))
    return 0


def run(args: argparse.Namespace) -> int:
    """Raises ServerError, MissingExtra or ModelError when something cannot be run as asked."""
    if args.bench == "tracing":
        return _run_tracing(args)
    from rich.console import Console

    from rollout_server.bench.report import table, write_json
    from rollout_server.bench.rollout import Bench, Plan

    plan = Plan(
        model=args.model,
        dtype=args.dtype,
        threads=args.threads or len(os.sched_getaffinity(0)),
        kv_tokens=args.kv_tokens,
        quick=args.quick,
        repeat=args.repeat,
        seed=args.seed,
        peers=_peers(args.peers, args.peers_dir),
        peers_dir=args.peers_dir,
        variants=list(dict.fromkeys(args.variant)),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    if plan.repeat < 1:
        raise ServerError(f"--repeat {plan.repeat}: at least one round is needed")
    console = Console(stderr=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="lrl-bench-") as scratch:
        bench = Bench(plan, Path(scratch), console.print)
        for name in dict.fromkeys(args.scenario or ["single", "group", "agents"]):
            rows.extend(bench.run(name))
            if args.json is not None:
                write_json(rows, args.json)
    Console(width=None if os.isatty(1) else 160).print(table(rows))
    return 0


def _peers(names: str, directory: Path | None) -> list[str]:
    chosen = list(dict.fromkeys(name for name in names.split(",") if name))
    for name in chosen:
        if name not in PEERS:
            raise ServerError(f"--peers: there is no peer {name!r}", hint=f"choose from {', '.join(PEERS)}")
    if chosen and directory is None:
        raise ServerError(
            "--peers needs --peers-dir", hint=f"make the environments with {MAKE} DIR and pass --peers-dir DIR"
        )
    return chosen
