"""One sequence on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout_server.manager.prefix_tree import Node
from rollout_server.messages import SamplingParams


@dataclass
class Sequence:
    """`ids` is prompt + sampled; the first `computed` of them have keys and values in `pages`.

    A preempted sequence keeps its ids and gives up its pages: it is prefilled again and goes on where it was. Drawing those
    tokens anew would favour short samples.
    """

    number: int
    request_id: str
    ids: list[int]
    prompt_length: int
    sampling: SamplingParams | None
    """None for a sequence that is scored, not continued."""
    priority: int = 0
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    in_tree: int = 0
    """Leading pages that are in the prefix tree."""
    leaf: Node | None = None
    """Tree node of the last of them."""
    off_tree: bool = False
    """An equal prefix was inserted by another sequence: this one's further pages stay private."""
    cached_tokens: int = 0
    scores: list[float] = field(default_factory=list)

    @property
    def sampled(self) -> int:
        return len(self.ids) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.ids) - self.computed
