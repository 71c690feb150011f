"""Each call gets what was earned from it on: what came before it cannot be its doing.

    G_k = r_k + γ G_{k+1},    G_K = r_K + O,

with r_k what call k earned, K the number of calls, and O the rest of the rollout's reward, taken to be earned at the last
call. These are the rewards-to-go of REINFORCE (Sutton and Barto, Reinforcement Learning, 2nd edition, section 13.3), with calls
for time steps. With γ = 1 and nothing but an outcome each call gets R, as under `equal`.

A call is compared with the k-th call of the group's rollouts, 0 standing for those that had ended:

    A_k = (G_k − Ḡ_k) / s_k.

Why not with the whole group: G_k depends on k. Where rewards come on the way, a late call has less before it than an early one,
and beside whole rollouts it would look bad for being late. A baseline that depends on the time and on other rollouts, not on what
the call did, lowers the variance and leaves the expected gradient's direction. Why the ended ones count: a rollout that has
ended earns nothing more, so going on is compared with that, and the last call of the longest rollout has company.

Calls count in order of arrival, whoever made them; choices of one request (n > 1) count as if one had been made after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rl.credit.records import Credits, Rollout, Scope, Term


def return_to_go(group: Sequence[Rollout], *, discount: float = 1.0) -> Credits:
    """`discount`: γ, what a reward is worth one call earlier."""
    to_go = {rollout.id: rewards_to_go(rollout, discount) for rollout in group if rollout.calls}
    scopes: dict[Scope, dict[str, float]] = {
        ("call", k): {id: values[k] if k < len(values) else 0.0 for id, values in to_go.items()}
        for k in range(max(map(len, to_go.values()), default=0))
    }
    returns, terms = {}, {}
    for rollout in group:
        for k, call in enumerate(rollout.calls):
            returns[call.id] = to_go[rollout.id][k]
            terms[call.id] = [Term(value=to_go[rollout.id][k], scope=("call", k))]
    return Credits(returns=returns, terms=terms, scopes=scopes)


def rewards_to_go(rollout: Rollout, discount: float) -> list[float]:
    """G_k of each call, in order."""
    values: list[float] = []
    ahead = rollout.outcome
    for k, call in reversed([*enumerate(rollout.calls)]):
        is_last = k == len(rollout.calls) - 1
        ahead = rollout.earned[call.id] + (ahead if is_last else discount * ahead)
        values.append(ahead)
    return values[::-1]
