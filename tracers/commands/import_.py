"""`lrl traces import`: the episodes of a trace file into an episode database (docs/traces.md)."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_rl.errors import TraceFileError

DESCRIPTION = """\
Add the episodes of a trace file to an episode database, which is made if it is not there. Those that it has already are
passed over, so an import that was interrupted can be repeated; an episode of the same id with other content is an error.

  lrl traces import traces.jsonl.gz --out all.db
  lrl traces import traces.parquet --out 'postgresql://me@db.example.com/traces?run=calculator'"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("file", metavar="FILE", type=Path, help="a trace file: .jsonl, .jsonl.gz or .parquet")
    parser.add_argument("--out", metavar="STORE", required=True, help="episode database, by file or URL")


def run(options: argparse.Namespace) -> int:
    from lightning_rl.store import Store
    from lightning_rl.trace_file import import_traces

    if not options.file.is_file():
        raise TraceFileError(f"there is no file {options.file}")
    with Store.open(options.out) as store:
        count = import_traces(options.file, store)
        print(f"{count} episode{'' if count == 1 else 's'} of {options.file} in {store.place}")
    return 0
