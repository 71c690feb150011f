"""MT-GRPO: the advantage of the turn, and beside it that of the outcome.

Zeng et al., Reinforcing Multi-Turn Reasoning in LLM Agents via Turn-Level Credit Assignment, arXiv 2505.11821. With r_k what call
k earned, K the number of calls, O the rest of the rollout's reward and λ = `weight`:

    A_k = A^turn_k + λ A^outcome for k < K,    A_K = A^outcome,
    A^turn_k = (r_k − r̄_k) / s_k,    A^outcome = (O + r_K − mean) / s.

The paper's agent searches once and then answers: K = 2, the first turn has a reward of its own and the outcome is what the
answer earns. At K = 2 this is its estimator. What is ours for other lengths: a rollout that had no k-th call before its last counts
as 0 in r̄_k; what the last call earned is part of the outcome; and the single call of a rollout of one has A^outcome alone.
Turns of one number are compared although different histories led to them, where an exact comparison would have to sample
several rollouts from each turn. The authors' program puts λ before the turn's advantage, the paper before the outcome's; at the
default of 1 they agree. Whether there is a division by s is the objective's `normalise`; the paper divides.

Not preserving sums: every call gets the outcome, the earlier ones λ times, so that a long rollout moves the policy by it more often
than a short one. `step_rewards` shares it out instead.

Calls count in order of arrival, whoever made them; choices of one request (n > 1) count as turns, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rl.credit.records import OUTCOME, Credits, Rollout, Scope, Term


def mt_grpo(group: Sequence[Rollout], *, weight: float = 1.0) -> Credits:
    """`weight`: λ, what the outcome counts beside the turn's own reward. The return of a call is shown as r_k + λ (O + r_K), that
    of the last as O + r_K."""
    made = [rollout for rollout in group if rollout.calls]
    outcomes = {rollout.id: rollout.outcome + rollout.earned_at(len(rollout.calls) - 1) for rollout in made}
    scopes: dict[Scope, dict[str, float]] = {OUTCOME: outcomes}
    for k in range(max((len(rollout.calls) for rollout in made), default=1) - 1):
        scopes["call", k] = {rollout.id: _turn(rollout, k) for rollout in made}
    returns, terms = {}, {}
    for rollout in made:
        outcome = outcomes[rollout.id]
        for k, call in enumerate(rollout.calls[:-1]):
            returns[call.id] = _turn(rollout, k) + weight * outcome
            terms[call.id] = [
                Term(value=_turn(rollout, k), scope=("call", k)),
                Term(value=outcome, scope=OUTCOME, weight=weight),
            ]
        returns[rollout.calls[-1].id] = outcome
        terms[rollout.calls[-1].id] = [Term(value=outcome, scope=OUTCOME)]
    return Credits(returns=returns, terms=terms, scopes=scopes)


def _turn(rollout: Rollout, k: int) -> float:
    """r_k; 0 if call k is the last, or there is none."""
    return rollout.earned_at(k) if k < len(rollout.calls) - 1 else 0.0
