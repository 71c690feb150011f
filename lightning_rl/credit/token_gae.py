"""PPO's credit: GAE over all tokens that the learner sampled in a rollout, call after call.

    δ_t = r_t + γ V_{t+1} − V_t,    A_t = δ_t + γ λ A_{t+1}        (`gae`)

What a call earned comes at its last token, the outcome at the last token of all. t + 1 is the next sampled token: behind the last
token of a call that is the first of the next call, and tokens of the observation between them are no steps. γ = λ = 1, the
default, is what verl and OpenRLHF begin with: the advantage is then what was still to come, less the value. The calls of all
agents that learn are one sequence, in order of arrival, and so are choices of one request.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rl.credit.gae import acting, gae
from lightning_rl.credit.records import Credits, Rollout


def token_gae(group: Sequence[Rollout], *, discount: float = 1.0, lam: float = 1.0) -> Credits:
    """`discount`: γ, `lam`: λ, both from token to token. `returns` are the targets A + V at the first token of each call.

    Tokens beyond the row limit have no value and are no steps: advantage 0, no target. A call without any value (`gae.acting`)
    has the return 0 and learns nothing. Raises CreditError if a rollout with calls has no values.
    """
    returns = {call.id: 0.0 for rollout in group for call in rollout.calls}
    token_advantages: dict[str, list[float]] = {}
    value_targets: dict[str, list[float | None]] = {}
    for rollout in group:
        calls, earned = acting(rollout)
        rewards, values = [], []
        for call, reward in zip(calls, earned, strict=True):
            of_call = rollout.values[call.id]
            rewards += [0.0] * (len(of_call) - 1) + [reward]
            values += of_call
        advantages, targets = gae(rewards, values, discount, lam)
        start = 0
        for call in calls:
            end = start + len(rollout.values[call.id])
            beyond = len(call.sampled_ids) - (end - start)
            returns[call.id] = targets[start]
            token_advantages[call.id] = advantages[start:end] + [0.0] * beyond
            value_targets[call.id] = [*targets[start:end], *[None] * beyond]
            start = end
    return Credits(returns=returns, token_advantages=token_advantages, value_targets=value_targets)
