"""A prefix tree over the exact token ids of calls, and how each call relates to the ones before it.

Calls that begin alike share the nodes of their common prefix, so whoever computes over the tree computes every distinct
prefix once. Nodes are numbered in depth-first order and kept in flat lists: k is an ancestor of q, or q itself, exactly
when `k <= q < ends[k]`, which is all that an attention mask needs. Ids decide, never text. Packing, weights and what a
token is worth are left to others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from enum import StrEnum

from msgspec import Struct

from lightning_rl.episode import Call


class TokenTree(Struct, frozen=True, kw_only=True):
    """One entry a node in each list; the numbering does not depend on the order of the calls."""

    ids: list[int]
    parents: list[int]
    """-1 for the first token of a sequence."""
    depths: list[int]
    """Number of ancestors, which is the position id."""
    ends: list[int]
    """One past the last descendant."""
    last_nodes: dict[str, int]
    """By call id: the node of its last token."""
    sampled_counts: dict[str, int]
    """By call id: how many of its sampled tokens are in the tree."""

    def sampled_nodes(self, call_id: str) -> list[int]:
        """The nodes of the call's sampled tokens."""
        nodes = []
        node = self.last_nodes[call_id]
        for _ in range(self.sampled_counts[call_id]):
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def terms(self, call_id: str) -> list[tuple[int, int]]:
        """For each sampled token of the call: the node that predicts it, and the id to be predicted."""
        return [(self.parents[node], self.ids[node]) for node in self.sampled_nodes(call_id)]


def build_tree(calls: Sequence[Call], *, max_tokens: int | None = None) -> TokenTree:
    """The tree of the calls' prompt + sampled ids, each cut after `max_tokens`.

    Sorted sequences visit a prefix tree depth first: each leaves the path of the one before it where the two part.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, not {max_tokens}")
    ids: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    ends: list[int] = []
    last_nodes: dict[str, int] = {}
    sampled_counts: dict[str, int] = {}
    previous: list[int] = []
    path: list[int] = []
    for sequence, call_id, prompt_length in sorted(_sequences(calls, max_tokens)):
        shared = common_prefix(previous, sequence)
        for node in path[shared:]:
            ends[node] = len(ids)
        del path[shared:]
        for token in sequence[shared:]:
            parents.append(path[-1] if path else -1)
            depths.append(len(path))
            ends.append(-1)
            path.append(len(ids))
            ids.append(token)
        last_nodes[call_id] = path[-1]
        sampled_counts[call_id] = max(0, len(sequence) - prompt_length)
        previous = sequence
    for node in path:
        ends[node] = len(ids)
    return TokenTree(
        ids=ids, parents=parents, depths=depths, ends=ends, last_nodes=last_nodes, sampled_counts=sampled_counts
    )


class TreeSize(Struct, frozen=True):
    """How many nodes the tree of some sequences has, without the tree."""

    ordered: list[list[int]] = []
    """The sequences, sorted."""
    nodes: int = 0

    def with_sequences(self, sequences: Iterable[list[int]]) -> TreeSize:
        """A sequence brings what it has beyond its longest common prefix with another: that one is next to it in order."""
        ordered, nodes = self.ordered.copy(), self.nodes
        for sequence in sequences:
            at = bisect_left(ordered, sequence)
            neighbours = ordered[max(0, at - 1) : at + 1]
            nodes += len(sequence) - max((common_prefix(sequence, other) for other in neighbours), default=0)
            ordered.insert(at, sequence)
        return TreeSize(ordered, nodes)


def _sequences(calls: Sequence[Call], max_tokens: int | None) -> list[tuple[list[int], str, int]]:
    if len({call.id for call in calls}) < len(calls):
        raise ValueError("the same call was given twice")
    for call in calls:
        if not call.prompt_ids:
            raise ValueError(f"call {call.id} has no prompt: nothing predicts its first token")
    return [((call.prompt_ids + call.sampled_ids)[:max_tokens], call.id, len(call.prompt_ids)) for call in calls]


def common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """Length of the longest common prefix, by bisection: comparing slices is much faster than a loop over tokens."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Relation(StrEnum):
    """How a call's prompt relates to what earlier calls of its episode had as prompt + sampled ids (their sequences).

    Let m be the number of tokens that the prompt shares with the earlier sequence nearest to it.
    """

    ROOT = "root"
    """It contains no earlier sequence, and parts (at m, perhaps 0) inside a prompt that contained none either: a new
    conversation, even if it begins with the same system message."""
    EXTENSION = "extension"
    """It begins with an earlier sequence that nothing had continued yet."""
    FORK = "fork"
    """It branches where the policy's words are intact: the same prompt once more, or an earlier sequence continued a
    second time in another way, at once or after a part that both have (another tool result, for instance)."""
    EDIT = "edit"
    """It parts inside what an earlier call sampled: the agent changed or cut the policy's words."""


class Label(Struct, frozen=True, kw_only=True):
    relation: Relation
    parted_at: int
    """m: the first position at which the call's prompt has something of its own."""
    previous_id: str | None
    """The earlier call that it extends, branches from or edits; None for a root that shares nothing."""


def label_calls(calls: Sequence[Call]) -> dict[str, Label]:
    """A label for each call of one episode, given in order of arrival.

    Calls that sampled nothing (aborted at once) leave nothing to relate to and are passed over as predecessors.
    """
    earlier: list[Call] = []
    labels = {}
    for call in calls:
        labels[call.id] = _label(call, earlier)
        if call.sampled_ids:
            earlier.append(call)
    return labels


def _label(call: Call, earlier: Sequence[Call]) -> Label:
    prompt = call.prompt_ids
    shared = {other.id: common_prefix(prompt, other.prompt_ids + other.sampled_ids) for other in earlier}
    contained = [other for other in earlier if shared[other.id] == _length(other)]
    base = max(contained, key=_length, default=None)
    if base is not None and not any(_continues(other, base) for other in earlier):
        return Label(relation=Relation.EXTENSION, parted_at=_length(base), previous_id=base.id)
    nearest = max(earlier, key=lambda other: shared[other.id], default=None)  # the first of equals had the tokens first
    if nearest is None or shared[nearest.id] == 0:
        return Label(relation=Relation.ROOT, parted_at=0, previous_id=None)
    parted_at = shared[nearest.id]
    repeated = next((other for other in earlier if other.prompt_ids == prompt), None)
    if repeated is not None:
        return Label(relation=Relation.FORK, parted_at=parted_at, previous_id=repeated.id)
    if len(nearest.prompt_ids) <= parted_at < _length(nearest):
        return Label(relation=Relation.EDIT, parted_at=parted_at, previous_id=nearest.id)
    if base is not None:
        return Label(relation=Relation.FORK, parted_at=parted_at, previous_id=base.id)
    return Label(relation=Relation.ROOT, parted_at=parted_at, previous_id=nearest.id)


def _length(call: Call) -> int:
    return len(call.prompt_ids) + len(call.sampled_ids)


def _continues(other: Call, base: Call) -> bool:
    sequence = base.prompt_ids + base.sampled_ids
    return other.prompt_ids[: len(sequence)] == sequence
