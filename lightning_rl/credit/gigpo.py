"""GiGPO: rollouts are compared with rollouts, and calls with calls that were made before the same observation.

Group-in-group policy optimisation (arXiv 2505.10978; G_k is its equation 5, A^S its equation 7):

    A = A^E + ω A^S,    A^E = (R − R̄) / s,    A^S = (G_k − Ḡ) / s of the anchor group.

G_k is the discounted return from the call on (`return_to_go`), and an anchor group the calls of the group, of agents of one name,
that saw the same: what the prompt adds to the learner's call that it extends, to the token, or the whole prompt if there is none.
Observations that differ in a single token, by a clock or a counter, are not the same. Which baseline, and whether there is a
scale s, is the objective's.

An anchor group has one point for each rollout, the mean over its visits; the paper counts every visit. A rollout that sees the
same thing again and again does so not weigh more, and one that is alone with it has no A^S, as in the paper one visit has none.
Choices of one request are taken in their order, as if one had been made after the other.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from lightning_rl.credit.records import GROUP, Credits, Rollout, Scope, Term
from lightning_rl.credit.return_to_go import rewards_to_go
from lightning_rl.episode import Call


def gigpo(group: Sequence[Rollout], *, discount: float = 0.95, weight: float = 1.0) -> Credits:
    """`discount`: γ from call to call, in G_k alone; `weight`: ω. `returns` are R + ω G_k."""
    made = [rollout for rollout in group if rollout.calls]
    return_of = {rollout.id: rollout.ret for rollout in made}
    visits: dict[Scope, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    returns: dict[str, float] = {}
    terms: dict[str, list[Term]] = {}
    for rollout in made:
        known = {call.id: call for call in rollout.calls}
        for call, to_go in zip(rollout.calls, rewards_to_go(rollout, discount), strict=True):
            anchor: Scope = ("anchor", rollout.agents[call.id], _digest(_observation(call, known)))
            visits[anchor][rollout.id].append(to_go)
            returns[call.id] = return_of[rollout.id] + weight * to_go
            terms[call.id] = [
                Term(value=return_of[rollout.id], scope=GROUP),
                Term(value=to_go, scope=anchor, weight=weight),
            ]
    scopes: dict[Scope, dict[str, float]] = {GROUP: return_of}
    for anchor, visited in visits.items():
        scopes[anchor] = {id: math.fsum(values) / len(values) for id, values in visited.items()}
    return Credits(returns=returns, terms=terms, scopes=scopes)


def _observation(call: Call, known: Mapping[str, Call]) -> Sequence[int]:
    base = known.get(call.parent_id) if call.parent_id is not None else None
    if base is None:
        return call.prompt_ids
    return call.prompt_ids[len(base.prompt_ids) + len(base.sampled_ids) :]


def _digest(ids: Sequence[int]) -> str:
    return blake2b(array("q", ids).tobytes(), digest_size=16).hexdigest()
