"""Every agent has a return and a baseline of its own: the rule for several agents that learn together.

    R_a = Σ (rewards at calls of agent a) + O,

with O the rest of the rollout's reward, which the agents share. Each call of agent a gets R_a, and is compared with R_a of the
group's rollouts in which a made a call. An agent is thus not praised for what another one earned, and two agents whose
rewards differ in size do not share a baseline. With one agent it is `equal`.

Not preserving sums: O counts once for each agent. A reward at a call, or at a tool that a call asked for, is the agent's that made
the call; a reward for both belongs at the episode. An agent that came to work in a single rollout of the group has nobody to be
compared with (`Mask.GROUP_OF_ONE`). Calls of which nobody knows the agent are taken together as one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from lightning_rl.credit.records import Credits, Rollout, Scope, Term


def per_agent(group: Sequence[Rollout]) -> Credits:
    returns, terms = {}, {}
    scopes: dict[Scope, dict[str, float]] = defaultdict(dict)
    for rollout in group:
        own = _returns(rollout)
        for agent, value in own.items():
            scopes["agent", agent][rollout.id] = value
        for call in rollout.calls:
            agent = rollout.agents[call.id]
            returns[call.id] = own[agent]
            terms[call.id] = [Term(value=own[agent], scope=("agent", agent))]
    return Credits(returns=returns, terms=terms, scopes=dict(scopes))


def _returns(rollout: Rollout) -> dict[str, float]:
    """By agent: R_a."""
    earned: dict[str, list[float]] = defaultdict(lambda: [rollout.outcome])
    for call in rollout.calls:
        earned[rollout.agents[call.id]].append(rollout.earned[call.id])
    return {agent: math.fsum(values) for agent, values in earned.items()}
