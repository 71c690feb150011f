"""The sections of a recipe about learning: sampling, the warm start, the objective, the step, evaluation, publishing."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from msgspec import structs
from pydantic import Field, model_validator

from lightning_rl.algorithms import settings
from lightning_rl.algorithms.correction import correction
from lightning_rl.algorithms.settings import (
    Aggregation,
    BaselineKind,
    Batch,
    CorrectionKind,
    KlEstimator,
    KlPlace,
    Level,
    Normalise,
    Settings,
    settings_of,
)
from lightning_rl.credit import WITH_CRITIC, parameters, rule_function
from lightning_rl.recipe.fields import Count, CreditName, FieldError, ObjectiveName, Section
from lightning_rl.recipe.functions import did_you_mean


class SamplingSection(Section):
    """How the policy is sampled in training. Evaluation is greedy."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Imposed on every call, whatever the agent asks for."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Imposed on every call. Below 1, log-probs are those of the distribution that was sampled from."""
    max_tokens: Count = 256
    """Bound on the sampled tokens of a call; an agent may ask for fewer."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    """How many of the likeliest tokens to record beside each sampled one, in evaluation too; an agent gets none that it did not
    ask for. On a CPU any number but 0 makes a pass of 64 sequences about a quarter slower."""


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


class Kl(Section):
    """A penalty for leaving the policy that the reinforcement learning starts from."""

    coefficient: Annotated[float, Field(ge=0)]
    """What a nat of divergence costs; 0 turns the penalty off, and no reference policy is kept."""
    estimator: KlEstimator | None = None
    """With d = log π - log π_ref: `k1` d, `k2` d²/2, `k3` exp(-d) + d - 1. null: the objective's own, `k3` if it has no penalty."""
    place: KlPlace | None = None
    """`loss`: added to each token's loss. `reward`: taken from the reward of the call, and so from what its advantage is computed
    from. `token_reward`: taken from the rewards of the tokens (REINFORCE++), each of which counts for those up to it; not for rules
    that read a critic. null: the objective's own, `loss` if it has no penalty."""

    def settings(self, own: settings.Kl | None) -> settings.Kl | None:
        """`own`: the objective's."""
        if not self.coefficient:
            return None
        estimator = self.estimator or (own.estimator if own else "k3")
        place = self.place or (own.place if own else "loss")
        return settings.Kl(estimator=estimator, place=place, coefficient=self.coefficient)


class Correction(Section):
    """What is done about tokens that trainer and server find unequally likely: w = π_old / μ, of a token or a call."""

    kind: CorrectionKind
    """`none`. `truncate`: min(w, high) (TIS). `mask`: w where w ≤ high, else 0. `icepop`: w where low ≤ w ≤ high, else 0.
    `sequence_mask`: the token's w in calls whose geometric mean of w is from low to high, else 0. `decoupled`: w as it is, with
    the ratio clipped around π_old (decoupled PPO)."""
    level: Level | None = None
    """Whether w is the token's own, or the product over its call. null: the token's."""
    low: Annotated[float, Field(ge=0)] | None = None
    """Lower bound of w; null: the kind's own (`icepop` 0.5, `sequence_mask` 0.5)."""
    high: Annotated[float, Field(gt=0)] | None = None
    """Upper bound of w; null: the kind's own (`truncate` 2, `mask` 2, `icepop` 5, `sequence_mask` 2)."""

    @model_validator(mode="after")
    def _bounds_hold_something(self) -> Self:
        for name in ("level", "low", "high"):
            if self.kind == "none" and getattr(self, name) is not None:
                raise FieldError((name,), "has no effect: nothing is corrected with kind none")
        resolved = correction(**self.model_dump(exclude_none=True))
        if resolved.low > resolved.high:
            raise FieldError(
                ("low",), f"no w is from {resolved.low:g} to {resolved.high:g}: low must not be above high"
            )
        return self


class Overlong(Section):
    """A soft punishment of calls that come near the limit of their length (DAPO)."""

    penalty: Annotated[float, Field(ge=0)]
    """What a call that reaches `sampling.max_tokens` loses; 0 turns it off."""
    buffer: Annotated[float, Field(gt=0, le=1)] | None = None
    """The share of `sampling.max_tokens` before it, in which the punishment grows from 0. null: the objective's own, 0.2 if it has
    none."""

    def settings(self, own: settings.Overlong | None) -> settings.Overlong | None:
        """`own`: the objective's."""
        if not self.penalty:
            return None
        return settings.Overlong(buffer=self.buffer or (own.buffer if own else 0.2), penalty=self.penalty)


