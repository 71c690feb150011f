"""What the scheduler knows of a grammar: a state that allows some ids next and takes in the one that was sampled.

The only implementation is `rollout_server.grammar.Matcher`; the scheduler, which is plain Python, never loads it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from lightning_rl.errors import LightningError


class GrammarError(LightningError):
    """A grammar that cannot be compiled, or cannot be followed any further, within its limits."""


def all_but(ids: Collection[int], vocab_size: int) -> bytes:
    """The mask that allows every other id."""
    mask = bytearray(b"\xff" * (vocab_size // 8))
    if vocab_size % 8:
        mask.append((1 << vocab_size % 8) - 1)
    for token in ids:
        if 0 <= token < vocab_size:
            mask[token >> 3] &= ~(1 << (token & 7))
    return bytes(mask)


class Masker(Protocol):
    """A function of the ids taken so far, and of nothing else: it outlives preemption and a worker's death."""

    def allowed(self, stop_ids: Collection[int], *, go_on: bool = False) -> bytes:
        """A mask as in `messages.Draw.allowed`. Ids of `stop_ids` are in it exactly where the text may end; with `go_on`, only
        where nothing else is.

        Raises GrammarError when it is too much work, or nothing is allowed.
        """

    def take(self, token: int) -> None:
        """`token` was sampled. Raises GrammarError when it does not fit."""

    @property
    def ended(self) -> bool:
        """Nothing but the end may follow. Raises GrammarError as `allowed` does."""

    def fork(self) -> Masker:
        """The same state, to go on from independently."""
