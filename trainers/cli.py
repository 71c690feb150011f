"""The trainer's commands: train, eval, export."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_rl.errors import LightningError

TRAIN = """\
Train the policy of an agent by a recipe.

  lrl train recipe.yaml                      a new run, in runs/<name>/<time>/
  lrl train recipe.yaml train.steps=20       with fields of the recipe overridden
  lrl train --resume runs/calculator         go on with a run (a directory, or a name: its latest)

A run measures the model as it is, warms it up by a few supervised steps if the recipe says so, improves it by reinforcement
learning, and measures it again. Ctrl-C, a crash or kill -9 lose at most the step under way. docs/recipe.md lists every field.
"""

EVAL = """\
Measure a policy on the held-out tasks of a recipe, greedily.

  lrl eval runs/calculator                   the latest policy of a run
  lrl eval runs/calculator --policy base     the model that it started from
  lrl eval recipe.yaml --policy DIR          an adapter or a checkpoint directory
"""

EXPORT = """\
Write a run's latest policy as a Hugging Face checkpoint that transformers loads.

  lrl export runs/calculator --out policy              adapter merged into the weights
  lrl export runs/calculator --out adapter --adapter   the LoRA adapter alone, for PEFT
"""


def _configure_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", type=Path, help="recipe.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe, e.g. train.steps=20")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run instead of starting one")


def _train(options: argparse.Namespace) -> int:
    from trainers.run import resume_run, start_run

    if options.resume is not None:
        if options.recipe is not None:
            raise LightningError(
                "--resume takes the recipe from the run", hint="give either a recipe or --resume RUN, not both"
            )
        return resume_run(options.resume)
    if options.recipe is None:
        raise LightningError("which recipe?", hint="lrl train recipe.yaml, or lrl train --resume RUN")
    return start_run(options.recipe, options.overrides)


def _configure_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=Path, metavar="RUN|RECIPE", help="a run directory or a recipe.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe")
    parser.add_argument(
        "--policy",
        default=None,
        help="base, latest (the default for a run), or a directory (default for a recipe: base)",
    )


def _eval(options: argparse.Namespace) -> int:
    from trainers.run import evaluate_policy

    return evaluate_policy(options.target, options.overrides, options.policy)


def _configure_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, or runs/<name> for its latest")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    parser.add_argument("--adapter", action="store_true", help="write the LoRA adapter alone, unmerged")


def _export(options: argparse.Namespace) -> int:
    from trainers.export import export_run
    from trainers.run_directory import open_run

    written = export_run(open_run(options.run), options.out, merged=not options.adapter)
    print(f"wrote {written}")
    return 0


COMMANDS = {
    "train": (TRAIN, _configure_train, _train),
    "eval": (EVAL, _configure_eval, _eval),
    "export": (EXPORT, _configure_export, _export),
}
