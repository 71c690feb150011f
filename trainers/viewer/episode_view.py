"""One episode to look at: the tree of what happened in it, and what each call said that was new. And one text of it as a whole.

Only the store's outline is read, so it costs about what was said, however often prompts repeat it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from msgspec import Struct

from lightning_rl.credit.returns import reward_weight
from lightning_rl.episode import Call, Reward, Span
from lightning_rl.episode_tree import Node, episode_tree
from lightning_rl.store import EpisodeSummary, Store
from lightning_rl.store.outlines import Outline, load_chosen, load_outline
from tracers.commands.conversation import Message, Said, all_said, replied
from trainers.viewer.library import NotThere
from trainers.viewer.opened import OpenRun
from trainers.viewer.records import (
    CallNode,
    EpisodeView,
    MessageView,
    RewardView,
    Sibling,
    SpanNode,
    Text,
    ToolCallView,
)
from trainers.viewer.relations import earlier_call
from trainers.viewer.texts import Cut, Sought, finite, place_of, short

_SAID_ELSEWHERE = ("call_id", "tool_call_id", "arguments", "result")
"""Attributes of a tool's spans that a node shows by themselves, or that say nothing to a reader."""
TRAIN = "train"


class Index(Protocol):
    """What views ask of an `EpisodeIndex`."""

    def group(self, name: str, /) -> Sequence[str]: ...

    def neighbours(self, episode_id: str, /) -> tuple[str | None, str | None]: ...


class Nodes(Struct, frozen=True):
    """Makes the nodes of an episode's tree."""

    outline: Outline
    weights: Mapping[str, float]
    cut: Cut

    def all(self) -> list[SpanNode | CallNode]:
        return self._made(episode_tree(self.outline.episode))

    def of_call(self, call_id: str) -> CallNode:
        """One of them, without making the others."""
        tree = [node for node in episode_tree(self.outline.episode) if node.event.id == call_id]
        return next(node for node in self._made(tree) if isinstance(node, CallNode))

    def _made(self, tree: Sequence[Node]) -> list[SpanNode | CallNode]:
        said = all_said(self.outline.episode.calls)
        at: dict[str | None, list[Reward]] = {}
        for reward in self.outline.episode.rewards:
            at.setdefault(reward.call_id or reward.span_id, []).append(reward)
        return [
            self._call(node, node.event, said[node.event.id], at)
            if isinstance(node.event, Call)
            else self._span(node, node.event, at)
            for node in tree
        ]

    def _span(self, node: Node, span: Span, at: Mapping[str | None, Sequence[Reward]]) -> SpanNode:
        use, attributes, error = node.use, span.attributes, span.error
        if span.kind == "tool":
            attributes = {key: value for key, value in attributes.items() if key not in _SAID_ELSEWHERE}
            error = use.error if use else error
        arguments = use.arguments if use else span.attributes.get("arguments")
        result = use.result if use else span.attributes.get("result")
        place = (self.outline.episode.id, "span", span.id)
        is_tool = span.kind == "tool"
        return SpanNode(
            id=span.id,
            parent=node.parent,
            depth=node.depth,
            kind=short(span.kind),
            name=short(span.name),
            started_at=span.started_at,
            ended_at=span.ended_at,
            arguments=self.cut.or_none(arguments, *place, "arguments") if is_tool else None,
            result=self.cut.or_none(result, *place, "result") if is_tool else None,
            attributes=self.cut(attributes, *place, "attributes") if attributes else None,
            error=self.cut.or_none(error, *place, "error"),
            rewards=reward_views([reward for id in node.seen_by for reward in at.get(id, ())], self.weights),
        )

    def _call(self, node: Node, call: Call, said: Said, at: Mapping[str | None, Sequence[Reward]]) -> CallNode:
        tokens = self.outline.tokens[call.id]
        return CallNode(
            id=call.id,
            parent=node.parent,
            depth=node.depth,
            index=call.index,
            agent=short(call.agent),
            model=short(call.model),
            upstream=short(call.upstream),
            redacted=call.redacted,
            restricted=call.restricted,
            finish_reason=short(call.finish_reason),
            temperature=call.temperature,
            started_at=call.started_at,
            ended_at=call.ended_at,
            prompt_tokens=tokens.prompt,
            cached_tokens=call.cached_tokens,
            sampled_tokens=tokens.sampled,
            versions=[min(call.versions), max(call.versions)] if call.versions else [],
            mean_logprob=finite(sum(call.logprobs) / len(call.logprobs)) if call.logprobs else None,
            relation=call.relation,
            continues=earlier_call(self.outline, call),
            parted_at=call.parted_at,
            news=[self.message(call, message, "news", number) for number, message in enumerate(said.news)],
            messages=said.messages,
            reply=self.message(call, replied(call), "reply"),
            rewards=reward_views(at.get(call.id, ()), self.weights),
        )

    def message(self, call: Call, message: Message, *where: str | int) -> MessageView:
        place = (self.outline.episode.id, "call", call.id, *where)
        tools = [
            ToolCallView(name=short(tool), arguments=self.cut(arguments, *place, "tool", number))
            for number, (tool, arguments) in enumerate(message.tools)
        ]
        return MessageView(role=short(message.role), text=self.cut(message.text, *place), tools=tools)


