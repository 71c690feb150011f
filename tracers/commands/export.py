"""`lrl traces export`: episodes into a trace file (docs/traces.md)."""

from __future__ import annotations

import argparse
from pathlib import Path

from tracers.commands.selection import HELP, selected

DESCRIPTION = """\
Write recorded episodes into a trace file, with everything that is known of them. The name says which kind it is:
.jsonl, .jsonl.gz (JSON Lines) or .parquet. The file appears when it is complete.

  lrl traces export runs/calculator/latest --out traces.jsonl.gz
  lrl traces export runs/calculator/latest --out step3.parquet --phase train --step 3 --counted"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("run", metavar="RUN", help="run directory, or episode database by file or URL")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="a name in .jsonl, .jsonl.gz or .parquet"
    )
    parser.add_argument("--phase", help="only this phase: train, eval-base, eval-final, …")
    parser.add_argument("--step", type=int, help=HELP)
    parser.add_argument("--counted", action="store_true", help="only attempts that count")


def run(options: argparse.Namespace) -> int:
    from lightning_rl.store import Store
    from lightning_rl.store.place import store_of
    from lightning_rl.trace_file import export_traces

    with Store.open(store_of(options.run), create=False) as store:
        phase, step = selected(store, options.phase, options.step)
        count = export_traces(store, options.out, phase=phase, step=step, counted_only=options.counted)
    print(f"{count} episode{'' if count == 1 else 's'} in {options.out}")
    return 0
