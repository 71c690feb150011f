"""REINFORCE++ with a baseline: the group's mean is taken away, and the scale is that of the whole step.

    A = R − mean of the group
    A ← (A − mean over the step's tokens) / sqrt(variance + 1e-8), over the step's tokens
    loss = Σ w · (c · −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) + β · k2(π, π_ref))

Hu et al., arXiv 2501.03262. One scale for all groups does not favour groups whose rewards differ little. The KL penalty is in the
loss, as k2, whose gradient is that of the divergence; β = 0.001 and ε = 0.2 as in OpenRLHF.
"""

from __future__ import annotations

from lightning_rl.algorithms.settings import AdvantageSettings, Kl, Settings

SETTINGS = Settings(
    name="reinforce++_baseline",
    advantage=AdvantageSettings(batch="std"),
    clip_high=0.2,
    kl=Kl(estimator="k2", place="loss", coefficient=0.001),
)
