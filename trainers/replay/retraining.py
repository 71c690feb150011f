"""Training on steps that were recorded: the trainer of `lrl train` without server, agents or publishing.

What it leaves is a run's directory with a recipe and a published policy, so that whatever takes a policy from a run takes it from
there. The directory appears only when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_rl.episode import Episode
from lightning_rl.errors import LightningError
from lightning_rl.memory import keep_freed_memory
from lightning_rl.recipe import Recipe
from lightning_rl.scores import CallScores
from rollout_server.models.catalog import resolve_model
from trainers.checkpoint import FIRST_VERSION
from trainers.learning import StepData
from trainers.loop import score_calls, update
from trainers.run_directory import RunDirectory

if TYPE_CHECKING:
    from trainers.learner import Learner


@dataclass
class Retraining:
    learner: Learner
    recipe: Recipe
    model_dir: Path
    scratch: RunDirectory
    out: Path
    steps: int = 0

    def scores(self, episodes: Sequence[Episode]) -> dict[str, CallScores]:
        """What the trainer's models say about a step's calls, as they are now."""
        return score_calls(self.recipe, self.learner, episodes)

    def step(self, data: StepData, step: int) -> dict[str, float]:
        """The updates of a step, as `loop.train` makes them, and what it sums up of them."""
        self.steps += 1
        return update(self.recipe, self.learner, data, step)

    def write(self) -> None:
        """The policy after the last step, in `out`."""
        from trainers.publish import write_policy

        version = FIRST_VERSION + self.steps
        self.scratch.published.mkdir()
        write_policy(self.learner.policy, self.scratch.published / f"v{version:05d}", self.model_dir)
        self.scratch.path.rename(self.out)


@contextlib.contextmanager
def retraining(recipe: Recipe, out: Path, start_from: Path | None) -> Iterator[Retraining]:
    """A trainer of the recipe's model, or of what a warm start has made of it. Raises LightningError if `out` exists."""
    from trainers.run import open_learner

    if out.exists():
        raise LightningError(f"{out} exists already", hint="give a new directory")
    keep_freed_memory()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    scratch = RunDirectory(out.resolve().with_name(f".{out.name}.tmp"))
    shutil.rmtree(scratch.path, ignore_errors=True)
    scratch.logs.mkdir(parents=True)
    scratch.recipe.write_text(recipe.to_yaml())
    model_dir = resolve_model(recipe.model.name)
    with open_learner(recipe, scratch, model_dir, start_from, "start the replay again") as learner:
        yield Retraining(learner, recipe, model_dir, scratch, out)
