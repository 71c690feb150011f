"""Every sampled token is accounted for: trained, merged, masked, truncated or dropped, with the reason.

The sampled tokens are counted in the episodes, the rest where the training data were made, so a token lost on the way
shows: `check` raises unless the two sides are equal, for all agents together and for each.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct, structs

from lightning_rl.agents import callers
from lightning_rl.episode import Episode
from lightning_rl.errors import LedgerError
from lightning_rl.token_tree import TokenTree
from lightning_rl.transition import Transition

UNKNOWN_AGENT = "(unknown)"
"""Who made a call where nobody knows, and all of a ledger that was written before agents were told apart."""


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
    by_agent: dict[str, dict[str, int]] = {}
    """The same by the agent that sampled (`agents.callers`), under `sampled`, `trained`, `merged`, `masked/<reason>`,
    `truncated/<reason>` and `dropped/<outcome>`; zeros are left out. A position that two agents share is trained for the first."""

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(
            sampled=self.sampled + other.sampled,
            trained=self.trained + other.trained,
            merged=self.merged + other.merged,
            masked=_added(self.masked, other.masked),
            truncated=_added(self.truncated, other.truncated),
            dropped=_added(self.dropped, other.dropped),
            by_agent={
                agent: _added(self.by_agent.get(agent, {}), other.by_agent.get(agent, {}))
                for agent in sorted({*self.by_agent, *other.by_agent})
            },
        )

    @property
    def totals(self) -> dict[str, int]:
        """All of it under the names of `by_agent`."""
        parts = {f"{kind}/{reason}": n for kind in REASONS for reason, n in getattr(self, kind).items()}
        return _added({"sampled": self.sampled, "trained": self.trained, "merged": self.merged, **parts})

    @property
    def accounted(self) -> int:
        reasons = (*self.masked.values(), *self.truncated.values(), *self.dropped.values())
        return self.trained + self.merged + sum(reasons)

    def check(self, where: str) -> None:
        """Raises LedgerError, with the table, unless every sampled token is accounted for, in all and of each agent."""
        hint = "this is a defect of Lightning RL; please report it with the table"
        if self.accounted != self.sampled:
            raise LedgerError(
                f"{where}: {self.sampled} tokens were sampled, {self.accounted} are accounted for\n{self.table()}",
                hint=hint,
            )
        for agent, counts in self.by_agent.items():
            sampled = counts.get("sampled", 0)
            if sum(counts.values()) != 2 * sampled:
                raise LedgerError(
                    f"{where}: the agent {agent} sampled {sampled} tokens, {sum(counts.values()) - sampled} are accounted "
                    f"for\n{self.table()}",
                    hint=hint,
                )
        if _added(*self.by_agent.values()) != self.totals:
            raise LedgerError(
                f"{where}: what the agents sampled is not what was sampled in all\n{self.table()}", hint=hint
            )

    def table(self) -> str:
        rows = [("sampled", self.sampled), ("trained", self.trained), ("merged", self.merged)]
        for name in REASONS:
            rows += [(f"{name}: {reason}", count) for reason, count in sorted(getattr(self, name).items())]
        rows.append(("difference", self.sampled - self.accounted))
        for agent, counts in self.by_agent.items():
            rows += [(f"{agent}: {reason}", count) for reason, count in counts.items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {name:<{width}} {count:>10}" for name, count in rows)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `Ledger.from_dict` reads it back."""
        return msgspec.structs.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Ledger:
        """A ledger without `by_agent`, of an older version, is all of an unknown agent."""
        read = msgspec.convert(values, cls)
        if "by_agent" in values or not read.totals:
            return read
        return structs.replace(read, by_agent={UNKNOWN_AGENT: read.totals})


REASONS = ("masked", "truncated", "dropped")


def account(episodes: Iterable[Episode], transitions: Sequence[Transition], trees: Sequence[TokenTree]) -> Ledger:
    """The ledger of a step.

    `episodes` are all attempts of the step, counted or not; `transitions` those made of the counted ones; `trees` those
    that are trained on, which hold the calls of all transitions that are not masked.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    agent_of: dict[str, str] = {}
    for episode in episodes:
        callers_of = callers(episode)
        for call in episode.calls:
            agent = agent_of[call.id] = callers_of[call.id].agent or UNKNOWN_AGENT
            counts[agent]["sampled"] += len(call.sampled_ids)
            if not episode.counted:
                outcome = episode.outcome.value if episode.outcome else "running"
                counts[agent][f"dropped/{outcome}"] += len(call.sampled_ids)
    tree_of = {call_id: tree for tree in trees for call_id in tree.last_nodes}
    positions: set[tuple[int, int]] = set()
    for transition in transitions:
        own = counts[agent_of.get(transition.call_id, UNKNOWN_AGENT)]
        if transition.masked is not None:
            own[f"masked/{transition.masked.value}"] += len(transition.sampled_ids)
        elif (tree := tree_of.get(transition.call_id)) is not None:
            nodes = {(id(tree), node) for node in tree.sampled_nodes(transition.call_id)}
            new = nodes - positions
            positions |= new
            own["trained"] += len(new)
            own["merged"] += len(nodes) - len(new)
            own["truncated/row_limit"] += len(transition.sampled_ids) - len(nodes)
    by_agent = {agent: _added(counts[agent]) for agent in sorted(counts)}
    return _of_agents({agent: own for agent, own in by_agent.items() if own})


def _of_agents(by_agent: dict[str, dict[str, int]]) -> Ledger:
    total = _added(*by_agent.values())
    reasons = {
        kind: {name.removeprefix(f"{kind}/"): count for name, count in total.items() if name.startswith(f"{kind}/")}
        for kind in REASONS
    }
    return Ledger(
        sampled=total.get("sampled", 0),
        trained=total.get("trained", 0),
        merged=total.get("merged", 0),
        masked=reasons["masked"],
        truncated=reasons["truncated"],
        dropped=reasons["dropped"],
        by_agent=by_agent,
    )


def _added(*counts: Mapping[str, int]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return {reason: number for reason, number in sorted(total.items()) if number}
