"""REINFORCE++: PPO's clipping and token-wise KL penalty without a critic; advantages normalised over the whole step.

    A_t = R − β Σ_{i ≥ t} log(π_old / π_ref)_i
    A ← (A − mean over the step's tokens) / sqrt(variance + 1e-8), over the step's tokens      (`batch`)
    loss = Σ w · c · −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)

Hu et al., arXiv 2501.03262. It needs no groups. β = 0.01 and ε = 0.2 as in OpenRLHF. The mean over tokens is that of the step.
"""

from __future__ import annotations

from lightning_rl.algorithms.settings import AdvantageSettings, Kl, Settings

SETTINGS = Settings(
    name="reinforce++",
    advantage=AdvantageSettings(baseline="none", batch="std"),
    clip_high=0.2,
    kl=Kl(estimator="k1", place="token_reward", coefficient=0.01),
)
