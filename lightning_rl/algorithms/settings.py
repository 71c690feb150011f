"""What an objective is made of, each part with one meaning.

With π the current policy, π_old the trainer's policy before the step, μ the policy as the server sampled from it, π_ref the
reference, and for each sampled token its advantage A and its weight w (`aggregation`):

    ρ = π / π_old                    the ratio, of a token or of a call (`ratio`)
    c = correction(π_old / μ)        held constant (`correction`)
    loss = Σ w · (c · surrogate(ρ, A) + β · kl(π, π_ref) − η · H(π))

An objective's file in this package has its `SETTINGS`, which are complete: a recipe names it and changes single parts.
"""

from __future__ import annotations

import importlib
from typing import Literal

from msgspec import Struct

BaselineKind = Literal["group_mean", "leave_one_out", "none"]
Normalise = Literal["std", "none"]
Batch = Literal["none", "mean", "std"]
Surrogate = Literal["reinforce", "clip", "cispo", "dppo"]
Level = Literal["token", "sequence"]
Aggregation = Literal["token", "sequence", "rollout", "fixed"]
KlEstimator = Literal["k1", "k2", "k3"]
KlPlace = Literal["loss", "reward", "token_reward"]
CorrectionKind = Literal["none", "truncate", "mask", "icepop", "sequence_mask", "decoupled"]


class AdvantageSettings(Struct, frozen=True, kw_only=True):
    """How much better than its company a return is: see `advantage`."""

    baseline: BaselineKind = "group_mean"
    """What is taken from a value: the mean of its scope's rollouts, the mean of the others, or nothing."""
    normalise: Normalise = "none"
    """What the difference is divided by: the unbiased standard deviation of the scope's rollouts + 1e-4, or 1."""
    batch: Batch = "none"
    """What is then done over the step: nothing; the mean over its rollouts taken away; or the mean over its tokens taken away, and
    the difference divided by their standard deviation."""


class Kl(Struct, frozen=True, kw_only=True):
    """A penalty for leaving the reference policy, the one that the reinforcement learning starts from: see `kl`."""

    estimator: KlEstimator
    place: KlPlace
    """In the loss; in the reward of the call, which then goes through credit and baseline; or in the rewards of the tokens, each of
    which lowers the advantages of the tokens up to it."""
    coefficient: float


class Correction(Struct, frozen=True, kw_only=True):
    """What is done about the difference between trainer and server, w = π_old / μ: see `correction`."""

    kind: CorrectionKind
    level: Level = "token"
    low: float = 0.0
    high: float = float("inf")


class Overlong(Struct, frozen=True, kw_only=True):
    """DAPO's soft punishment of calls that come near the limit of their length: see `shaping`."""

    buffer: float
    """The share of `sampling.max_tokens` in which the punishment grows from 0 to `penalty`."""
    penalty: float


class Settings(Struct, frozen=True, kw_only=True):
    """An objective, resolved."""

    name: str
    credit: str = "equal"
    """The credit rule where the recipe names none."""
    advantage: AdvantageSettings = AdvantageSettings()
    surrogate: Surrogate = "clip"
    ratio: Level = "token"
    """Whose ratio is clipped: the token's, or the geometric mean over its call (GSPO)."""
    old: Literal["trainer", "server"] = "trainer"
    """What stands below the ratio: π_old, or μ itself; then there is nothing to correct."""
    clip_low: float = 0.2
    """1 − clip_low is the ratio's lower bound; for `dppo` the largest fall of a token's probability."""
    clip_high: float = 0.28
    """1 + clip_high is the ratio's upper bound; for `dppo` the largest rise of a token's probability."""
    dual_clip: float | None = None
    """Where A < 0, the loss of a token is at most dual_clip · |A|; None: no such bound."""
    aggregation: Aggregation = "token"
    kl: Kl | None = None
    entropy: float = 0.0
    """η, what a nat of entropy is worth."""
    correction: Correction = Correction(kind="truncate", high=2.0)
    overlong: Overlong | None = None
    dynamic_sampling: int = 0
    """How many times a step may go for more tasks while groups have no signal."""

    @property
    def asks_everywhere(self) -> bool:
        """Whether tokens whose advantage is zero have a gradient, too."""
        return self.entropy != 0 or (self.kl is not None and self.kl.place == "loss")


OBJECTIVES = {
    "reinforce": "lightning_rl.algorithms.reinforce",
    "rloo": "lightning_rl.algorithms.rloo",
    "grpo": "lightning_rl.algorithms.grpo",
    "dr_grpo": "lightning_rl.algorithms.dr_grpo",
    "dapo": "lightning_rl.algorithms.dapo",
    "gspo": "lightning_rl.algorithms.gspo",
    "cispo": "lightning_rl.algorithms.cispo",
    "reinforce++": "lightning_rl.algorithms.reinforce_pp",
    "reinforce++_baseline": "lightning_rl.algorithms.reinforce_pp_baseline",
    "ppo": "lightning_rl.algorithms.ppo",
    "dppo": "lightning_rl.algorithms.dppo",
}
"""The module with `SETTINGS`, by the name that recipes use."""


def settings_of(name: str) -> Settings:
    """KeyError if there is no objective of that name (a recipe is checked before)."""
    settings: Settings = importlib.import_module(OBJECTIVES[name]).SETTINGS
    return settings
