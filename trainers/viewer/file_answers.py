"""What the page will ask for when it shows chosen episodes from a file: the run, each episode, its calls, its group, its credit.

Nothing is in it that other episodes say: a group has the samples that were chosen, and so has its credit, whose advantages are
those of the whole group.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct, structs

from lightning_rl.agents import callers
from lightning_rl.errors import LightningError
from trainers.viewer.one_file import address, of_run
from trainers.viewer.records import (
    CallNode,
    EpisodePage,
    EpisodeRow,
    EpisodeView,
    Facets,
    GroupView,
    Indexing,
    Range,
    RewardView,
    Runs,
)
from trainers.viewer.texts import short

if TYPE_CHECKING:
    from trainers.credit_view.report import GroupReport, RuleCredit
    from trainers.viewer.episode_view import Index
    from trainers.viewer.library import Book
    from trainers.viewer.opened import OpenRun
    from trainers.viewer.places import Place

Asking = tuple[str, Callable[[], Any]]
"""An address, and what makes its answer; that may raise LightningError, where there is none."""
TRAIN = "train"


class Chosen(Struct, frozen=True):
    """An index of the chosen episodes alone."""

    index: Index
    ids: frozenset[str]

    def group(self, name: str, /) -> Sequence[str]:
        return [id for id in self.index.group(name) if id in self.ids]

    def neighbours(self, episode_id: str, /) -> tuple[str | None, str | None]:
        """`linked` knows them."""
        return None, None


class Shown(Struct, frozen=True):
    """A chosen episode."""

    view: EpisodeView
    agents: list[str]
    """In the order of their first calls."""

    @property
    def order(self) -> tuple[int | str, ...]:
        view = self.view
        return view.step, view.phase, view.task, view.sample, view.attempt, view.id


def shown(run: OpenRun, chosen: Chosen, id: str) -> Shown:
    """Raises NotThere, and StoreError where the store is damaged."""
    from trainers.viewer.episode_view import episode_view, outline_of

    view = episode_view(run, chosen, id)
    named = callers(outline_of(run.store, id).episode)
    return Shown(view, list(dict.fromkeys(short(caller.agent) for caller in named.values() if caller.agent)))


def askings(place: Place, book: Book, chosen: Chosen, episodes: Sequence[Shown]) -> Iterator[Asking]:
    """`episodes` in the order in which one leads to the next."""
    from lightning_rl.credit import RULES
    from trainers.viewer.call_view import call_view
    from trainers.viewer.runs import Runs as Files

    run, of = book.run, functools.partial(of_run, place.key)
    entry = Files().entry(place)
    views = [episode.view for episode in episodes]
    rows = [row_of(episode) for episode in episodes]
    groups = {view.group for view in views if view.siblings}
    yield "runs", lambda: Runs(runs=[entry], place=entry.name, chosen=place.key)
    yield of(), lambda: Files().detail(place)
    yield of("episodes"), lambda: page_of(rows)
    yield of("facets"), lambda: facets_of(rows)
    for view in linked(views):
        yield address(of("episode"), {"id": view.id}), functools.partial(_itself, view)
        for node in view.nodes:
            if isinstance(node, CallNode):
                yield address(of("call"), {"id": node.id}), functools.partial(call_view, run, node.id)
    for group in sorted(groups):
        yield address(of("group"), {"name": group}), functools.partial(group_of, run, chosen, group, groups)
    if run.recipe is None:
        return
    for group in dict.fromkeys(view.group for view in views if view.phase == TRAIN and view.group):
        for rules in ([], *([rule] for rule in RULES)):
            query = {"group": group, "rule": rules}
            yield address(of("credit"), query), functools.partial(credit_of, run, chosen, group, rules)


def group_of(run: OpenRun, chosen: Chosen, name: str, groups: Collection[str]) -> GroupView:
    """`groups`: those that are in the file."""
    from trainers.viewer.group_view import group_view

    view = group_view(run, chosen, name)
    before, after = (other if other in groups else None for other in (view.before, view.after))
    return structs.replace(view, before=before, after=after)


def credit_of(run: OpenRun, chosen: Chosen, group: str, rules: Sequence[str]) -> GroupReport:
    from trainers.viewer.credit import group_credit
    from trainers.viewer.library import NotThere

    report = group_credit(run, group, rules)
    rollouts = [rollout for rollout in report.rollouts if rollout.episode in chosen.ids]
    if not rollouts:
        raise NotThere(f"none of the chosen episodes of group {short(group)} has credit")
    calls = {call.id for rollout in rollouts for call in rollout.calls}

    def of_chosen(credit: RuleCredit) -> RuleCredit:
        return structs.replace(credit, calls={id: given for id, given in credit.calls.items() if id in calls})

    absent = len(report.rollouts) - len(rollouts)
    note = f"{absent} of the group's {len(report.rollouts)} rollouts are not in this file; they are in what advantages compare"
    return structs.replace(
        report,
        rollouts=rollouts,
        own=of_chosen(report.own),
        others=[of_chosen(credit) for credit in report.others],
        notes=[*report.notes, note] if absent else report.notes,
    )


def said(asking: Asking) -> tuple[str, Any] | None:
    """None where there is nothing: a call that cannot be read, a group without credit."""
    name, answer = asking
    with contextlib.suppress(LightningError):
        return name, answer()
    return None


def linked(views: Sequence[EpisodeView]) -> Iterator[EpisodeView]:
    """Each leads to its neighbours in the file."""
    ids = [None, *(view.id for view in views), None]
    for view, before, after in zip(views, ids, ids[2:], strict=False):
        yield structs.replace(view, before=before, after=after)


def row_of(episode: Shown) -> EpisodeRow:
    view = episode.view
    calls = [node for node in view.nodes if isinstance(node, CallNode)]
    versions = [version for call in calls for version in call.versions]
    rewards: Counter[str] = Counter()
    for reward in all_rewards(view):
        rewards[reward.name] += reward.value  # type: ignore[assignment]  # a Counter adds up any numbers
    return EpisodeRow(
        id=view.id,
        phase=view.phase,
        step=view.step,
        task=view.task,
        sample=view.sample,
        attempt=view.attempt,
        group=view.group,
        outcome=view.outcome,
        counted=view.counted,
        rewards=dict(rewards),
        calls=len(calls),
        tokens=sum(call.sampled_tokens for call in calls),
        agents=episode.agents,
        versions=[min(versions), max(versions)] if versions else [],
        started_at=view.started_at,
        seconds=None if view.ended_at is None else view.ended_at - view.started_at,
    )


def all_rewards(view: EpisodeView) -> list[RewardView]:
    return [*view.rewards, *(reward for node in view.nodes for reward in node.rewards)]


def page_of(rows: Sequence[EpisodeRow]) -> EpisodePage:
    latest = sorted(rows, key=lambda row: row.started_at, reverse=True)
    return EpisodePage(
        rows=latest, offset=0, matched=len(rows), total=len(rows), revision=0, indexing=_indexed(len(rows))
    )


def facets_of(rows: Sequence[EpisodeRow]) -> Facets:
    names = sorted({name for row in rows for name in row.rewards})
    versions = [version for row in rows for version in row.versions]
    return Facets(
        phases=dict(Counter(row.phase for row in rows)),
        outcomes=dict(Counter("running" if row.outcome is None else str(row.outcome) for row in rows)),
        agents=dict(Counter(agent for row in rows for agent in row.agents)),
        rewards={name: _range([row.rewards[name] for row in rows if name in row.rewards]) for name in names},
        steps=_range([row.step for row in rows]),
        versions=_range(versions) if versions else None,
        calls=_range([row.calls for row in rows]),
        tokens=_range([row.tokens for row in rows]),
        revision=0,
        indexing=_indexed(len(rows)),
    )


def _range(values: Sequence[float]) -> Range:
    return Range(low=min(values, default=0.0), high=max(values, default=0.0))


def _indexed(count: int) -> Indexing:
    return Indexing(done=count, total=count)


def _itself(view: EpisodeView) -> EpisodeView:
    return view
