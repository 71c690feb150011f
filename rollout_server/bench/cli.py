"""`lrl bench rollout`: scenarios × engines × rounds, interleaved, then the table."""

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


def run(args: argparse.Namespace) -> int:
    """Raises ServerError, MissingExtra or ModelError when something cannot be run as asked."""
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
