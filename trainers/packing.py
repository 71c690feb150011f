"""From the transitions of a step to the rows that the trainer computes.

A row is a prefix tree in depth-first order: what a group's calls have in common, their prompts above all, is in it once and is
computed once. A mask that lets each token see its ancestors makes the result equal to computing every call on its own. Loss
terms point into the row: the node that predicts a sampled token, the token, and what it is worth. All terms of a call are in one
row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct, structs

from lightning_rl.episode import Call
from lightning_rl.scores import CallScores
from lightning_rl.token_tree import TokenTree, TreeSize, build_tree
from lightning_rl.transition import Transition

SHARED_ROW_TOKENS = 2048
"""Groups are put into one row up to this size: more would cost memory and save little (some 1.4 MB a token in SmolLM2)."""


class Row(Struct, frozen=True, kw_only=True):
    """One forward pass. N nodes, L loss terms, C calls; a row without terms only keeps ranks in step.

    In a row to be scored (`rows_to_score`) the lists about the loss are empty.
    """

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
    sequences: list[int] = []
    """[L] number of the term's call in `calls`."""
    versions: list[int] = []
    """[L] the policy version that drew the target."""
    correctable: list[bool] = []
    """[L] whether `behaviour` is of the same distribution as the trainer's (`Call.restricted` is empty)."""
    old: list[float] = []
    """[L] log π_old; empty where it was not asked: then π_old is the policy as it computes the row."""
    reference: list[float] = []
    """[L] log π_ref; empty without a reference policy."""
    value_targets: list[float] = []
    """[L] what the critic should say at the node; empty where no call of the row has a target."""
    value_weights: list[float] = []
    """[L] 1 / (targets of all rows that were packed together), 0 where the critic is not asked; empty like `value_targets`."""
    calls: list[str] = []
    """[C] ids of the calls that have terms here."""
    agents: list[str] = []
    """[C] who made the call, "" if nobody knows."""


class Packed(Struct, frozen=True, kw_only=True):
    rows: list[Row]
    trees: list[TokenTree]
    """Of the trained groups, before pruning: what the ledger counts in."""


PADDING = Row(
    ids=[0],
    depths=[0],
    ends=[1],
    nodes=[],
    targets=[],
    advantages=[],
    weights=[],
    behaviour=[],
    temperatures=[],
)


def pack(
    transitions: Sequence[Transition],
    group_of: Mapping[str, str],
    weights: Mapping[str, float],
    calls: Mapping[str, Call],
    max_row_tokens: int,
    *,
    ranks: int = 1,
    scores: Mapping[str, CallScores] = {},
    agent_of: Mapping[str, str] = {},
) -> Packed:
    """Rows of at most `max_row_tokens` nodes, one tree each, in a fixed order.

    `group_of`: episode id -> group; `weights`: call id -> weight of each of its tokens (`algorithms.aggregation`); calls
    without a weight are masked and are not computed. A call longer than a row is cut, and its lost tokens show in the
    ledger. Small groups share a row, and in it what their prompts have in common, as long as `ranks` have work.

    `scores`: call id -> what the trainer's models say, for every call with a weight or for none; `agent_of`: call id -> who made
    it.
    Raises ValueError where scores are not one for each kept token of a call.
    """
    trained = {t.call_id: t for t in transitions if t.call_id in weights}
    trees_of_calls = _parts([calls[call_id] for call_id in trained], group_of, max_row_tokens, ranks)
    parts = [(tree, [trained[call.id] for call in part]) for tree, part in trees_of_calls]
    share = _share_of_a_target([t for _, part in parts for t in part], [tree for tree, _ in parts])
    rows = [_loss_row(tree, part, weights, share, calls, scores, agent_of) for tree, part in parts]
    return Packed(rows=[row for row in rows if row.nodes], trees=[tree for tree, _ in parts])


def rows_to_score(calls: Sequence[Call], group_of: Mapping[str, str], max_row_tokens: int, ranks: int = 1) -> list[Row]:
    """Rows with a term for each sampled token of the calls, cut as `pack` cuts them, and nothing about a loss.

    `group_of`: episode id -> group. Greedy calls are scored at temperature 1.
    """
    rows = [_row(tree, part) for tree, part in _parts(calls, group_of, max_row_tokens, ranks)]
    return [row for row in rows if row.nodes]


