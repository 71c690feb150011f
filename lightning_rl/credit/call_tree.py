"""The tree that the calls of a group form: who was in the same state, and who did the same there.

Over the group, two calls are in the same state when their histories (`paths`) and prompts are equal to the token, and they act
alike when what they sampled is equal, too. States and actions alternate below a root that all rollouts of the task share, whatever
their first prompts; the state of a call that joins alternatives hangs below the call before the fork.

A rollout has as many leaves as it has loose ends, mostly one. Alternatives that are joined divide what lies behind the join among
them: each of their own ends has an equal part of its leaves, and is worth what was earned before it, on its way, and behind the
join. What came before a join is the mean over the ends that it follows.

Time and memory are linear in the tokens of the group.
"""

from __future__ import annotations

import math
import statistics
from array import array
from collections import defaultdict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal

from msgspec import Struct

from lightning_rl.credit.paths import Paths, paths_of
from lightning_rl.credit.records import Rollout

ROOT = 0
"""Index of the root among the nodes."""


class Leaves(Struct, frozen=True):
    """Loose ends of one rollout."""

    count: float
    """A part of one where alternatives share it."""
    earned: float
    """Σ over the leaves of what the calls on the way from the root to the leaf earned."""


class Node(Struct, frozen=True, kw_only=True):
    kind: Literal["root", "state", "action"]
    parent: int
    """Index among the nodes, smaller than the node's own; the root's is the root."""
    calls: list[str]
    """Of a state those that were made in it, of an action those that did it."""
    leaves: dict[str, Leaves]
    """By rollout id, for each that came through the node: its leaves below."""


class CallTree(Struct, frozen=True, kw_only=True):
    nodes: list[Node]
    state: dict[str, int]
    """By call id: the node in which the call was made."""
    action: dict[str, int]
    """By call id: the node that the call led to."""
    follows: dict[str, tuple[str, ...]]
    """By call id: the calls of the same rollout that it follows; none for the first, several for a join."""
    joined: frozenset[str]
    """Calls between a fork and its join."""
    below: dict[str, Leaves]
    """By call id: the rollout's own leaves that the call led to."""


def call_tree(group: Sequence[Rollout]) -> CallTree:
    """Of the rollouts that made a call; the others are not in it."""
    nodes = [Node(kind="root", parent=ROOT, calls=[], leaves={})]
    index: dict[bytes, int] = {}
    state: dict[str, int] = {}
    action: dict[str, int] = {}
    follows: dict[str, tuple[str, ...]] = {}
    joined: set[str] = set()
    below: dict[str, Leaves] = {}
    keys: dict[str, bytes] = {}

    def node(kind: Literal["state", "action"], parent: int, key: bytes, call_id: str) -> int:
        found = index.setdefault(key, len(nodes))
        if found == len(nodes):
            nodes.append(Node(kind=kind, parent=parent, calls=[], leaves={}))
        nodes[found].calls.append(call_id)
        return found

    for rollout in group:
        prompts = {call.id: _digest(call.prompt_ids) for call in rollout.calls}
        paths = paths_of(rollout, prompts)
        follows |= paths.follows
        joined |= paths.joined
        history: dict[tuple[str, ...], bytes] = {(): b""}
        for call in paths.order:
            before, trunk = paths.follows[call.id], paths.trunk[call.id]
            if before not in history:
                history[before] = _history(keys, before, trunk)
            key = blake2b(history[before] + prompts[call.id]).digest()
            state[call.id] = node("state", ROOT if trunk is None else action[trunk], b"s" + key, call.id)
            keys[call.id] = blake2b(key + _digest(call.sampled_ids)).digest()
            action[call.id] = node("action", state[call.id], b"a" + keys[call.id], call.id)
        own = _below(paths, rollout.earned)
        below |= own
        through: dict[int, list[Leaves]] = defaultdict(list)
        for call in paths.order:
            through[state[call.id]].append(own[call.id])
            through[action[call.id]].append(own[call.id])
            if not paths.follows[call.id]:
                through[ROOT].append(own[call.id])
        for where, leaves in through.items():
            nodes[where].leaves[rollout.id] = _sum(leaves)
    return CallTree(nodes=nodes, state=state, action=action, follows=follows, joined=frozenset(joined), below=below)


def _history(keys: dict[str, bytes], before: tuple[str, ...], trunk: str | None) -> bytes:
    """The same whatever the order of the alternatives that are joined."""
    if len(before) == 1:
        return keys[before[0]]
    parts = [b"" if trunk is None else keys[trunk], *sorted(keys[call] for call in before)]
    return blake2b(b"join" + b"".join(parts)).digest()


def _below(paths: Paths, earned: dict[str, float]) -> dict[str, Leaves]:
    past: dict[tuple[str, ...], float] = {(): 0.0}
    """By what a call follows: what was earned on the way, the mean over the ends."""
    for call in paths.order:
        before = paths.follows[call.id]
        if before not in past:
            past[before] = statistics.fmean(past[paths.follows[end]] + earned[end] for end in before)
    ahead: dict[str, tuple[float, float]] = {}
    """By the first of the ends that calls follow: their leaves, and Σ over these of what was earned from there on."""
    shared = {end: before for before in past for end in before}
    below: dict[str, Leaves] = {}
    for call in reversed(paths.order):
        before = paths.follows[call.id]
        count, later = 1.0, 0.0
        if ends := shared.get(call.id):
            whole, of_whole = ahead[ends[0]]
            count, later = whole / len(ends), of_whole / len(ends)
        mine = later + count * earned[call.id]
        below[call.id] = Leaves(count, mine + count * past[before])
        if before:
            whole, of_whole = ahead.get(before[0], (0.0, 0.0))
            ahead[before[0]] = (whole + count, of_whole + mine)
    return below


def _sum(leaves: Sequence[Leaves]) -> Leaves:
    return Leaves(sum(part.count for part in leaves), math.fsum(part.earned for part in leaves))


def _digest(ids: Sequence[int]) -> bytes:
    return blake2b(array("q", ids).tobytes()).digest()