def outline_of(store: Store, episode_id: str) -> Outline:
    """Raises NotThere."""
    outline = store.read(lambda connection: load_outline(connection, episode_id))
    if outline is None:
        raise NotThere(
            f"there is no episode {short(episode_id)}", hint="the table of episodes has those that are there"
        )
    return outline


def summaries_of(store: Store, ids: Sequence[str]) -> list[EpisodeSummary]:
    """In the order of the ids; those that are not there are left out."""
    found = {summary.id: summary for summary in store.read(lambda connection: load_chosen(connection, ids))}
    return [found[id] for id in ids if id in found]


def weights_of(run: OpenRun) -> Mapping[str, float]:
    return run.recipe.reward.weights if run.recipe else {}


def shown_step(phase: str, step: int) -> int:
    """As people count: the store counts the steps of training from 0."""
    return step + 1 if phase == TRAIN else step


def total_of(rewards: Sequence[Reward], weights: Mapping[str, float]) -> float | None:
    """The weighted sum; None without rewards."""
    return math.fsum(reward_weight(reward, weights) * reward.value for reward in rewards) if rewards else None


def sum_of(rewards: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    """The same of values by name."""
    return math.fsum(weights.get(name, 1.0) * value for name, value in rewards.items()) if rewards else None


def reward_views(rewards: Sequence[Reward], weights: Mapping[str, float]) -> list[RewardView]:
    return [
        RewardView(
            name=short(reward.name),
            value=reward.value,
            weight=reward_weight(reward, weights),
            source=short(reward.source),
            time=reward.time,
        )
        for reward in rewards
    ]


def episode_view(run: OpenRun, index: Index, id: str) -> EpisodeView:
    """Raises NotThere, and StoreError where the store is damaged."""
    outline, weights, cut = outline_of(run.store, id), weights_of(run), Cut()
    episode, start = outline.episode, outline.episode.start
    before, after = index.neighbours(id)
    nodes = Nodes(outline, weights, cut).all()
    at_nodes = {*(span.id for span in episode.spans), *(call.id for call in episode.calls)}
    return EpisodeView(
        id=id,
        phase=start.phase,
        step=shown_step(start.phase, start.step),
        task=start.task.id,
        sample=start.sample,
        attempt=start.attempt,
        group=start.group,
        outcome=episode.outcome,
        counted=episode.counted,
        started_at=start.started_at,
        ended_at=episode.ended_at if episode.outcome is not None else None,
        rewards=reward_views(
            [reward for reward in episode.rewards if (reward.call_id or reward.span_id) not in at_nodes], weights
        ),
        total=total_of(episode.rewards, weights),
        nodes=nodes,
        siblings=siblings_of(run.store, index, start.group, weights),
        before=before,
        after=after,
        **_own_texts(outline, cut),
    )


def siblings_of(store: Store, index: Index, group: str, weights: Mapping[str, float]) -> list[Sibling]:
    if not group:
        return []
    return [
        Sibling(
            id=summary.id,
            sample=summary.sample,
            attempt=summary.attempt,
            outcome=summary.outcome,
            counted=summary.counted,
            rewards={short(name): value for name, value in summary.rewards.items()},
            total=sum_of(summary.rewards, weights),
        )
        for summary in summaries_of(store, index.group(group))
    ]


def whole_text(run: OpenRun, place: str) -> Text:
    """A text that a view has cut, by the place that it names. Of one beyond 20 million characters `length` says how many there are.

    Raises NotThere, and BadPlace for what is no place.
    """
    parts = place_of(place)
    sought = Sought(parts)
    outline = outline_of(run.store, str(parts[0]))
    _own_texts(outline, sought)
    if parts[1] == "span":
        Nodes(outline, {}, sought).all()
    elif parts[1] == "call" and len(parts) > 3:
        call = next((call for call in outline.episode.calls if call.id == parts[2]), None)
        if call is not None:
            request_texts(outline.episode.id, call, sought)
            Nodes(outline, {}, sought).of_call(call.id)
    if sought.found is None:
        raise NotThere("there is no text at that place", hint="it may belong to another run")
    return sought.found


def request_texts(episode_id: str, call: Call, cut: Cut) -> dict[str, Any]:
    """What a request has beside messages: fields of `CallView`."""
    rest = {key: value for key, value in call.request.items() if key not in ("messages", "input", "prompt", "tools")}
    tools = call.request.get("tools")
    place = (episode_id, "call", call.id)
    return {"tools": cut(tools, *place, "tools") if tools else None, "parameters": cut(rest, *place, "parameters")}


def _own_texts(outline: Outline, cut: Cut) -> dict[str, Any]:
    """Fields of `EpisodeView`."""
    episode = outline.episode
    return {
        "task_input": cut(episode.start.task.input, episode.id, "task_input"),
        "answer": cut.or_none(episode.answer, episode.id, "answer"),
        "error": cut.or_none(episode.error, episode.id, "error"),
    }
