"""How many prompt tokens had to be computed: the radix tree's unique tokens, less those that decoding computed.

Every (adapter, prefix) needs its keys and values once. A prompt computes the nodes of the trie that are not there yet;
decoding computes the nodes of the answer, except its last id, which is sampled but never fed. The count is a lower
bound for any engine that keeps everything; one whose cache holds the scenario and shares by token reaches it exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rollout_server.bench.scenarios import Scenario
from rollout_server.bench.transcript import Request, Transcript, requests


class Trie:
    """The prefixes of the sequences inserted so far. Paths without a branch are one edge: memory is one entry a token."""

    def __init__(self) -> None:
        self._root = _Node([])

    def insert(self, ids: list[int]) -> int:
        """How many of the prefixes of `ids` are new."""
        node, at = self._root, 0
        while at < len(ids):
            child = node.children.get(ids[at])
            if child is None:
                node.children[ids[at]] = _Node(ids[at:])
                return len(ids) - at
            shared = _common_prefix(child.edge, ids, at)
            if shared < len(child.edge):
                child.split(shared)
            node, at = child, at + shared
        return 0


class _Node:
    __slots__ = ("children", "edge")

    def __init__(self, edge: list[int]) -> None:
        self.edge = edge
        self.children: dict[int, _Node] = {}

    def split(self, at: int) -> None:
        rest = _Node(self.edge[at:])
        rest.children = self.children
        self.edge, self.children = self.edge[:at], {rest.edge[0]: rest}


def _common_prefix(edge: list[int], ids: list[int], at: int) -> int:
    limit = min(len(edge), len(ids) - at)
    if edge[:limit] == ids[at : at + limit]:
        return limit
    return next(i for i in range(limit) if edge[i] != ids[at + i])


def new_tokens(asked: Iterable[Request]) -> Iterator[int]:
    """Per request, in the order of submission: its prompt tokens that nothing before it computed."""
    tries: dict[str, Trie] = {}
    unfinished: list[Request] = []
    for request in asked:
        now = request.exchange.submitted
        for ended in sorted((r for r in unfinished if r.exchange.ended <= now), key=lambda r: r.exchange.ended):
            for choice in ended.exchange.choices:
                tries[ended.turn.adapter].insert(ended.prompt + choice.ids[:-1])
        unfinished = [r for r in unfinished if r.exchange.ended > now] + [request]
        yield tries.setdefault(request.turn.adapter, Trie()).insert(request.prompt)


def unique_tokens(scenario: Scenario, transcript: Transcript) -> int:
    return sum(new_tokens(requests(scenario, transcript)))
