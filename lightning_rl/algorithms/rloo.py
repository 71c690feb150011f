"""RLOO: REINFORCE with the mean of the other rollouts of the group as the baseline, which leaves the gradient unbiased.

    A_i = R_i − mean of R_j over j ≠ i  =  G / (G − 1) · (R_i − mean of the group)
    loss = −Σ w · c · A · log π

Ahmadian et al., arXiv 2402.14740. The whole call is one action, so that a call weighs as its sum over tokens (`fixed`), not as
their mean. Left out: the KL penalty in the reward (`kl: {place: reward, estimator: k1, …}` puts it back), and the ratio clipped
per call that TRL adds for several updates a step.
"""

from __future__ import annotations

from lightning_rl.algorithms.settings import AdvantageSettings, Settings

SETTINGS = Settings(
    name="rloo",
    advantage=AdvantageSettings(baseline="leave_one_out"),
    surrogate="reinforce",
    aggregation="fixed",
)
