"""The whole return to the last call: the one that ended the rollout is taken to have decided it.

    R_K = R,    R_k = 0 for k < K,    so that Σ_k R_k = R.

The earlier calls get no credit at all, neither praise nor blame (`Mask.NO_CREDIT`). It is the right rule for an agent whose
earlier calls cannot matter, and the measure for all the others: what they gain over it, they gain by the earlier calls. The last
is the one that arrived last: of choices of one request (n > 1) the last choice alone, whichever the agent went on with.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rl.credit.records import GROUP, Credits, Rollout, Term


def final(group: Sequence[Rollout]) -> Credits:
    made = [rollout for rollout in group if rollout.calls]
    last = {rollout.calls[-1].id: rollout.ret for rollout in made}
    return Credits(
        returns={call.id: last.get(call.id, 0.0) for rollout in made for call in rollout.calls},
        terms={call_id: [Term(value=ret, scope=GROUP)] for call_id, ret in last.items()},
        scopes={GROUP: {rollout.id: rollout.ret for rollout in made}},
    )
