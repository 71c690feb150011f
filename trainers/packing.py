"""From the transitions of a step to the rows that the trainer computes.

A row is a prefix tree in depth-first order: what a group's calls have in common, their prompts above all, is in it once and is
computed once. A mask that lets each token see its ancestors makes the result equal to computing every call on its own. Loss
terms point into the row: the node that predicts a sampled token, the token, and what it is worth.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from lightning_rl.episode import Call
from lightning_rl.token_tree import TokenTree, build_tree
from lightning_rl.transition import Transition

SHARED_ROW_TOKENS = 2048
"""Groups are put into one row up to this size: more would cost memory and save little (some 1.4 MB a token in SmolLM2)."""

TreeOf = Callable[[Sequence[Transition]], TokenTree]


class Row(Struct, frozen=True, kw_only=True):
    """One forward pass. N nodes, L loss terms; a row without terms only keeps ranks in step."""

    ids: list[int]
    """[N]"""
    depths: list[int]
    """[N] position ids."""
    ends: list[int]
    """[N] one past the last descendant: q sees k exactly when k <= q < ends[k]."""
    nodes: list[int]
    """[L] the node whose hidden state predicts the target."""
    targets: list[int]
    """[L]"""
    advantages: list[float]
    """[L]"""
    weights: list[float]
    """[L] the token's share of the step's loss."""
    behaviour: list[float]
    """[L] log-prob under which the server drew the target."""
    temperatures: list[float]
    """[L]"""


class Packed(Struct, frozen=True, kw_only=True):
    rows: list[Row]
    trees: list[TokenTree]
    """Of the trained groups, before pruning: what the ledger counts in."""


PADDING = Row(
    ids=[0], depths=[0], ends=[1], nodes=[], targets=[], advantages=[], weights=[], behaviour=[], temperatures=[]
)


def pack(
    transitions: Sequence[Transition],
    group_of: Mapping[str, str],
    weights: Mapping[str, float],
    calls: Mapping[str, Call],
    max_row_tokens: int,
    *,
    ranks: int = 1,
) -> Packed:
    """Rows of at most `max_row_tokens` nodes, one tree each, in a fixed order.

    `group_of`: episode id -> group; `weights`: call id -> weight of each of its tokens (`algorithms.aggregation`); calls
    without a weight are masked and are not computed. A call longer than a row is cut, and its lost tokens show in the
    ledger. Small groups share a row, and in it what their prompts have in common, as long as `ranks` have work.
    """
    trained: dict[str, list[Transition]] = defaultdict(list)
    for transition in transitions:
        if transition.call_id in weights:
            trained[group_of[transition.episode_id]].append(transition)

    def tree_of(part: Sequence[Transition]) -> TokenTree:
        return build_tree([calls[t.call_id] for t in part], max_tokens=max_row_tokens)

    parts = [part for group in trained.values() for part in _split(group, tree_of, max_row_tokens)]
    share = sum(len(tree_of(part).ids) for part in parts) // ranks
    rows, trees = [], []
    for part in _joined(parts, tree_of, min(max_row_tokens, SHARED_ROW_TOKENS, share)):
        tree = tree_of(part)
        trees.append(tree)
        row = _row(tree, part, weights)
        if row.nodes:
            rows.append(row)
    return Packed(rows=rows, trees=trees)


def _split(group: list[Transition], tree_of: TreeOf, limit: int) -> list[list[Transition]]:
    """The group as one tree if it fits, else consecutive parts that do."""
    if len(tree_of(group).ids) <= limit:
        return [group]
    parts: list[list[Transition]] = [group[:1]]
    for transition in group[1:]:
        trial = [*parts[-1], transition]
        if len(tree_of(trial).ids) > limit:
            parts.append([transition])
        else:
            parts[-1] = trial
    return parts


def _joined(parts: Sequence[list[Transition]], tree_of: TreeOf, limit: int) -> list[list[Transition]]:
    """Neighbouring parts put together while their tree stays within the limit."""
    joined: list[list[Transition]] = []
    for part in parts:
        if joined and len(tree_of(joined[-1] + part).ids) <= limit:
            joined[-1] = joined[-1] + part
        else:
            joined.append(part)
    return joined


def _row(tree: TokenTree, transitions: Sequence[Transition], weights: Mapping[str, float]) -> Row:
    terms = [
        (node, target, transition.advantage, weights[transition.call_id], logprob, transition.temperature)
        for transition in transitions
        for (node, target), logprob in zip(tree.terms(transition.call_id), transition.logprobs, strict=False)
    ]
    kept = _needed(tree, {term[0] for term in terms})
    place = {node: i for i, node in enumerate(kept)}
    last = _last_descendants(tree, kept)
    nodes, targets, advantages, token_weights, behaviour, temperatures = (
        [list(column) for column in zip(*terms, strict=True)] if terms else [[] for _ in range(6)]
    )
    return Row(
        ids=[tree.ids[node] for node in kept],
        depths=[tree.depths[node] for node in kept],
        ends=[place[last[node]] + 1 for node in kept],
        nodes=[place[node] for node in nodes],
        targets=targets,
        advantages=advantages,
        weights=token_weights,
        behaviour=behaviour,
        temperatures=temperatures,
    )


def _needed(tree: TokenTree, predictors: set[int]) -> list[int]:
    """Nodes with a predictor at or below them: a sequence's last token predicts nothing and is not computed."""
    needed = set(predictors)
    for node in range(len(tree.ids) - 1, -1, -1):
        if node in needed and tree.parents[node] >= 0:
            needed.add(tree.parents[node])
    return sorted(needed)


def _last_descendants(tree: TokenTree, kept: Sequence[int]) -> dict[int, int]:
    last = {node: node for node in kept}
    for node in reversed(kept):
        parent = tree.parents[node]
        if parent >= 0:
            last[parent] = max(last[parent], last[node])
    return last


def row_cost(row: Row) -> float:
    """Relative cost of a forward pass: linear layers, and attention that looks at every pair."""
    n = len(row.ids)
    return n + n * n / 4000


def share_out(rows: Sequence[Row], ranks: int, cost: Callable[[Row], float] = row_cost) -> list[list[Row]]:
    """The rows of each rank: balanced by cost (longest first to the least loaded), equally many, padded with empty rows.

    Ranks reduce gradients once a row, so that all must have the same number.
    """
    shares: list[list[Row]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for row in sorted(rows, key=cost, reverse=True):
        rank = loads.index(min(loads))
        shares[rank].append(row)
        loads[rank] += cost(row)
    most = max(map(len, shares))
    return [share + [PADDING] * (most - len(share)) for share in shares]
