"""`lrl`: a table of commands by name. Each package owns its commands; nothing is imported before one is chosen."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence

from lightning_rl.errors import LightningError

Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]
"""(help line, configure the parser, run)."""

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("trainers.cli", "run one episode of an agent and show its trace, before any training"),
    "train": ("trainers.cli", "train the policy of an agent by a recipe, or resume a run"),
    "eval": ("trainers.cli", "measure a policy on a recipe's held-out tasks"),
    "export": ("trainers.cli", "write a run's policy as a Hugging Face checkpoint"),
    "ui": ("trainers.viewer.command", "look at runs in a browser: curves, episodes, tokens, credit"),
    "credit": ("trainers.cli", "show which call gets what, by the run's rule and by others"),
    "serve": ("rollout_server.cli", "serve a model over the OpenAI API"),
    "bench": ("rollout_server.cli", "measure the rollout engine beside its peers and against the machine"),
    "traces": ("tracers.cli", "list and show recorded episodes"),
    "doctor": ("lightning_rl.doctor", "say what is installed, what the machine has, and what would run where"),
}

OVERRIDE = re.compile(r"[a-z_][\w.]*=")

EPILOG = """\
Train the agent you have:
  lrl run my_agent.py:solve --model smollm2-135m --task '{"question": "What is 12 * 7?"}'
  lrl train recipes/calculator.yaml                  a complete example; see docs/quickstart.md for your own
  lrl train recipe.yaml train.steps=20 seed=1        any field of the recipe, overridden
  lrl train --resume runs/calculator                 go on after an interruption
  lrl ui runs/calculator                             look at it in a browser, while it runs and afterwards

`lrl COMMAND --help` explains a command."""


def main(argv: Sequence[str] | None = None) -> int:
    # libgomp's threads spin for their next work by default. Beside a busy neighbour that costs up to ten times the time, and
    # a short spin about 5 % on an idle machine. Children inherit it; torch reads it when it is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="lrl",
        description="Lightning RL trains LLM agents by reinforcement learning without changing them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    run: Callable[[argparse.Namespace], int] | None = None
    for name, (module, help_line) in COMMANDS.items():
        sub = commands.add_parser(
            name, help=help_line, description=help_line, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == chosen:
            try:
                description, configure, run = importlib.import_module(module).COMMANDS[name]
            except LightningError as error:
                return _fail(error)
            sub.description = description
            configure(sub)
    options, rest = parser.parse_known_args(arguments)
    if hasattr(options, "overrides"):  # argparse does not take more of them after an option
        options.overrides += [word for word in rest if OVERRIDE.match(word)]
        rest = [word for word in rest if not OVERRIDE.match(word)]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.version:
        from importlib.metadata import version

        print(version("lightning-rl"))
        return 0
    if run is None:
        parser.print_help()
        return 0
    try:
        return run(options)
    except LightningError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return 130


def _fail(error: LightningError) -> int:
    print(f"lrl: {error}", file=sys.stderr)
    if error.hint:
        print(f"     {error.hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
