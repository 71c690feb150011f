"""Which replica serves a request: the one whose cache knows most of the prompt, unless it is much busier than others.

Pure and clockless. Per replica it remembers the prompts that were sent there lately, as a hash chain of chunks of
`CHUNK` tokens (a chunk's hash covers everything before it), at most as many chunks as the replica's cache holds and
least recently used first out. That is a guess at what the replica has cached, made without asking it; a wrong guess
costs a prefill, never an answer.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

CHUNK = 64
"""Tokens. Finer chunks than a few pages save no prefill worth having."""
LOAD_FACTOR = 1.5
LOAD_SLACK = 8
"""A replica is too busy for its prefixes to decide when it would have more than LOAD_FACTOR times the sequences of
the least loaded one, plus LOAD_SLACK. Decoding is bound by memory while sequences are few: a handful more costs less
than a prefill; beyond that, waiting for the busy one costs more."""


class Route(NamedTuple):
    """Give it back to `PrefixRouter.release` when the request has ended."""

    replica: int
    sequences: int
    matched: int
    """Tokens of the prompt that were sent to this replica before."""


def chunk_chain(ids: Sequence[int], root: str = "") -> list[bytes]:
    """One hash for each whole chunk: equal exactly when `root` (the adapter) and all ids up to its end are."""
    chain: list[bytes] = []
    last = root.encode()
    for start in range(0, len(ids) - CHUNK + 1, CHUNK):
        data = array("q", ids[start : start + CHUNK]).tobytes()
        last = blake2b(last + data, digest_size=16).digest()
        chain.append(last)
    return chain


class PrefixRouter:
    """`capacity`: tokens that one replica's cache holds."""

    def __init__(self, replicas: int, capacity: int) -> None:
        self.loads = [0] * replicas
        """Sequences that each replica is working on."""
        self._capacity = max(1, capacity // CHUNK)
        self._known: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(replicas)]

    def route(self, ids: Sequence[int], sequences: int, root: str = "", among: Collection[int] | None = None) -> Route:
        """A place for `sequences` choices of one prompt, which stay together; their load counts from now on.

        `among`: the replicas that can serve, at least one; None: all.
        """
        among = range(len(self.loads)) if among is None else among
        if len(among) == 1:
            (only,) = among
            self.loads[only] += sequences
            return Route(only, sequences, 0)
        chain = chunk_chain(ids, root)
        matches = {replica: self._match(replica, chain) for replica in among}
        replica = self._choose(matches, sequences)
        self._remember(replica, chain)
        self.loads[replica] += sequences
        return Route(replica, sequences, matches[replica] * CHUNK)

    def release(self, route: Route) -> None:
        self.loads[route.replica] -= route.sequences

    def least_loaded(self, among: Collection[int] | None = None) -> int:
        """Among equals the one with fewest prefixes, so that caches fill evenly."""
        among = range(len(self.loads)) if among is None else among
        return min(among, key=lambda replica: (self.loads[replica], len(self._known[replica]), replica))

    def _choose(self, matches: Mapping[int, int], sequences: int) -> int:
        least = self.least_loaded(matches)
        bound = LOAD_FACTOR * (self.loads[least] + sequences) + LOAD_SLACK
        open_ = [replica for replica in matches if self.loads[replica] + sequences <= bound]
        best = max(matches[replica] for replica in open_)
        if best == 0:
            return least
        return min((r for r in open_ if matches[r] == best), key=lambda replica: (self.loads[replica], replica))

    def _match(self, replica: int, chain: Sequence[bytes]) -> int:
        known = self._known[replica]
        return next((at for at, key in enumerate(chain) if key not in known), len(chain))

    def _remember(self, replica: int, chain: Sequence[bytes]) -> None:
        known = self._known[replica]
        for key in reversed(chain):  # a chunk is forgotten before those that it builds on
            known[key] = None
            known.move_to_end(key)
        while len(known) > self._capacity:
            known.popitem(last=False)
