"""LightningRL's equal assignment: every call of a rollout gets the whole return.

The credit assignment of LightningRL (Agent Lightning, arXiv 2508.03680): the return R is assigned to the calls alike,
and a single-turn objective then spreads it over the tokens of each. Rewards that were given on the way, at a call or a
span, are part of R.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rl.credit.records import Credits, Rollout, compared_in_group


def equal(group: Sequence[Rollout]) -> Credits:
    return_of = {rollout.id: rollout.ret for rollout in group}
    return compared_in_group(group, {call.id: return_of[rollout.id] for rollout in group for call in rollout.calls})
