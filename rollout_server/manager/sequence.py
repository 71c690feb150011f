"""One sequence on its way through the engine, and the request that it is a choice of."""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout_server.manager.masking import Masker
from rollout_server.manager.prefix_tree import Node
from rollout_server.messages import Draw, SamplingParams


@dataclass(eq=False, slots=True)
class Request:
    request_id: str
    choices: list[Sequence] = field(default_factory=list)
    live: int = 0
    """Choices that have not ended."""
    flow: str = ""
    """Who asks."""
    queued: int = 0
    """Choices that wait."""
    start: float | None = None
    """Its place in the queue (`waiting`): the virtual time at which its turn comes."""


@dataclass(eq=False, slots=True)
class Sequence:
    """`ids` is the prompt and what is known of the sampled ids; look-ahead plans beyond it.

    The prompt and `drawn` sampled tokens are planned or done; keys and values of the first `planned` of them too. A
    preempted sequence keeps its ids and gives up its pages: it is prefilled again and goes on where it was. Drawing those
    tokens anew would favour short samples.
    """

    number: int
    """Order of arrival."""
    request: Request
    ids: list[int]
    sampling: SamplingParams | None
    """None for a sequence that is scored, not continued."""
    index: int = 0
    priority: int = 0
    adapter: str = ""
    prompt_length: int = 0
    max_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    """Tokens that are drawn without stop ids; 0 where there are none."""
    unstopped: bytes | None = None
    """What may be drawn meanwhile, if no grammar says so."""
    serial: bool = False
    """Its next pass needs the results of its last: it is never planned ahead."""
    cost: int = 1
    """Tokens that it is expected to take: the measure of fairness between flows."""
    template: Masker | None = None
    """Its grammar at the beginning, shared with others, until it runs."""
    masker: Masker | None = None
    """The same of its own, after all known ids."""
    allowed: bytes | None = None
    """What the grammar allows next."""

    slot: int = -1
    pages: list[int] = field(default_factory=list)
    room: int = 0
    """Tokens that `pages` have room for."""
    sent: int = 0
    """Leading entries of `pages` that the worker's page table has."""
    planned: int = 0
    drawn: int = 0
    last_step: int = -1
    """The newest pass that it is in."""
    leaf: Node | None = None
    """Tree node of the last page that is in the prefix tree, or its root."""
    in_tree: int = 0
    """Leading pages that are in the prefix tree."""
    tail: Node | None = None
    """The tree's node for the page after those, if it is this sequence's own."""
    private: bool = False
    """Its keys and values never enter the prefix tree: it is scored, or they are of old weights."""
    source: int = -1
    """Held page whose first cells the next page of this sequence starts as a copy of; -1 for none."""
    host_source: int = -1
    """The same in the host tier."""

    reached: int = 0
    """Tokens whose keys and values were computed once already."""
    cached_tokens: int = 0
    scores: list[float] = field(default_factory=list)
    died_at: int = -1
    """Length of `ids` when a worker last died with a pass of this sequence under way."""
    charged: bool = False
    """It has been admitted once: its flow is charged for it."""
    ended: bool = False

    @property
    def suspect(self) -> bool:
        """A worker died over it, and it has not got further since."""
        return self.died_at == len(self.ids)

    @property
    def sampled(self) -> int:
        return len(self.ids) - self.prompt_length

    @property
    def target(self) -> int:
        """Tokens to compute before the next one can be sampled, or all that are scored."""
        return self.prompt_length + self.drawn if self.sampling is not None else len(self.ids) - 1

    def draw(self) -> Draw:
        """The draw that comes next."""
        allowed = self.unstopped if self.drawn < self.min_tokens and self.masker is None else self.allowed
        if self.sampling is not None and self.sampling.needs_history:
            return Draw(
                slot=self.slot,
                at=self.drawn,
                history=self.ids,
                prompt_length=self.prompt_length,
                allowed=allowed,
            )
        return Draw(slot=self.slot, at=self.drawn, allowed=allowed)
