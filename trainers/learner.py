"""What every trainer rank does: hold the policy, take a step, save, load.

Rank 0 leads: it calls methods, which reach the other ranks as the same calls (`trainers.ranks`). With one process there is
nobody to tell.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from lightning_rl.algorithms.objective import TokenBatch, objective_loss
from lightning_rl.algorithms.settings import Settings
from lightning_rl.recipe import Recipe, Train
from lightning_rl.scores import CallScores
from trainers import checkpoint
from trainers.critic import Critic, CriticOptimiser, value_loss
from trainers.deepspeed_engine import WAIT_FOR_ROLLOUTS, OptimiserConfig, TrainEngine
from trainers.needs import critic as needed_critic
from trainers.needs import needs
from trainers.packing import Row
from trainers.policy import Policy, RowScores, load_policy, row_tensors, trained_tensors


class Learner:
    """Create on every rank, after `init_distributed`.

    It has a critic if `needs.critic` says so, and keeps the tensors that it starts from, which `load` does not
    change, if its objective has a KL penalty: that policy is the reference.
    """

    def __init__(self, recipe: Recipe, model_dir: Path, start_from: Path | None) -> None:
        train, asked = recipe.train, needs(recipe)
        self._objective = train.objective.settings()
        # Between steps the other ranks wait for rank 0, and rank 0 waits for agents.
        self._control = dist.new_group(timeout=WAIT_FOR_ROLLOUTS)
        self.policy: Policy = load_policy(
            model_dir, recipe.model.dtype, train.lora, seed=recipe.seed, start_from=start_from
        )
        self._reference = trained_tensors(self.policy) if asked.reference else None
        config = OptimiserConfig(weight_decay=train.weight_decay, gradient_clipping=train.gradient_clipping)
        self._engine = TrainEngine(self.policy, recipe.model.dtype, config)
        self._critic: CriticOptimiser | None = None
        self._critic_rate = self._value_coefficient = 0.0
        if (wanted := needed_critic(recipe)) is not None:
            critic = Critic(self.policy.causal_lm.config.hidden_size, wanted.hidden, seed=recipe.seed)
            self._critic = CriticOptimiser(critic, config)
            self._critic_rate = wanted.learning_rate / train.learning_rate
            self._value_coefficient = wanted.coefficient

    def step(self, shares: Sequence[Sequence[Row]], learning_rate: float) -> dict[str, float]:
        """One update; `shares` are the rows of each rank. Returns sums over all terms (see `row_loss`), the policy's
        `gradient_norm`, and the critic's own as `critic_gradient_norm` if there is one; both are before clipping."""
        self._tell("step", shares, learning_rate)
        rows = shares[dist.get_rank()]
        sums = self._engine.step(rows, self._row_loss, learning_rate)
        if self._critic and rows:
            sums["critic_gradient_norm"] = self._critic.step(learning_rate * self._critic_rate)
        return sums

    def score(self, shares: Sequence[Sequence[Row]], *, reference: bool) -> dict[str, CallScores]:
        """By call id: what the policy, the critic if there is one, and with `reference` the reference policy say about the rows'
        tokens, by the forward pass that training uses. `shares` are the rows of each rank; every rank returns the scores of all.

        Raises ValueError if there is no reference policy.
        """
        if reference and self._reference is None:
            raise ValueError("the recipe's objective has no KL penalty: no reference policy is kept")
        self._tell("score", shares, reference=reference)
        kept = self._reference if reference else None
        own = [row_scores(self.policy, self._head, kept, row) for row in shares[dist.get_rank()] if row.nodes]
        everyone: list[list[dict[str, CallScores]]] = [own] * dist.get_world_size()
        if dist.get_world_size() > 1:
            dist.all_gather_object(everyone, own)
        return {call_id: scores for part in everyone for row in part for call_id, scores in row.items()}

    def save(self, directory: Path, state: checkpoint.TrainState, keep: int) -> None:
        self._tell("save", directory, state, keep)
        checkpoint.save_checkpoint(self._engine, directory, state, keep=keep, critic=self._critic)

    def load(self, path: Path) -> None:
        self._tell("load", path)
        checkpoint.load_checkpoint(self._engine, path, critic=self._critic)

    def stop(self) -> None:
        """The last call: the other ranks leave their loop."""
        self._tell("stop")
        self._engine.close()

    def _tell(self, method: str, *arguments: Any, **keywords: Any) -> None:
        if dist.get_world_size() > 1 and dist.get_rank() == 0:
            dist.broadcast_object_list([(method, arguments, keywords)], src=0, group=self._control)

    def follow(self) -> None:
        """The life of a rank other than 0: do what rank 0 does."""
        while True:
            told: list[Any] = [None]
            dist.broadcast_object_list(told, src=0, group=self._control)
            method, arguments, keywords = told[0]
            getattr(self, method)(*arguments, **keywords)
            if method == "stop":
                return

    @property
    def _head(self) -> Critic | None:
        return self._critic.critic if self._critic else None

    def _row_loss(self, module: nn.Module, row: Row) -> tuple[Tensor, dict[str, float]]:
        scores: RowScores = module(**row_tensors(row), critic=self._head)
        return row_loss(scores, row, self._objective, self._value_coefficient)


