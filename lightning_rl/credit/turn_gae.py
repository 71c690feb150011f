"""GAE with calls for time steps: all tokens of a call have one advantage.

    δ_k = r_k + γ V_{k+1} − V_k,    A_k = δ_k + γ λ A_{k+1}        (`gae`)

with V_k the critic's value of the state before the first token of call k, r_k what the call earned, and the outcome added to the
last call's. The critic learns A_k + V_k at the first token of each call, and is not asked elsewhere. It is the upper level of
the bi-level GAE of RAGEN and VAGEN (arXiv 2504.20073, 2510.16907), whose lower level, GAE over the tokens inside a call, is left
out: a call is the action, and λ < 1 is paid by the call, not by the token. Whose calls came when does not matter: the calls of all
agents that learn are one sequence, in order of arrival, and so are choices of one request.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rl.credit.gae import acting, gae
from lightning_rl.credit.records import Credits, Rollout


def turn_gae(group: Sequence[Rollout], *, discount: float = 1.0, lam: float = 0.95) -> Credits:
    """`discount`: γ, `lam`: λ, both from call to call. `returns` are the targets A_k + V_k; a call without a value (`gae.acting`)
    has 0 and learns nothing.

    Raises CreditError if a rollout with calls has no values.
    """
    returns = {call.id: 0.0 for rollout in group for call in rollout.calls}
    token_advantages: dict[str, list[float]] = {}
    value_targets: dict[str, list[float | None]] = {}
    for rollout in group:
        calls, rewards = acting(rollout)
        values = [rollout.values[call.id][0] for call in calls]
        for call, advantage, target in zip(calls, *gae(rewards, values, discount, lam), strict=True):
            returns[call.id] = target
            token_advantages[call.id] = [advantage] * len(call.sampled_ids)
            value_targets[call.id] = [target, *[None] * (len(call.sampled_ids) - 1)]
    return Credits(returns=returns, token_advantages=token_advantages, value_targets=value_targets)