def _parts(
    calls: Sequence[Call], group_of: Mapping[str, str], limit: int, ranks: int
) -> list[tuple[TokenTree, list[Call]]]:
    """What each row holds, and its tree: groups in order of appearance, split by calls where they do not fit, and put together."""
    groups: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        groups[group_of[call.episode_id]].append(call)
    parts = [part for members in groups.values() for part in _joined([[call] for call in members], limit, limit)]
    share = sum(size.nodes for _, size in parts) // ranks
    joined = _joined([part for part, _ in parts], limit, min(limit, SHARED_ROW_TOKENS, share))
    return [(build_tree(part, max_tokens=limit), part) for part, _ in joined]


def _joined(parts: Sequence[list[Call]], cut: int, limit: int) -> list[tuple[list[Call], TreeSize]]:
    """Neighbouring parts put together while their tree has at most `limit` nodes; sequences are cut after `cut` tokens."""
    joined: list[tuple[list[Call], TreeSize]] = []
    for part in parts:
        sequences = [(call.prompt_ids + call.sampled_ids)[:cut] for call in part]
        if joined:
            before, size = joined[-1]
            both = size.with_sequences(sequences)
            if both.nodes <= limit:
                joined[-1] = ([*before, *part], both)
                continue
        joined.append((part, TreeSize().with_sequences(sequences)))
    return joined


def _row(tree: TokenTree, calls: Sequence[Call]) -> Row:
    """What a forward pass and a comparison with the server need. Calls that have no sampled token in the tree are left out."""
    asked = [call for call in calls if tree.sampled_counts[call.id]]
    terms = {call.id: tree.terms(call.id) for call in asked}
    kept = _needed(tree, {node for pairs in terms.values() for node, _ in pairs})
    place = {node: i for i, node in enumerate(kept)}
    last = _last_descendants(tree, kept)
    return Row(
        ids=[tree.ids[node] for node in kept],
        depths=[tree.depths[node] for node in kept],
        ends=[place[last[node]] + 1 for node in kept],
        nodes=[place[node] for call in asked for node, _ in terms[call.id]],
        targets=[target for call in asked for _, target in terms[call.id]],
        advantages=[],
        weights=[],
        behaviour=[value for call in asked for value in call.logprobs[: len(terms[call.id])]],
        temperatures=[call.temperature or 1.0 for call in asked for _ in terms[call.id]],
        sequences=[number for number, call in enumerate(asked) for _ in terms[call.id]],
        versions=[version for call in asked for version in call.versions[: len(terms[call.id])]],
        correctable=[not call.restricted for call in asked for _ in terms[call.id]],
        calls=[call.id for call in asked],
    )


def _loss_row(
    tree: TokenTree,
    transitions: Sequence[Transition],
    weights: Mapping[str, float],
    share: float,
    calls: Mapping[str, Call],
    scores: Mapping[str, CallScores],
    agent_of: Mapping[str, str],
) -> Row:
    row = _row(tree, [calls[transition.call_id] for transition in transitions])
    count = tree.sampled_counts
    asked = [transition for transition in transitions if count[transition.call_id]]
    targets: list[float | None] = []
    if any(transition.value_targets for transition in asked):
        targets = [
            target for t in asked for target in (t.value_targets or [None] * count[t.call_id])[: count[t.call_id]]
        ]
    known = {t.call_id: scores[t.call_id] for t in asked} if scores else {}
    return structs.replace(
        row,
        advantages=[value for t in asked for value in t.advantages[: count[t.call_id]]],
        weights=[weights[t.call_id] for t in asked for _ in range(count[t.call_id])],
        old=_column({call_id: own.old for call_id, own in known.items()}, count),
        reference=_column({call_id: own.reference for call_id, own in known.items()}, count),
        value_targets=[0.0 if target is None else target for target in targets],
        value_weights=[0.0 if target is None else share for target in targets],
        agents=[agent_of.get(t.call_id, "") for t in asked],
    )


def _column(by_call: Mapping[str, list[float]], count: Mapping[str, int]) -> list[float]:
    """One score for each term, or none at all."""
    if not any(by_call.values()):
        return []
    for call_id, values in by_call.items():
        if len(values) != count[call_id]:
            raise ValueError(f"call {call_id} has {count[call_id]} tokens in its row and {len(values)} scores")
    return [value for values in by_call.values() for value in values]


def _share_of_a_target(transitions: Sequence[Transition], trees: Sequence[TokenTree]) -> float:
    """1 / (targets that the critic has in all rows); 0 if it has none."""
    count = {call_id: number for tree in trees for call_id, number in tree.sampled_counts.items()}
    asked = sum(target is not None for t in transitions for target in t.value_targets[: count[t.call_id]])
    return 1 / asked if asked else 0.0


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
