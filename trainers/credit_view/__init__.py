"""`lrl credit`: how the credit of recorded episodes was assigned, and how other rules would have assigned it."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_rl.errors import LightningError, StoreError

if TYPE_CHECKING:
    from lightning_rl.recipe import Recipe
    from lightning_rl.store import EpisodeSummary, Store
    from trainers.credit_view.report import GroupReport, StepReport
    from trainers.recorded import Recorded

DESCRIPTION = """\
Show who gets the credit, in a step of a run or in one of its episodes. Nothing is trained.

  lrl credit runs/calculator                              the groups of the last step
  lrl credit runs/calculator --step 3                     of the third
  lrl credit runs/calculator EPISODE                      its calls, and every rule beside the run's own
  lrl credit runs/calculator EPISODE --rule tree --rule my_rules.py:mine
  lrl credit traces.jsonl EPISODE --recipe recipe.yaml --json -

RUN is a run directory, an episode database (file or URL) or a trace file. Returns and advantages are computed as training computes
them, over the whole step."""

OVERRIDES = "fields of the recipe, e.g. train.objective=rloo; functions are relative to where you are"
RULE = """compare this rule, with its default parameters (may repeat; default: all built-in ones); for others
override the run's rule: 'train.credit={rule: gigpo, arguments: {weight: 0.5}}'"""
PHASE = "train"
SCHEMA = 1


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory, episode database (file or URL) or trace file")
    add("episode", nargs="?", metavar="EPISODE", help="one episode of the training instead of a summary")
    add("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    add("--step", type=int, metavar="N", help="summary of this step, from 1, as the console counts (default: the last)")
    add("--rule", action="append", metavar="R", help=RULE)
    add("--recipe", type=Path, metavar="FILE", help="recipe.yaml (default: the run's own)")
    add("--json", metavar="FILE", help="write the numbers as JSON; - for standard output, instead of the view")


def run(options: argparse.Namespace) -> int:
    from trainers.recorded import open_recorded

    if options.episode is not None and "=" in options.episode:  # argparse takes the first word for the episode
        options.overrides.insert(0, options.episode)
        options.episode = None
    if options.episode is None and options.rule:
        raise LightningError("--rule compares the calls of one episode", hint="lrl credit RUN EPISODE --rule R")
    if options.episode is not None and options.step is not None:
        raise LightningError("an episode has its own step: give EPISODE or --step, not both")
    with open_recorded(options.run) as source:
        recipe = _recipe(source, options)
        if options.episode is None:
            _step(source.store, recipe, options)
        else:
            _episode(source.store, recipe, options)
    return 0


def _recipe(source: Recorded, options: argparse.Namespace) -> Recipe:
    from lightning_rl.recipe import load_recipe
    from trainers.recorded import from_here

    path = options.recipe or (source.run.recipe if source.run else None)
    if path is None:
        raise LightningError(f"by which recipe is {options.run} to be credited?", hint="--recipe recipe.yaml")
    # The rewards are stored: their function need not be there any more.
    return load_recipe(path, [*from_here(options.overrides), "reward.function=null"], recorded=True)


def _step(store: Store, recipe: Recipe, options: argparse.Namespace) -> None:
    from trainers.credit_view.report import step_report

    steps = sorted({summary.step for summary in store.starts(phase=PHASE) if summary.counted})
    if not steps:
        raise StoreError(f"{options.run} has no training episode that counts", hint="see `lrl traces list`")
    step = steps[-1] if options.step is None else options.step - 1
    if step not in steps:
        raise StoreError(f"{options.run} has no step {step + 1}: it has {steps[0] + 1} to {steps[-1] + 1}")
    report = step_report(recipe, step, store.episodes(phase=PHASE, step=step))
    if not _written(report, options.json):
        from rich.console import Console

        from trainers.credit_view.view import step_view

        Console().print(step_view(report))


def _episode(store: Store, recipe: Recipe, options: argparse.Namespace) -> None:
    from lightning_rl.credit import RULES
    from trainers.credit_view.report import credit_report

    summary = _summary(store, options.episode)
    episodes = store.episodes(phase=PHASE, step=summary.step)
    episode = next(episode for episode in episodes if episode.id == summary.id)
    rules = [_rule(name) for name in options.rule] if options.rule else list(RULES)
    report = credit_report(recipe, episodes, episode.start.group, rules)
    if not _written(report, options.json):
        from rich.console import Console

        from trainers.credit_view.view import group_view

        console = Console()
        console.print(group_view(report, episode, console.width))


def _summary(store: Store, wanted: str) -> EpisodeSummary:
    summaries = {summary.id: summary for summary in store.starts()}
    found = summaries.get(wanted)
    if found is None:
        near = difflib.get_close_matches(wanted, [*summaries], n=1)
        raise StoreError(
            f"there is no episode {wanted}",
            hint=f"did you mean {near[0]}?" if near else "`lrl traces list RUN` has the ids",
        )
    if found.phase != PHASE:
        raise StoreError(f"episode {wanted} is of the phase {found.phase}: credit is assigned in training only")
    if not found.counted:
        raise StoreError(f"episode {wanted} did not count ({found.outcome or 'running'}), so it has no credit")
    return found


def _rule(name: str) -> str:
    """A built-in rule's name, or a function; `file.py:function` is relative to where the command is started."""
    from lightning_rl.credit import RULES
    from lightning_rl.recipe.functions import did_you_mean

    if ":" not in name:
        if name not in RULES:
            raise LightningError(
                f"--rule {name}: no such rule{did_you_mean(name, [*RULES])}",
                hint=f"choose from {', '.join(RULES)}, or give file.py:function",
            )
        return name
    from trainers.recorded import found

    return found(name, "--rule")


def _written(report: StepReport | GroupReport, target: str | None) -> bool:
    """Whether the report went to standard output. Its fields are those of `report`, beside `schema`."""
    import msgspec

    if target is None:
        return False
    text = msgspec.json.format(msgspec.json.encode({"schema": SCHEMA, **msgspec.structs.asdict(report)}), indent=2)
    if target == "-":
        sys.stdout.write(text.decode() + "\n")
        return True
    try:
        Path(target).write_bytes(text + b"\n")
    except OSError as error:
        raise LightningError(f"--json {target}: {error.strerror}") from error
    return False
