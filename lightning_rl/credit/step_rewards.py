"""Each call keeps what it earned, and an equal share of the outcome.

With r_k what call k earned, O the rest of the rollout's reward and K the number of its calls, the call gets

    R_k = r_k + O / K,        so that Σ_k R_k = R.

Both parts are compared with what they stand beside: r_k with what the group's rollouts earned at their k-th call (0 where
they had ended), and O with their outcomes:

    A_k = (r_k − r̄_k) / s_k + (O − Ō) / (K s_O).

A share, and not the whole outcome, for each call: a rollout moves the policy by its outcome once, however many calls it made.
Where the objective divides by s, rewards of any size at the calls count K times as much as the outcome's share: rewards that are
noise drown it. Choices of one request (n > 1) count as calls one after the other, in order of arrival.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rl.credit.records import OUTCOME, Credits, Rollout, Scope, Term


def step_rewards(group: Sequence[Rollout]) -> Credits:
    made = [rollout for rollout in group if rollout.calls]
    longest = max((len(rollout.calls) for rollout in made), default=0)
    scopes: dict[Scope, dict[str, float]] = {OUTCOME: {rollout.id: rollout.outcome for rollout in made}}
    for k in range(longest):
        scopes["call", k] = {rollout.id: rollout.earned_at(k) for rollout in made}
    returns, terms = {}, {}
    for rollout in made:
        share = 1 / len(rollout.calls)
        for k, call in enumerate(rollout.calls):
            returns[call.id] = rollout.earned_at(k) + rollout.outcome * share
            terms[call.id] = [
                Term(value=rollout.earned_at(k), scope=("call", k)),
                Term(value=rollout.outcome, scope=OUTCOME, weight=share),
            ]
    return Credits(returns=returns, terms=terms, scopes=scopes)
