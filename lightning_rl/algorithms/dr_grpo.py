"""Dr. GRPO: GRPO without its two biases.

    A = R − mean of the group
    loss = Σ w · c · −min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A),  with w = 1 / (calls · longest call)

Liu et al., arXiv 2503.20783. Without the standard deviation, tasks that nearly always or nearly never succeed are not favoured;
with a constant in place of the call's length, long failures are not pushed less than short ones. The constant is
`sampling.max_tokens`.
"""

from __future__ import annotations

from lightning_rl.algorithms.settings import Settings

SETTINGS = Settings(name="dr_grpo", clip_high=0.2, aggregation="fixed")
