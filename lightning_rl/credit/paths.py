"""Which calls of a rollout follow which: in time, but for alternatives, which fork it, and for joins behind them.

A call is an alternative to another one if neither can have known what the other sampled: choices of one request, extensions of
the same call, and the same prompt asked while the other was still being answered. Alternatives follow the same, and what extends
one of them follows that one. The same prompt asked again afterwards is no alternative: something happened in between.

A call that extends none of the alternatives that are open (a judge after n choices, the next agent after parallel branches) joins
them: it follows all their loose ends, and what is done from there on follows from every one of them. A call that extends the one
before the fork is an alternative, though, until something has joined them: nothing tells it from one more branch.

Linear in the number of calls, but for a fork in the middle of what had been one path, which moves what lies behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from lightning_rl.credit.records import Rollout
from lightning_rl.episode import Call


class Paths(Struct, frozen=True, kw_only=True):
    """Of one rollout, by call id."""

    order: list[Call]
    """By arrival, choices of one request beside the first of them; each call comes after those that it follows."""
    follows: dict[str, tuple[str, ...]]
    """None for the first, several for a join. Alternatives have equal ones, and no others share any of them."""
    trunk: dict[str, str | None]
    """The last call that all paths to this one lead through; None if they share none."""
    joined: frozenset[str]
    """Calls between a fork and its join: with their alternatives they led to the same."""


class _Run:
    """Calls one after the other, and between them forks that were joined; a fork at the end is open."""

    def __init__(self, fork: _Fork | None) -> None:
        self.fork = fork
        """Of which it is a branch."""
        self.items: list[str | _Fork] = []


class _Fork:
    def __init__(self, run: _Run) -> None:
        self.run = run
        """In which it is an item."""
        self.branches: list[_Run] = []
        """Each begins with a call."""
        self.joined = False

    def join(self) -> tuple[str, ...]:
        """The loose ends, which are none from now on, in order of branches."""
        self.joined = True
        ends: list[str] = []
        look = [*reversed(self.branches)]
        while look:
            last = look.pop().items[-1]
            if isinstance(last, _Fork):
                last.joined = True
                look += reversed(last.branches)
            else:
                ends.append(last)
        return tuple(ends)


class _Builder:
    def __init__(self) -> None:
        self.top = _Run(None)
        self.place: dict[str, tuple[_Run, int]] = {}
        self.follows: dict[str, tuple[str, ...]] = {}
        self.trunk: dict[str, str | None] = {}

    def region(self, call: str | None) -> _Run:
        """The run at whose end lies what is open behind the call, or behind all."""
        run = self.top if call is None else self.place[call][0]
        while run.fork is not None and run.fork.joined:
            run = run.fork.run
        return run

    def is_joined(self, call: str) -> bool:
        return self.region(call) is not self.place[call][0]

    def append(self, call: str, base: str | None) -> None:
        """Behind all that is open behind `base`."""
        run = self.region(base)
        last = run.items[-1] if run.items else None
        if isinstance(last, _Fork):
            self.follows[call], self.trunk[call] = last.join(), self.trunk[_head(last.branches[0])]
        else:
            self.follows[call], self.trunk[call] = (() if last is None else (last,)), last
        self._put(call, run)

    def fork(self, call: str, elder: str) -> None:
        """Beside `elder`, which is not joined."""
        run, at = self.place[elder]
        if at > 0 or run.fork is None:
            fork, behind = _Fork(run), run.items[at:]
            run.items[at:] = [fork]
            moved = _Run(fork)
            fork.branches.append(moved)
            for item in behind:
                self._put(item, moved)
        else:
            fork = run.fork
        branch = _Run(fork)
        fork.branches.append(branch)
        self.follows[call], self.trunk[call] = self.follows[elder], self.trunk[elder]
        self._put(call, branch)

    def _put(self, item: str | _Fork, run: _Run) -> None:
        if isinstance(item, _Fork):
            item.run = run
        else:
            self.place[item] = (run, len(run.items))
        run.items.append(item)


def _head(run: _Run) -> str:
    head = run.items[0]
    assert isinstance(head, str)
    return head


def paths_of(rollout: Rollout, prompts: dict[str, bytes]) -> Paths:
    """`prompts`: a digest of each call's prompt, by call id."""
    built = _Builder()
    by_response: dict[str, str] = {}
    by_base: dict[str, str] = {}
    by_prompt: dict[bytes, Call] = {}
    order = _choices_together(rollout.calls)
    for call in order:
        base = call.parent_id if call.parent_id in built.follows else None
        same = by_prompt.get(prompts[call.id])
        elder = by_response.get(call.response_id)
        if elder is None and base is not None:
            elder = by_base.get(base)
        if elder is None and same is not None and call.started_at < same.ended_at:
            elder = same.id
        if elder is None or built.is_joined(elder):
            built.append(call.id, base)
            if base is not None:
                by_base[base] = call.id
        else:
            built.fork(call.id, elder)
            if base is not None:
                by_base.setdefault(base, call.id)
        if call.response_id:
            by_response.setdefault(call.response_id, call.id)
        if same is None or call.ended_at >= same.ended_at:
            by_prompt[prompts[call.id]] = call
    return Paths(
        order=order,
        follows=built.follows,
        trunk=built.trunk,
        joined=frozenset(call.id for call in order if built.is_joined(call.id)),
    )


def _choices_together(calls: Sequence[Call]) -> list[Call]:
    choices: dict[str, list[Call]] = {}
    for call in calls:
        choices.setdefault(call.response_id or f"call {call.id}", []).append(call)
    return [call for together in choices.values() for call in together]
