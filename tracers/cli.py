"""`lrl traces`: what a run's agents did, read from its episode database. Actions beyond list and show have modules of their own."""

from __future__ import annotations

import argparse
import difflib
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_rl.errors import StoreError
from tracers.commands.selection import HELP, selected

if TYPE_CHECKING:
    from lightning_rl.store import Store

DESCRIPTION = """\
Look at recorded episodes. RUN is a run's directory, or an episode database: a file, or the URL of one in PostgreSQL.

  lrl traces list runs/calculator/latest                 one line per episode
  lrl traces list runs/calculator/latest --phase train --step 3
  lrl traces show runs/calculator/latest                 the episode that started last
  lrl traces show runs/calculator/latest train.3.train-0007.2.0
  lrl traces export runs/calculator/latest --out traces.parquet
  lrl traces import traces.parquet --out all.db
  lrl traces html runs/calculator/latest --out calculator.html"""
ACTIONS: dict[str, tuple[str, str]] = {
    "export": ("tracers.commands.export", "write episodes into a trace file, to keep or to take elsewhere"),
    "import": ("tracers.commands.import_", "add the episodes of a trace file to an episode database"),
    "replay": ("trainers.replay", "reward, credit and train on recorded episodes once more"),
    "html": ("trainers.viewer.export", "write episodes into one page that any browser opens"),
    "otlp": ("tracers.commands.otlp", "send episodes to an OpenTelemetry collector, or write them as OTLP"),
}
"""Of further actions: the module, with `configure(parser)` and `run(options)`, cheap to import; and the help line."""


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="one line per episode", description="One line per episode.")
    listing.add_argument("run", metavar="RUN", help="run directory, or episode database by file or URL")
    listing.add_argument("--phase", help="only this phase: train, eval-base, eval-final, …")
    listing.add_argument("--step", type=int, help=HELP)
    listing.add_argument("--limit", type=int, default=100, help="at most so many, the last ones (default: %(default)s)")
    showing = actions.add_parser("show", help="one episode in full", description="One episode in full.")
    showing.add_argument("run", metavar="RUN", help="run directory, or episode database by file or URL")
    showing.add_argument("episode", metavar="EPISODE", nargs="?", help="its id; by default the one that started last")
    for name, (module, help_line) in ACTIONS.items():
        sub = actions.add_parser(
            name, help=help_line, description=help_line, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        importlib.import_module(module).configure(sub)


def run(options: argparse.Namespace) -> int:
    if options.action in ACTIONS:
        module, _ = ACTIONS[options.action]
        return int(importlib.import_module(module).run(options))
    from rich.console import Console

    from lightning_rl.store import Store
    from lightning_rl.store.place import store_of
    from tracers.commands.view import episode_table, episode_view

    console = Console()
    with Store.open(store_of(options.run), create=False) as store:
        if options.action == "list":
            phase, step = selected(store, options.phase, options.step)
            summaries = store.starts(phase=phase, step=step)
            console.print(episode_table(summaries[-options.limit :]))
            if len(summaries) > options.limit:
                console.print(f"the last {options.limit} of {len(summaries)} episodes; --limit shows more")
        else:
            console.print(episode_view(store.episode(_episode_id(store, options.episode))))
    return 0


def _episode_id(store: Store, wanted: str | None) -> str:
    summaries = store.starts()
    if not summaries:
        raise StoreError("there are no episodes yet")
    if wanted is None:
        return max(summaries, key=lambda summary: summary.started_at).id
    ids = [summary.id for summary in summaries]
    if wanted not in ids:
        near = difflib.get_close_matches(wanted, ids, n=1)
        raise StoreError(
            f"there is no episode {wanted}",
            hint=f"did you mean {near[0]}?" if near else "`lrl traces list RUN` has the ids",
        )
    return wanted


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "traces": (DESCRIPTION, configure, run)
}
