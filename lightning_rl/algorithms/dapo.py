"""DAPO: GRPO with four changes for long calls.

    A = (R − mean of the group) / (std of the group + 1e-4)
    loss = Σ w · c · −min(ρ A, clip(ρ, 1 − 0.2, 1 + 0.28) A),  with w = 1 / (all tokens of the step)

Yu et al., arXiv 2503.14476: clip-higher; the mean over tokens; dynamic sampling, which goes for more tasks while groups have no
signal (three times at most; the paper names no bound); and a soft punishment of calls in the last fifth of their permitted length,
up to 1. No KL penalty.
"""

from __future__ import annotations

from lightning_rl.algorithms.settings import AdvantageSettings, Overlong, Settings

SETTINGS = Settings(
    name="dapo",
    advantage=AdvantageSettings(normalise="std"),
    overlong=Overlong(buffer=0.2, penalty=1.0),
    dynamic_sampling=3,
)
