"""GRPO: advantages relative to the group, a clipped ratio, no critic and no reference model.

    A = (R − mean of the group) / (std of the group + 1e-4)
    loss = Σ w · c · −min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A),  with w = 1 / (rollouts · tokens of the rollout)

DeepSeekMath, arXiv 2402.03300, equation 3. Its 1/|o_i| weighs each output the same; an output is a rollout here, of one call or of
many. As the field has come to run it: without the KL penalty, and with clip-higher (ε_high > ε_low: DAPO, arXiv 2503.14476).
"""

from __future__ import annotations

from lightning_rl.algorithms.settings import AdvantageSettings, Settings

SETTINGS = Settings(name="grpo", advantage=AdvantageSettings(normalise="std"), aggregation="rollout")
