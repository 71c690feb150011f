"""The tree's advantages: what a call led to, against what its state led to.

The calls of a group form a tree (`call_tree`). A leaf is worth L = O + what the calls on its path earned, and a node V, the mean
over its rollouts, each of which counts as the mean of its leaves below the node: the prefix values of TEMPO (arXiv 2509.18314),
at the level of calls instead of tokens. TEMPO adds the steps between them to GRPO's advantage; here they are all that there is. A
call that was made in the state s and led to the action node (s, a) gets

    A = V(s, a) − V(s*),

where s* is s, or the nearest node above it at which there is somebody to compare with. So each of the calls that nobody else came
to has the credit of the edge that led there, and where the rollouts share no more than their first prompt, all calls have R − R̄, as
by `equal`; under leave-one-out the mean R̄ is that of the others. Where all that are compared in a state did the same, nothing was
decided there, and the credit is 0.

With leave_one_out = False these telescope: along a path the credits of its distinct edges s* → (s, a) sum to L − V(root), but
for V(s') − V(s, a) where rollouts that did the same met different states s'. That is the environment's luck and no call's deed.
With leave_one_out = True they do not add up: each V(s*) is of other leaves.

With leave_one_out = True, V(s*) is taken without the leaves that depend on the call. It is then independent of what the call
sampled, s* as well, and V(s, a) counts each call that did a once, so the gradient is unbiased, as RLOO's is. The outcome O
depends on all calls of its rollout, so it is compared with other rollouts only; what was earned on a path depends on its calls
alone, and is compared with the rollout's other leaves, too. So a search inside one episode whose branches are rewarded at their
calls has credit without a second rollout; where an agent asks again because of what it was told, the alternatives are not
independent and such credit is biased. What was earned behind a join depends on all the alternatives that it joins and praises or
blames them alike, so these are compared with other rollouts only, where there are any.

A call that can be compared with nobody is not trained on, whatever the objective's baseline: `Credits.alone`.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from lightning_rl.credit.call_tree import ROOT, CallTree, Leaves, Node, call_tree
from lightning_rl.credit.records import GROUP, Credits, Rollout, Term


def tree(group: Sequence[Rollout], *, leave_one_out: bool = True) -> Credits:
    """`leave_one_out` false: baselines with the call's own rollout, as GRPO's are. `returns` are V(s, a)."""
    made = [rollout for rollout in group if rollout.calls]
    outcomes = {rollout.id: rollout.outcome for rollout in made}
    points = {rollout.id: rollout.ret for rollout in made}
    calls = call_tree(made)
    above = _above(calls.nodes)
    actions = Counter(node.parent for node in calls.nodes if node.kind == "action")
    returns: dict[str, float] = {}
    terms: dict[str, list[Term]] = {}
    alone: set[str] = set()
    led_to = _led_to(calls, made, leave_one_out)
    for rollout in made:
        for call in rollout.calls:
            action = calls.action[call.id]
            returns[call.id] = value(calls.nodes[action], outcomes)
            credit = _credit(calls, above, actions, led_to[action], call.id, rollout.id, outcomes, leave_one_out)
            if credit is None:
                alone.add(call.id)
            else:
                terms[call.id] = [Term(value=credit, scope=GROUP, centred=True)]
    return Credits(returns=returns, terms=terms, scopes={GROUP: points}, alone=frozenset(alone))


def value(node: Node, outcomes: dict[str, float]) -> float:
    """V of a node; `outcomes` by rollout id."""
    return _outcome(node, outcomes) + _earned(node)


def _credit(
    calls: CallTree,
    above: list[tuple[int | None, int | None]],
    actions: Mapping[int, int],
    led_to: tuple[float, float],
    call_id: str,
    rollout: str,
    outcomes: dict[str, float],
    leave_one_out: bool,
) -> float | None:
    """None if there is nobody to compare with. `actions`: how many different ones there are, by state; `led_to`: see `_led_to`."""
    at, own = calls.state[call_id], calls.below[call_id]
    by_outcome = at if len(calls.nodes[at].leaves) > 1 else above[at][0]
    by_earned = at if _more(_count(calls.nodes[at]), own.count) else above[at][1]
    left_out: tuple[str, Leaves | None] | None = (rollout, own) if leave_one_out else None
    if leave_one_out and call_id in calls.joined and by_outcome is not None:
        by_earned, left_out = by_outcome, (rollout, None)
    if by_outcome is None and by_earned is None:
        return None
    undecided = at if actions[at] == 1 else None
    parts = [0.0]
    if by_outcome is not None and by_outcome != undecided:
        without = rollout if leave_one_out else None
        parts += [led_to[0], -_outcome(calls.nodes[by_outcome], outcomes, without)]
    if by_earned is not None and by_earned != undecided:
        parts += [led_to[1], -_earned(calls.nodes[by_earned], left_out)]
    credit = math.fsum(parts)
    return 0.0 if abs(credit) <= 1e-12 + 1e-9 * max(map(abs, parts)) else credit


def _led_to(calls: CallTree, group: Sequence[Rollout], each_call: bool) -> dict[int, tuple[float, float]]:
    """By action node: the mean outcome, and the mean of what was earned; over the calls that did it, or over their rollouts."""
    outcomes = {rollout.id: rollout.outcome for rollout in group}
    if not each_call:
        return {
            at: (_outcome(calls.nodes[at], outcomes), _earned(calls.nodes[at])) for at in set(calls.action.values())
        }
    outcome_of = {call.id: rollout.outcome for rollout in group for call in rollout.calls}
    return {
        at: (
            statistics.fmean(outcome_of[call] for call in calls.nodes[at].calls),
            statistics.fmean(calls.below[call].earned / calls.below[call].count for call in calls.nodes[at].calls),
        )
        for at in set(calls.action.values())
    }


def _above(nodes: list[Node]) -> list[tuple[int | None, int | None]]:
    """For each node the nearest above it with more rollouts, and with more leaves."""
    above: list[tuple[int | None, int | None]] = []
    for at, node in enumerate(nodes):
        if at == ROOT:
            above.append((None, None))
            continue
        up, further = nodes[node.parent], above[node.parent]
        above.append(
            (
                node.parent if len(up.leaves) > len(node.leaves) else further[0],
                node.parent if _more(_count(up), _count(node)) else further[1],
            )
        )
    return above


def _count(node: Node) -> float:
    return math.fsum(leaves.count for leaves in node.leaves.values())


def _more(count: float, than: float) -> bool:
    return count > than * (1 + 1e-9)


def _outcome(node: Node, outcomes: dict[str, float], without: str | None = None) -> float:
    return statistics.fmean(outcomes[rollout] for rollout in node.leaves if rollout != without)


def _earned(node: Node, without: tuple[str, Leaves | None] | None = None) -> float:
    """`without`: these leaves of the rollout of that id, or all of them."""
    means = []
    for rollout, leaves in node.leaves.items():
        if without is None or rollout != without[0]:
            means.append(leaves.earned / leaves.count)
        elif without[1] is not None and _more(leaves.count, without[1].count):
            means.append((leaves.earned - without[1].earned) / (leaves.count - without[1].count))
    return statistics.fmean(means)
