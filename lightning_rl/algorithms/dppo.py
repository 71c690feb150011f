"""DPPO: the trust region is of probabilities, not of ratios, and around the policy that sampled.

    ρ = π / μ
    A = R − mean of the group
    loss = −Σ w · keep · ρ · A,  with keep = 0 where A > 0 and π − μ > δ_high, or A < 0 and π − μ < −δ_low, else 1

Qi et al., arXiv 2602.04879, in its binary form of the total variation, |π − μ| of the sampled token; prime-rl's default loss is of
that form. A ratio says little of rare tokens, which double by chance, and lets likely ones move far. δ_low and δ_high are
`clip_low` and `clip_high`, 0.2 as in prime-rl. Since ρ is to μ itself, nothing is corrected; with `old: trainer`
the correction is that of the other objectives. Left out: prime-rl's penalty
log²(π/μ), and verl's cap of 20 on ρ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rl.algorithms.settings import Correction, Settings

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS = Settings(
    name="dppo",
    surrogate="dppo",
    old="server",
    clip_high=0.2,
    correction=Correction(kind="none"),
)


def surrogate(
    logprobs: Tensor, old: Tensor, ratio: Tensor, advantages: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The loss of each token, and whether it was left out: it has no gradient then; [L] each. `old`: what the ratio is to."""
    rise = logprobs.detach().exp() - old.exp()
    left_out = ((advantages > 0) & (rise > settings.clip_high)) | ((advantages < 0) & (rise < -settings.clip_low))
    return (-ratio * advantages).where(~left_out, 0.0), left_out
