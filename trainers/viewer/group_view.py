"""The samples of a group beside each other: what all share at first, and what each said after that, the best first.

What a sample said is one list, whatever conversations its agents held: its calls in order, of each what its request says that
none before it did, and the reply. So sub-agents stand where they were called, nothing is there twice, and a prompt that was sent
again, or edited, shows what is new in it. Samples that never made a call share nothing with anybody and are left out of
the comparison. Of an edited or cut text the whole is compared, not what a view has of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from lightning_rl.episode import Call
from lightning_rl.store.deltas import ID_BYTES, shared_start
from lightning_rl.store.outlines import Outline, load_groups
from lightning_rl.token_tree import common_prefix
from tracers.commands.conversation import Message, all_said, replied
from trainers.viewer.episode_view import Index, Nodes, outline_of, shown_step, total_of, weights_of
from trainers.viewer.library import NotThere
from trainers.viewer.opened import OpenRun
from trainers.viewer.records import GroupView, SampleMessage, SampleView
from trainers.viewer.texts import Cut, short


class Line(Struct, frozen=True):
    """A message of a sample."""

    message: Message
    call: Call
    """Whose request or reply it is of."""
    news: int | None
    """Its number in what the request says that is new; None for the reply."""

    @property
    def said(self) -> tuple[bool, Message]:
        """Equal for the same words by the policy, and for the same by others."""
        return self.news is None, self.message


class _Sample(Struct, frozen=True):
    outline: Outline
    lines: list[Line]
    total: float | None

    @property
    def order(self) -> tuple[bool, float, int, int]:
        """The best first; without rewards last."""
        start = self.outline.episode.start
        return self.total is None, -(self.total or 0.0), start.sample, start.attempt


def group_view(run: OpenRun, index: Index, name: str) -> GroupView:
    """Raises NotThere, and StoreError where the store is damaged."""
    ids = index.group(name) if name else []
    weights = weights_of(run)
    samples = [_sample(outline_of(run.store, id), weights) for id in ids]
    if not samples:
        raise NotThere(f"there is no group {short(name)}", hint="groups are those of training: STEP/TASK, from step 0")
    samples.sort(key=lambda sample: sample.order)
    spoken = [sample for sample in samples if sample.lines]
    shared = _shared([[line.said for line in sample.lines] for sample in spoken])
    best = samples[0]
    first = spoken[0] if spoken else best
    start = best.outline.episode.start
    before, after = _neighbours(run, start.phase, start.step, name)
    cut = Cut()
    return GroupView(
        group=name,
        phase=start.phase,
        step=shown_step(start.phase, start.step),
        task=start.task.id,
        task_input=cut(start.task.input, start.id, "task_input"),
        shared=_messages(first, first.lines[:shared], cut),
        shared_tokens=shared_tokens([sample.outline for sample in spoken]),
        samples=[_view(sample, best, shared, cut) for sample in samples],
        before=before,
        after=after,
    )


def lines_of(outline: Outline) -> list[Line]:
    """What was said in an episode, call by call."""
    said = all_said(outline.episode.calls)
    lines = []
    for call in sorted(outline.episode.calls, key=lambda call: (call.index, call.id)):
        lines += [Line(message, call, number) for number, message in enumerate(said[call.id].news)]
        lines.append(Line(replied(call), call, None))
    return lines


def shared_tokens(outlines: Sequence[Outline]) -> int:
    """How many prompt + sampled ids the first calls of all have in common."""
    firsts = [min(o.episode.calls, key=lambda call: (call.index, call.id)).id for o in outlines if o.episode.calls]
    sequences = [outline.tokens[id].sequence for outline, id in zip(outlines, firsts, strict=True)]
    if not sequences:
        return 0
    return min(shared_start(sequences[0], other) // ID_BYTES for other in sequences)


def same_characters(one: Message, other: Message) -> int:
    """Of text, then names and arguments of tools; none if the roles differ."""
    return common_prefix(_letters(one), _letters(other)) if one.role == other.role else 0


def _letters(message: Message) -> str:
    return message.text + "".join(part for tool in message.tools for part in tool)


def _sample(outline: Outline, weights: Mapping[str, float]) -> _Sample:
    return _Sample(outline, lines_of(outline), total_of(outline.episode.rewards, weights))


def _shared(lists: Sequence[Sequence[tuple[bool, Message]]]) -> int:
    return min((common_prefix(lists[0], other) for other in lists), default=0)


def _view(sample: _Sample, best: _Sample, shared: int, cut: Cut) -> SampleView:
    episode, own = sample.outline.episode, sample.lines[shared:]
    rewards: dict[str, float] = {}
    for reward in episode.rewards:
        key = short(reward.name)
        rewards[key] = rewards.get(key, 0.0) + reward.value
    same = 0
    if sample is not best and own and best.lines[shared:]:
        same = same_characters(own[0].message, best.lines[shared].message)
    return SampleView(
        episode=episode.id,
        sample=episode.start.sample,
        attempt=episode.start.attempt,
        outcome=episode.outcome,
        counted=episode.counted,
        total=sample.total,
        rewards=rewards,
        error=cut.or_none(episode.error, episode.id, "error"),
        answer=cut.or_none(episode.answer, episode.id, "answer"),
        messages=_messages(sample, own, cut),
        same_characters=same,
        tokens=sum(tokens.sampled for tokens in sample.outline.tokens.values()),
    )


def _messages(sample: _Sample, lines: Sequence[Line], cut: Cut) -> list[SampleMessage]:
    nodes = Nodes(sample.outline, {}, cut)
    return [
        SampleMessage(
            call=line.call.id if line.news is None else None,
            message=nodes.message(line.call, line.message, *(("reply",) if line.news is None else ("news", line.news))),
        )
        for line in lines
    ]


def _neighbours(run: OpenRun, phase: str, step: int, name: str) -> tuple[str | None, str | None]:
    names = run.store.read(lambda connection: load_groups(connection, phase, step))
    at = names.index(name) if name in names else -1
    if at < 0:
        return None, None
    return names[at - 1] if at else None, names[at + 1] if at + 1 < len(names) else None
