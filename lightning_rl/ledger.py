"""Every sampled token is accounted for: trained, merged, masked, truncated or dropped, with the reason.

The sampled tokens are counted in the episodes, the rest where the training data were made, so a token lost on the way
shows: `check` raises unless the two sides are equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from msgspec import Struct

from lightning_rl.episode import Episode
from lightning_rl.errors import LedgerError
from lightning_rl.token_tree import TokenTree
from lightning_rl.transition import Transition


class Ledger(Struct, frozen=True, kw_only=True):
    """Numbers of sampled tokens."""

    sampled: int = 0
    """In all calls of all attempts."""
    trained: int = 0
    """With a loss, at a position of their own."""
    merged: int = 0
    """With a loss, at a position shared with the same token of another call: computed once, for both."""
    masked: dict[str, int] = {}
    """In transitions without a loss, by `transition.Mask`."""
    truncated: dict[str, int] = {}
    """Cut from transitions with a loss, by reason: `row_limit`."""
    dropped: dict[str, int] = {}
    """In attempts that do not count, by outcome (`running` if it has none)."""

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(
            sampled=self.sampled + other.sampled,
            trained=self.trained + other.trained,
            merged=self.merged + other.merged,
            masked=_added(self.masked, other.masked),
            truncated=_added(self.truncated, other.truncated),
            dropped=_added(self.dropped, other.dropped),
        )

    @property
    def accounted(self) -> int:
        reasons = (*self.masked.values(), *self.truncated.values(), *self.dropped.values())
        return self.trained + self.merged + sum(reasons)

    def check(self, where: str) -> None:
        """Raises LedgerError, with the table, unless every sampled token is accounted for."""
        if self.accounted != self.sampled:
            raise LedgerError(
                f"{where}: {self.sampled} tokens were sampled, {self.accounted} are accounted for\n{self.table()}",
                hint="this is a defect of Lightning RL; please report it with the table",
            )

    def table(self) -> str:
        rows = [("sampled", self.sampled), ("trained", self.trained), ("merged", self.merged)]
        for name in ("masked", "truncated", "dropped"):
            rows += [(f"{name}: {reason}", count) for reason, count in sorted(getattr(self, name).items())]
        rows.append(("difference", self.sampled - self.accounted))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {name:<{width}} {count:>10}" for name, count in rows)

    def to_dict(self) -> dict[str, int | dict[str, int]]:
        """As JSON; `Ledger.from_dict` reads it back."""
        return msgspec.structs.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, int | dict[str, int]]) -> Ledger:
        return msgspec.convert(values, cls)


def account(episodes: Iterable[Episode], transitions: Sequence[Transition], trees: Sequence[TokenTree]) -> Ledger:
    """The ledger of a step.

    `episodes` are all attempts of the step, counted or not; `transitions` those made of the counted ones; `trees` those
    that are trained on, which hold the calls of all transitions that are not masked.
    """
    sampled = 0
    dropped: Counter[str] = Counter()
    for episode in episodes:
        tokens = sum(len(call.sampled_ids) for call in episode.calls)
        sampled += tokens
        if not episode.counted:
            dropped[episode.outcome.value if episode.outcome else "running"] += tokens
    tree_of = {call_id: tree for tree in trees for call_id in tree.last_nodes}
    masked: Counter[str] = Counter()
    truncated: Counter[str] = Counter()
    positions: set[tuple[int, int]] = set()
    losses = 0
    for transition in transitions:
        if transition.masked is not None:
            masked[transition.masked.value] += len(transition.sampled_ids)
        elif (tree := tree_of.get(transition.call_id)) is not None:
            nodes = tree.sampled_nodes(transition.call_id)
            losses += len(nodes)
            positions.update((id(tree), node) for node in nodes)
            truncated["row_limit"] += len(transition.sampled_ids) - len(nodes)
    return Ledger(
        sampled=sampled,
        trained=len(positions),
        merged=losses - len(positions),
        masked=_added(masked),
        truncated=_added(truncated),
        dropped=_added(dropped),
    )


def _added(*counts: Mapping[str, int]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return {reason: number for reason, number in sorted(total.items()) if number}
