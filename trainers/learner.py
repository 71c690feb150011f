"""What every trainer rank does: hold the policy, take a step, save, load.

Rank 0 leads: it calls methods, which reach the other ranks as the same calls (`trainers.ranks`). With one process there is
nobody to tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_rl.algorithms.grpo import grpo_loss
from lightning_rl.recipe import Objective, Recipe, Train
from trainers import checkpoint
from trainers.deepspeed_engine import WAIT_FOR_ROLLOUTS, OptimiserConfig, TrainEngine
from trainers.packing import Row
from trainers.policy import Policy, RowScores, load_policy, row_tensors


class Learner:
    """Create on every rank, after `init_distributed`."""

    def __init__(self, recipe: Recipe, model_dir: Path, start_from: Path | None) -> None:
        self._objective = recipe.train.objective
        # Between steps the other ranks wait for rank 0, and rank 0 waits for agents.
        self._control = dist.new_group(timeout=WAIT_FOR_ROLLOUTS)
        self.policy: Policy = load_policy(
            model_dir, recipe.model.dtype, recipe.train.lora, seed=recipe.seed, start_from=start_from
        )
        self._engine = TrainEngine(
            self.policy,
            recipe.model.dtype,
            OptimiserConfig(weight_decay=recipe.train.weight_decay, gradient_clipping=recipe.train.gradient_clipping),
        )

    def step(self, shares: Sequence[Sequence[Row]], learning_rate: float) -> dict[str, float]:
        """One update; `shares` are the rows of each rank. Returns sums over all tokens (see `grpo.LossSum`), with
        `entropy`, `gap` (|trainer - server| log-probs, behind the update), `loss` and `gradient_norm`."""
        self._tell("step", shares, learning_rate)
        rows = shares[dist.get_rank()]
        return self._engine.step(rows, self._row_loss, learning_rate)

    def save(self, directory: Path, state: checkpoint.TrainState, keep: int) -> None:
        self._tell("save", directory, state, keep)
        checkpoint.save_checkpoint(self._engine, directory, state, keep=keep)

    def load(self, path: Path) -> None:
        self._tell("load", path)
        checkpoint.load_checkpoint(self._engine, path)

    def stop(self) -> None:
        """The last call: the other ranks leave their loop."""
        self._tell("stop")
        self._engine.close()

    def _tell(self, method: str, *arguments: Any) -> None:
        if dist.get_world_size() > 1 and dist.get_rank() == 0:
            dist.broadcast_object_list([(method, arguments)], src=0, group=self._control)

    def follow(self) -> None:
        """The life of a rank other than 0: do what rank 0 does."""
        while True:
            told: list[Any] = [None]
            dist.broadcast_object_list(told, src=0, group=self._control)
            method, arguments = told[0]
            getattr(self, method)(*arguments)
            if method == "stop":
                return

    def _row_loss(self, module: nn.Module, row: Row) -> tuple[Tensor, dict[str, float]]:
        scores: RowScores = module(**row_tensors(row))
        if not row.nodes:
            return scores.logprobs.sum(), {}
        return objective_loss(scores, row, self._objective)


def objective_loss(scores: RowScores, row: Row, objective: Objective) -> tuple[Tensor, dict[str, float]]:
    """One update per batch: the policy before the step is the current one, held constant."""
    behaviour = torch.tensor(row.behaviour)
    result = grpo_loss(
        scores.logprobs,
        scores.logprobs.detach(),
        behaviour,
        torch.tensor(row.advantages),
        torch.tensor(row.weights),
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        tis_cap=objective.tis_cap,
    )
    sums = {name: float(value) for name, value in result.metrics.items()}
    sums["loss"] = float(result.loss.detach())
    sums["entropy"] = float(scores.entropies.sum())
    sums["gap"] = float((scores.logprobs.detach() - behaviour).abs().sum())
    return result.loss, sums


def learning_rate(train: Train, step: int) -> float:
    """Of step 0, 1, …: a pure function, so that a resumed run needs no scheduler state."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / (train.warmup_steps + 1)
    if train.lr_schedule == "linear":
        return train.learning_rate * (train.steps - step) / (train.steps - train.warmup_steps)
    return train.learning_rate
