"""PPO: advantages from a critic, a ratio that is clipped where clipping lowers what the objective promises.

    A = GAE(rewards, values)          (the credit rule `token_gae`)
    A ← (A − mean over the step's tokens) / sqrt(variance + 1e-8), over the step's tokens
    loss = Σ w · c · −min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A)

Schulman et al., arXiv 1707.06347, equation 7; GAE: arXiv 1506.02438. ε = 0.2. The critic has a loss of its own (`train.critic`).
Left out: the KL penalty and the entropy bonus. `kl: {place: reward, estimator: k1, …}` puts the penalty back, into the rewards that
GAE and the critic's targets are made of; a call's penalty comes at its last token there, not at each token.
`dual_clip` (arXiv 1912.09729, equation 5) bounds the loss of a token with A < 0 by dual_clip · |A|.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rl.algorithms.settings import AdvantageSettings, Settings

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS = Settings(
    name="ppo",
    credit="token_gae",
    advantage=AdvantageSettings(baseline="none", batch="std"),
    clip_high=0.2,
)


def surrogate(ratio: Tensor, advantages: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The loss of each token, and whether it was clipped: it has no gradient then; [L] each."""
    low, high = 1 - settings.clip_low, 1 + settings.clip_high
    objective = (ratio * advantages).minimum(ratio.clamp(low, high) * advantages)
    clipped = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
    if settings.dual_clip is not None:
        floor = settings.dual_clip * advantages
        beyond = (advantages < 0) & (objective < floor)
        objective, clipped = floor.where(beyond, objective), clipped | beyond
    return -objective, clipped
