"""`lrl traces replay`: what recorded episodes would have taught by another recipe, and, if asked, the policy that learns it.

No engine and no agent takes part: episodes come from a run, a database or a trace file, the model from the recipe. Replaying a
run by its own recipe gives its advantages again, and with `--train` its very weights. Whatever reads a run's directory
(`lrl export`, `lrl eval`) reads the directory that `--train` leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_rl.errors import LightningError, RecipeError, StoreError
from trainers.recorded import Recorded, found, from_here, open_recorded

if TYPE_CHECKING:
    from lightning_rl.ledger import Ledger
    from lightning_rl.recipe import Recipe
    from trainers.console import Console
    from trainers.replay.retraining import Retraining
    from trainers.replay.steps import ReplayedStep

COLUMNS = ["", "then", "now", "episodes that differ"]
TRAIN_PHASE = "train"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "source", metavar="RUN|FILE", help="run directory, episode database (file or URL) or trace file"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="fields of the recipe, e.g. train.credit=equal; functions are relative to where you are",
    )
    parser.add_argument("--recipe", type=Path, help="recipe.yaml (default: the run's own)")
    parser.add_argument("--reward", metavar="FILE.py:FUNCTION", help="reward function in place of the recipe's")
    parser.add_argument("--phase", default=TRAIN_PHASE, help="replay the episodes of this phase (default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="train on the steps, too, from the recipe's model")
    parser.add_argument("--out", type=Path, metavar="DIR", help="with --train: where the policy goes; must not exist")
    parser.add_argument(
        "--start-from", type=Path, metavar="DIR", help="with --train: what the warm start left (default: the run's)"
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every episode's and call's numbers, a line for each step"
    )


DESCRIPTION = """\
Reward, credit and train on recorded episodes once more: no engine, no agent.

  lrl traces replay runs/calculator                                     by the run's own recipe
  lrl traces replay runs/calculator reward.automatic.tool_error=-0.5    with fields of it overridden
  lrl traces replay runs/calculator --reward better.py:score            by another reward function
  lrl traces replay runs/calculator train.credit=my_rules.py:mine       by another credit rule
  lrl traces replay traces.jsonl --recipe recipe.yaml --train --out retrained

Rewards that the agent emitted stay; the recipe's are given anew: automatic ones, and those of the reward function or, without
one, what the agent returned."""


def run(options: argparse.Namespace) -> int:
    if options.train != (options.out is not None):
        raise LightningError("--train and --out go together", hint="lrl traces replay … --train --out DIR")
    if options.train and options.phase != TRAIN_PHASE:
        raise LightningError(f"--train learns from the phase {TRAIN_PHASE}, not {options.phase}")
    with open_recorded(options.source) as source:
        then, now = _recipes(source, options)
        _replay(source, then, now, options)
    sys.stdout.flush()
    if options.train and now.train.world_size > 1:
        os._exit(0)  # gloo can abort on an orderly exit, after all the work is done
    return 0


def _recipes(source: Recorded, options: argparse.Namespace) -> tuple[Recipe, Recipe]:
    """The one that the stored rewards are credited by, the run's own where there is one, and the one to replay by."""
    from lightning_rl.recipe import load_recipe

    path = options.recipe or (source.run.recipe if source.run else None)
    if path is None:
        raise LightningError(f"by which recipe is {options.source} to be replayed?", hint="--recipe recipe.yaml")
    reward = [f"reward.function={found(options.reward, '--reward')}"] if options.reward else []
    now = load_recipe(path, [*from_here(options.overrides), *reward], recorded=True)
    given = ["reward.function=null"]  # what it gave then is stored
    try:
        return load_recipe(source.run.recipe if source.run else path, given, recorded=True), now
    except RecipeError as error:
        if source.run is None or options.recipe is None:
            raise
        print(f"lrl: {error}\n     stored rewards are credited by {path} instead", file=sys.stderr)
        return load_recipe(path, given, recorded=True), now