def row_loss(
    scores: RowScores, row: Row, settings: Settings, value_coefficient: float = 0.0
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a row's terms: the objective's, and `value_coefficient` times the critic's if there is one. And sums over the
    terms: those of `objective_loss` and `critic.value_loss`, with

    - `loss`: the objective's alone; `entropy`;
    - `gap`: |log π − log μ| over the correctable tokens;
    - `agent_tokens/NAME`, `agent_entropy/NAME`: the tokens of an agent's calls, and their entropy;
    - `version_tokens/V`, `version_gap/V`: the correctable tokens that policy version V drew, and their gap.
    """
    if not row.nodes:
        return scores.logprobs.sum(), {}
    behaviour, correctable = torch.tensor(row.behaviour), torch.tensor(row.correctable)
    detached = scores.logprobs.detach()
    result = objective_loss(
        TokenBatch(
            logprobs=scores.logprobs,
            entropies=scores.entropies,
            old=torch.tensor(row.old) if row.old else detached,
            behaviour=behaviour,
            advantages=torch.tensor(row.advantages),
            weights=torch.tensor(row.weights),
            sequences=torch.tensor(row.sequences),
            correctable=correctable,
            reference=torch.tensor(row.reference) if row.reference else None,
        ),
        settings,
    )
    loss = result.loss
    sums = {name: float(value) for name, value in result.metrics.items()}
    sums["loss"] = float(loss.detach())
    if scores.values is not None:
        zeros = [0.0] * len(row.nodes)
        targets, weights = torch.tensor(row.value_targets or zeros), torch.tensor(row.value_weights or zeros)
        value, value_sums = value_loss(scores.values, targets, weights)
        loss = loss + value_coefficient * value
        sums |= value_sums
    gaps = (detached - behaviour).abs().where(correctable, 0.0)
    return loss, sums | _shares(row, scores.entropies.tolist(), gaps.tolist())


def _shares(row: Row, entropies: Sequence[float], gaps: Sequence[float]) -> dict[str, float]:
    """Entropy and gap in all, and who has which share of them."""
    sums: dict[str, float] = defaultdict(float, entropy=sum(entropies), gap=sum(gaps))
    for sequence, entropy in zip(row.sequences, entropies, strict=True):
        agent = row.agents[sequence]
        sums[f"agent_tokens/{agent}"] += 1
        sums[f"agent_entropy/{agent}"] += entropy
    for version, correctable, gap in zip(row.versions, row.correctable, gaps, strict=True):
        if correctable:
            sums[f"version_tokens/{version}"] += 1
            sums[f"version_gap/{version}"] += gap
    return dict(sums)


@torch.no_grad()
def row_scores(
    policy: Policy, critic: Critic | None, reference: dict[str, Tensor] | None, row: Row
) -> dict[str, CallScores]:
    """By call id. `reference` holds the policy's trained tensors as they were."""
    policy.eval()
    tensors = row_tensors(row)
    scores: RowScores = policy(**tensors, critic=critic)
    columns = {"old": scores.logprobs.tolist()}
    if scores.values is not None:
        columns["values"] = scores.values.tolist()
    if reference is not None:
        columns["reference"] = functional_call(policy, reference, (), tensors).logprobs.tolist()
    by_call: dict[str, dict[str, list[float]]] = {call_id: {name: [] for name in columns} for call_id in row.calls}
    for name, values in columns.items():
        for sequence, value in zip(row.sequences, values, strict=True):
            by_call[row.calls[sequence]][name].append(value)
    return {call_id: CallScores(**lists) for call_id, lists in by_call.items()}


def learning_rate(train: Train, step: int) -> float:
    """Of step 0, 1, …: a pure function, so that a resumed run needs no scheduler state."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / (train.warmup_steps + 1)
    if train.lr_schedule == "linear":
        return train.learning_rate * (train.steps - step) / (train.steps - train.warmup_steps)
    return train.learning_rate
