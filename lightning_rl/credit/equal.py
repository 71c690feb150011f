"""LightningRL's equal assignment: every call of an episode gets the episode's whole return.

The credit assignment of LightningRL (Agent Lightning, arXiv 2508.03680): the return R is assigned to the calls alike,
and a single-turn objective then spreads it over the tokens of each. Rewards that were given on the way, at a call or a
span, are part of R.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_rl.credit.returns import episode_return
from lightning_rl.episode import Episode


def equal(episode: Episode, weights: Mapping[str, float]) -> dict[str, float]:
    value = episode_return(episode, weights)
    return {call.id: value for call in episode.calls}