def _replay(source: Recorded, then: Recipe, now: Recipe, options: argparse.Namespace) -> None:
    import msgspec

    from trainers.console import Console
    from trainers.doubts import doubts
    from trainers.needs import needs
    from trainers.replay.steps import replayed, report
    from trainers.runner.user_code import load_function

    store, phase = source.store, options.phase
    steps = sorted({summary.step for summary in store.starts(phase=phase) if summary.counted})
    if not steps:
        raise StoreError(
            f"{options.source} has no episode of the phase {phase} that counts", hint="see `lrl traces list`"
        )
    score = load_function(*now.resolve_function(now.reward.function)) if now.reward.function else None
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(Console())
        lines = stack.enter_context(options.json.open("wb")) if options.json else None
        retraining = None
        if options.train:
            retraining = stack.enter_context(_retraining(source, now, options, console))
            if beyond := [step for step in steps if step >= now.train.steps]:
                console.say(f"left out: {len(beyond)} recorded steps beyond train.steps = {now.train.steps}")
                steps = steps[: -len(beyond)]
        as_it_was = not options.overrides and options.reward is None and options.recipe is None
        for step in steps:
            stored = store.episodes(phase=phase, step=step)
            scores = None
            if retraining is not None and needs(now).scores:
                with console.stage(f"step {step + 1}: score"):
                    scores = retraining.scores(stored)
            replay = replayed(step, stored, then, now, score, scores=scores, scored_then=as_it_was)
            replay.after.ledger.check(f"step {step + 1}")
            heard = doubts(now, replay.after, is_first=step == steps[0])
            _show(console, replay)
            for line in heard:
                console.say(line)
            record = report(replay)
            if retraining is not None:
                with console.stage(f"step {step + 1}: train"):
                    record["train"] = retraining.step(replay.after, step)
            if lines is not None:
                lines.write(msgspec.json.encode(record) + b"\n")
        if retraining is not None:
            retraining.write()
    if options.train:
        print(f"take the policy:   lrl export {options.out} --out policy\nmeasure it:        lrl eval {options.out}")


def _show(console: Console, replay: ReplayedStep) -> None:
    from rich.table import Table

    from tracers.commands.view import safe
    from trainers.replay.steps import table

    counted = sum(episode.counted for episode in replay.stored)
    title = f"step {replay.step + 1}: {counted} episodes of {len(replay.stored)} attempts"
    shown = Table(*COLUMNS, title=title, title_justify="left")
    for row in table(replay):
        shown.add_row(*map(safe, row))
    console.rich.print(shown)
    if replay.before is None:
        console.say(f"not credited then: {replay.unfit}")
    else:
        console.say(f"tokens then: {_tokens(replay.before.ledger)}")
    console.say(f"tokens now:  {_tokens(replay.after.ledger)}")


def _tokens(ledger: Ledger) -> str:
    parts = [f"{ledger.sampled} sampled", f"{ledger.trained} trained", f"{ledger.merged} merged"]
    for reasons in (ledger.masked, ledger.truncated, ledger.dropped):
        parts += [f"{count} {reason}" for reason, count in reasons.items()]
    return ", ".join(part for part in parts if not part.startswith("0 "))


@contextlib.contextmanager
def _retraining(
    source: Recorded, recipe: Recipe, options: argparse.Namespace, console: Console
) -> Iterator[Retraining]:
    from trainers.replay.retraining import retraining

    start_from = options.start_from
    if start_from is None and recipe.warm_start is not None:
        start_from = source.run.warm_start if source.run is not None else None
        if start_from is None or not start_from.is_dir():
            raise LightningError(
                "the recipe begins with a warm start, and its result is not here",
                hint="--start-from DIR names it (a run has it in warm_start/); warm_start=null starts from the model itself",
            )
    with contextlib.ExitStack() as stack:
        with console.stage("start trainer"):
            opened = stack.enter_context(retraining(recipe, options.out, start_from))
        yield opened
