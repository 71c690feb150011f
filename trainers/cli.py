"""The trainer's commands: train, run, eval, export, credit."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from lightning_rl.errors import LightningError
from trainers import credit_view

TRAIN = """\
Train the policy of an agent by a recipe.

  lrl train recipe.yaml                      a new run, in runs/<name>/<time>/
  lrl train recipe.yaml train.steps=20       with fields of the recipe overridden
  lrl train recipe.yaml --dry-run            check it, print what would run and the objective's formula; start nothing
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

RUN = """\
Run one episode of an agent, and show what it did. Nothing is trained.

  lrl run my_agent.py:solve --model smollm2-135m --task '{"id": "t1", "question": "What is 12 * 7?"}'
  lrl run my_package.agents:solve --model tiny-llama --task-file task.json --reward my_agent.py:score
  lrl run --command "node agent.js" --model smollm2-135m --task '{"question": "What is 12 * 7?"}'
  lrl run my_agent.py:solve --server http://127.0.0.1:8000 --task '{}'
  lrl run recipe.yaml                        the first task of a recipe's held-out ones; --task ID for another

The agent finds the model at OPENAI_BASE_URL (ANTHROPIC_BASE_URL for Anthropic's client), as in training. The exit code is 0 if it
completed, 1 if it failed, 2 if it could not be run.
"""


def _configure_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", type=Path, help="recipe.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe, e.g. train.steps=20")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run instead of starting one")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe and say what would run; start nothing")


def _train(options: argparse.Namespace) -> int:
    if options.resume is not None:
        if options.dry_run:
            raise LightningError(
                "--dry-run is for a recipe, --resume for a run", hint="lrl train RUN/recipe.yaml --dry-run"
            )
        if options.recipe is not None:
            raise LightningError(
                "--resume takes the recipe from the run", hint="give either a recipe or --resume RUN, not both"
            )
        from trainers.run import resume_run

        return resume_run(options.resume)
    if options.recipe is None:
        raise LightningError("which recipe?", hint="lrl train recipe.yaml, or lrl train --resume RUN")
    if options.dry_run:
        from trainers.dry_run import dry_run

        return dry_run(options.recipe, options.overrides)
    from trainers.run import start_run

    return start_run(options.recipe, options.overrides)


def _configure_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "target",
        nargs="?",
        metavar="AGENT|RECIPE",
        help="file.py:function, package.module:function, or recipe.yaml",
    )
    add("overrides", nargs="*", metavar="key=value", help="fields of the recipe, e.g. model.name=tiny-llama")
    add(
        "--command",
        dest="program",
        metavar="WORDS",
        help="an agent of any language instead: started here, without a shell",
    )
    add(
        "--task",
        metavar="JSON",
        help="what the agent gets, a JSON object; with a recipe also the id of one of its tasks",
    )
    add("--task-file", type=Path, metavar="FILE", help="the same from a file")
    add("--model", metavar="M", help="built-in name (smollm2-135m, tiny-llama, …), checkpoint directory, or hub id")
    add("--server", metavar="URL", help="a running `lrl serve` whose --store is OUT/episodes.db, instead of a model")
    add("--reward", metavar="FILE:FUNCTION", help="function(task, episode) that says how good it was")
    add("--temperature", type=_not_negative, metavar="T", help="of every call (default: the agent's own)")
    add("--max-tokens", type=_positive, metavar="N", help="that a call may sample (default: the agent's own)")
    add("--seed", type=int, metavar="N", help="of sampling and of the agent's randomness")
    add("--timeout", type=_seconds, default=300.0, metavar="SECONDS", help="for the agent to end (%(default)g)")
    add("--out", type=Path, metavar="DIR", help="where episodes are stored (runs/try)")
    add("--json", action="store_true", help="print the episode as JSON instead")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _seconds(text: str) -> float:
    value = _not_negative(text)
    if not value:
        raise argparse.ArgumentTypeError("0 seconds are too short for any agent")
    return value


def _run(options: argparse.Namespace) -> int:
    from trainers.run_one import run_one

    return run_one(options)


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
    "run": (RUN, _configure_run, _run),
    "eval": (EVAL, _configure_eval, _eval),
    "export": (EXPORT, _configure_export, _export),
    "credit": (credit_view.DESCRIPTION, credit_view.configure, credit_view.run),
}
