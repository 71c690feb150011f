"""The sections of a recipe about learning: sampling, the warm start, the objective, the step, evaluation, publishing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lightning_rl.recipe.fields import Count, CreditName, Section


class SamplingSection(Section):
    """How the policy is sampled in training. Evaluation is greedy."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Imposed on every call, whatever the agent asks for."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Imposed on every call. Below 1, log-probs are those of the distribution that was sampled from."""
    max_tokens: Count = 256
    """Bound on the sampled tokens of a call; an agent may ask for fewer."""


class WarmStart(Section):
    """Supervised fine-tuning on the split `warm_start`, before the reinforcement learning."""

    steps: Count
    """Optimiser steps."""
    batch_size: Count = 16
    """Demonstrations a step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak of the learning rate."""


class LoraConfig(Section):
    """A low-rank adapter on the linear layers; the rest of the model is frozen."""

    rank: Count = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""


class Objective(Section):
    """What is minimised."""

    name: Literal["grpo"] = "grpo"
    """`grpo`: group-relative advantages and a clipped probability ratio."""
    normalise: Literal["std", "none"] = "std"
    """What advantages are divided by: the standard deviation of the group's returns (GRPO), or nothing (Dr. GRPO)."""
    aggregation: Literal["token", "sequence", "rollout"] = "token"
    """What weighs the same in the step's mean: each token, each call, or each rollout."""
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: Annotated[float, Field(ge=0)] = 0.28
    """The ratio is clipped above 1 + clip_high."""
    tis_cap: Annotated[float, Field(gt=0)] | None = 2.0
    """Cap of the importance weight that corrects for the difference between trainer and server (truncated importance
    sampling); null turns the correction off."""


class Train(Section):
    """The reinforcement learning."""

    steps: Count
    """Optimiser steps. In each, new episodes are run, trained on once, and the new policy is published."""
    tasks_per_step: Count = 8
    """Tasks a step."""
    samples_per_task: Annotated[int, Field(ge=2)] = 8
    """Episodes of each task: the group that a return is compared within."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """AdamW's learning rate, at its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """How the learning rate goes on after the warm-up: as it is, or linearly towards 0 at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate rises linearly to its peak."""
    lora: LoraConfig | None = LoraConfig()
    """null trains all weights."""
    credit: CreditName = "equal"
    """How an episode's rewards are assigned to its calls. `equal`: each call gets the whole return."""
    objective: Objective = Objective()
    world_size: Count = 1
    """Trainer processes."""
    max_row_tokens: Count = 4096
    """Tokens that are computed at once in a micro-batch. What a call sampled beyond it is not trained on."""
    gradient_clipping: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    checkpoint_every: Count = 1
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """How many of the latest checkpoints are kept."""


class Evaluate(Section):
    """Greedy evaluation on the split `eval`: of the base model, after the warm start, and at the end."""

    tasks: Count = 64
    """Number of tasks."""
    every: Count | None = None
    """Evaluate every so many steps as well; null does not."""
    success: str | None = None
    """Name of the reward that says whether a task was solved. null: the first in `reward.weights`; without weights and reward
    function `return`, the number that the agent returns."""


class Publish(Section):
    """Handing a new policy to the server, and checking that both sides agree on it."""

    max_logprob_gap: Annotated[float, Field(gt=0)] | None = None
    """Largest mean absolute difference between trainer's and server's log-probs of the same tokens; the run stops above
    it. null: 0.001 for float32, 0.15 for bfloat16."""