class Objective(Section):
    """What is minimised. A name alone is a complete setting (`objective: dapo`), and each field changes one part of it; null is the
    objective's own. `lrl train recipe.yaml --dry-run` prints the formula that comes of it. `tis_cap: x` of older
    recipes is read as `correction: {kind: truncate, high: x}`, and null as `{kind: none}`."""

    name: ObjectiveName = "grpo"
    """One of the objectives of docs/credit.md."""
    baseline: BaselineKind | None = None
    """What is taken from a value: the mean of the rollouts it is compared with (`group_mean`), the mean of the others
    (`leave_one_out`), or nothing (`none`)."""
    normalise: Normalise | None = None
    """What the difference is divided by: the standard deviation over those rollouts (`std`), or nothing (`none`)."""
    batch: Batch | None = None
    """What is then done over the step: nothing (`none`), the mean over its rollouts taken away (`mean`), or the mean over its
    tokens taken away and the difference divided by their standard deviation (`std`)."""
    aggregation: Aggregation | None = None
    """What weighs the same in the step's mean: each token, each call (`sequence`), each rollout (`rollout`), or each token by a
    constant (`fixed`: the sum over tokens, divided by the number of calls and by `sampling.max_tokens`). Under all but `rollout`, a
    rollout of more calls weighs more."""
    ratio: Level | None = None
    """Whose ratio is clipped: the token's, or the geometric mean over its call (`sequence`)."""
    old: Literal["trainer", "server"] | None = None
    """What the ratio is to: the trainer's policy before the step, or the policy as the server sampled."""
    clip_low: Annotated[float, Field(ge=0)] | None = None
    """The ratio is clipped below 1 - clip_low. `dppo`: the largest fall of a token's probability."""
    clip_high: Annotated[float, Field(ge=0)] | None = None
    """The ratio is clipped above 1 + clip_high. `dppo`: the largest rise of a token's probability."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Where the advantage is negative, a token's loss is at most so many times its size."""
    entropy_bonus: Annotated[float, Field(ge=0)] | None = None
    """What a nat of entropy is worth."""
    kl: Kl | None = None
    correction: Correction | None = None
    overlong: Overlong | None = None
    dynamic_sampling: Annotated[int, Field(ge=0)] | None = None
    """How many times a step may go for more tasks, as many as it lacks groups with signal."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _each_field_turns_something(self) -> Self:
        resolved = self.settings()
        idle = {
            "ratio": self.ratio == "sequence" and resolved.surrogate in ("reinforce", "dppo"),
            "old": self.old == "server" and resolved.surrogate == "reinforce",
            "clip_low": resolved.surrogate == "reinforce",
            "clip_high": resolved.surrogate == "reinforce",
            "dual_clip": resolved.surrogate != "clip",
        }
        for name, is_idle in idle.items():
            if is_idle and getattr(self, name) is not None:
                raise FieldError((name,), f"has no effect: {self.name} has no ratio that is clipped so")
        if resolved.old == "server" and self.correction is not None and self.correction.kind != "none":
            raise FieldError(
                ("correction",), "has no effect: with `old: server` the ratio itself corrects for the server"
            )
        if resolved.kl is not None and (resolved.kl.place, resolved.kl.estimator) == ("loss", "k1"):
            raise FieldError(
                ("kl", "estimator"),
                "k1 in the loss has no gradient on average: use k2 or k3, or place it in the reward",
            )
        return self

    def settings(self) -> Settings:
        """With all that the name says."""
        own = settings_of(self.name)
        advantage = structs.replace(own.advantage, **_given(self, "baseline", "normalise", "batch"))
        parts: dict[str, Any] = {"advantage": advantage}
        parts |= _given(self, "aggregation", "ratio", "old", "clip_low", "clip_high", "dual_clip", "dynamic_sampling")
        if self.entropy_bonus is not None:
            parts["entropy"] = self.entropy_bonus
        if self.kl is not None:
            parts["kl"] = self.kl.settings(own.kl)
        if self.overlong is not None:
            parts["overlong"] = self.overlong.settings(own.overlong)
        if self.correction is not None:
            parts["correction"] = correction(**self.correction.model_dump(exclude_none=True))
        elif own.old == "server" and self.old == "trainer":  # then there is something to correct
            parts["correction"] = settings.Settings(name=self.name).correction
        return structs.replace(own, **parts)


def _given(section: Section, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(section, name)) is not None}


SHARES = ("discount", "lam")
"""Parameters of rules that are from 0 to 1."""


class Credit(Section):
    """How a rollout's rewards are assigned to its calls. `credit: gigpo` is short for a section with that rule alone."""

    rule: CreditName = "equal"
    """One of the rules of docs/credit.md, or your own: `file.py:function` or `package.module:function`."""
    arguments: dict[str, Any] = {}
    """Parameters of the rule, by name; docs/credit.md has those of each."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"rule": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _takes_them(self) -> Self:
        if ":" in self.rule:
            return self
        takes = parameters(rule_function(self.rule))
        for name, value in self.arguments.items():
            if name not in takes:
                known = f"it takes {', '.join(takes)}" if takes else "it takes none"
                raise FieldError(
                    ("arguments", name), f"{self.rule} has no such parameter: {known}{did_you_mean(name, [*takes])}"
                )
            expected = (int, float) if isinstance(takes[name], float) else type(takes[name])
            if not isinstance(value, expected) or (isinstance(value, bool) and not isinstance(takes[name], bool)):
                raise FieldError(("arguments", name), f"must be like {takes[name]!r}, not {value!r}")
            if not math.isfinite(value):
                raise FieldError(("arguments", name), f"must be a finite number, not {value!r}")
            if name in SHARES and not 0 <= value <= 1:
                raise FieldError(("arguments", name), f"must be from 0 to 1, not {value!r}")
        return self


class Critic(Section):
    """The head that learns what a state is worth, for the rules that read one (`turn_gae`, and `token_gae`, which is `ppo`'s own).
    It reads the policy's last hidden states, and its gradient ends there."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """AdamW's learning rate of the head, at its peak: it follows `train.warmup_steps` and `train.lr_schedule`, and
    `train.weight_decay` holds for the head, too."""
    hidden: Count = 128
    """Width of its one hidden layer."""
    coefficient: Annotated[float, Field(gt=0)] = 0.5
    """Weight of the squared error in the loss."""


class Train(Section):
    """The reinforcement learning."""

    steps: Count
    """In each, new episodes are run and trained on, in `minibatches` times `epochs` optimiser steps, and the new policy is
    published."""
    tasks_per_step: Count = 8
    """Tasks a step."""
    samples_per_task: Count = 8
    """Episodes of each task: the group that a return is compared within. At least 2 where the objective has a baseline or
    dynamic sampling; `tree` may compare branches inside one episode."""
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
    credit: Credit | None = None
    """null: the objective's own, `equal` for most: each call gets the whole return."""
    objective: Objective = Objective()
    critic: Critic | None = None
    """null: one as by default, where the credit rule reads it. A rule of your own reads one if this section is given: what the rule
    says in `value_targets` is what it learns."""
    minibatches: Count = 1
    """Optimiser steps that a step's rollouts are cut into, whole groups each. With more than one, the trainer scores all of them
    first: that policy is π_old."""
    epochs: Count = 1
    """How often a step's rollouts are trained on."""
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    """Calls with a token of a policy that is more versions older than the trainer's are not trained on; null: all are. `lrl train`
    plays each step with the trainer's own policy, and masks none; it matters where `lrl traces replay` finds a step whose calls are
    of several policies, the newest of which then stands for the trainer's."""
    restricted: Literal["train", "mask"] = "train"
    """Calls whose sampling was restricted by the agent (a grammar, top_p or top_k, penalties, biases): trained on with the full
    distribution's log-probs and without correction, or masked."""
    world_size: Count = 1
    """Trainer processes."""
    max_row_tokens: Count = 4096
    """Tokens that are computed at once in a micro-batch. What a call sampled beyond it is not trained on."""
    gradient_clipping: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the policy's gradient, and of the critic's, each on its own."""
    checkpoint_every: Count = 1
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """How many of the latest checkpoints are kept."""

    @model_validator(mode="after")
    def _credit_and_objective_fit(self) -> Self:
        rule, objective = self.rule, self.objective
        if rule in WITH_CRITIC:
            for name in ("baseline", "normalise"):
                if getattr(objective, name) is not None:
                    raise FieldError(
                        ("objective", name),
                        f"has no effect: the advantages of {rule} are the critic's, without a group; set it to null",
                    )
        if rule in WITH_CRITIC or self.critic is not None:
            kl = objective.settings().kl
            if kl is not None and kl.place == "token_reward":
                raise FieldError(
                    ("objective", "kl", "place") if objective.kl else ("objective",),
                    f"token_reward is not seen by {rule}, nor by the critic's targets: use `kl: {{coefficient: "
                    f"{kl.coefficient:g}, place: reward}}`",
                )
        if self.critic is not None and rule not in WITH_CRITIC and ":" not in rule:
            raise FieldError(("critic",), f"has no effect: {rule} reads no critic and says nothing that it could learn")
        if self.samples_per_task == 1:
            self._require_no_company(rule, objective.settings())
        if rule == "tree" and objective.baseline is not None:
            raise FieldError(("objective", "baseline"), "has no effect: tree takes its own baseline (`leave_one_out`)")
        return self

    def _require_no_company(self, rule: str, objective: Settings) -> None:
        if rule not in WITH_CRITIC and rule != "tree" and objective.advantage.baseline != "none":
            raise FieldError(
                ("samples_per_task",),
                f"{objective.name}, baseline {objective.advantage.baseline}, compares the episodes of a task, and one is alone: "
                "make it 2 or more, or take objective reinforce, reinforce++ or ppo, which need no company",
            )
        if objective.dynamic_sampling:
            raise FieldError(
                ("samples_per_task",),
                "dynamic_sampling looks for tasks whose episodes differ, and one is alone: make it 2 or more, or that 0",
            )

    @property
    def rule(self) -> str:
        """The credit rule: the section's, or the objective's own."""
        return self.credit.rule if self.credit else self.objective.settings().credit


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
