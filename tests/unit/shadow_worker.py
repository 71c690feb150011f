"""A worker without a model, for tests of the manager: it keeps in every cell what a real one would have computed there.

A cell holds (token, hash of the token prefix up to it, weights that computed it). Passes are carried out in the order
that `messages.Forward` states; every context that a row reads is checked cell by cell; a "sampled" token is a function of
the true prefix, the choice and the index of the token, so outputs do not depend on what the scheduler does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from rollout_server import messages as m
from rollout_server.manager.masking import Masker

Weights = tuple[str, int]
Cell = tuple[int, int, Weights]

VOCABULARY = 7


def chained(before: int, token: int) -> int:
    return hash((before, token))


def chain(ids: list[int]) -> int:
    value = 0
    for token in ids:
        value = chained(value, token)
    return value


def next_token(prefix: int, index: int, at: int) -> int:
    return hash((prefix, index if prefix % 3 else 0, at)) % VOCABULARY + 1


def masked(token: int, allowed: bytes | None) -> int:
    """`token`, or the first after it that is allowed, ids beyond `VOCABULARY` last."""
    if allowed is None:
        return token
    order = [*range(token, VOCABULARY + 1), *range(1, token), *range(VOCABULARY + 1, 8 * len(allowed))]
    return next(each for each in order if allowed[each >> 3] >> (each & 7) & 1)


def expected(prompt: list[int], sampling: m.SamplingParams, index: int = 0, masker: Masker | None = None) -> list[int]:
    """What choice `index` samples, alone in the world."""
    value, ids = chain(prompt), []
    while len(ids) < sampling.max_tokens and not (masker and masker.ended and not sampling.stop_ids):
        early = len(ids) < sampling.min_tokens
        allowed = masker.allowed(sampling.stop_ids, go_on=early) if masker else None
        token = masked(next_token(value, index, len(ids)), allowed)
        while early and not masker and token in sampling.stop_ids:
            token = token % VOCABULARY + 1
        ids.append(token)
        if ids[-1] in sampling.stop_ids:
            break
        if masker:
            masker.take(ids[-1])
        value = chained(value, ids[-1])
    return ids


def expected_scores(ids: list[int]) -> list[float]:
    scores, value = [], 0
    for token, after in pairwise(ids):
        value = chained(value, token)
        scores.append(float(hash((value, after)) % 1000))
    return scores


@dataclass
class Slot:
    opened: m.Open
    kept: bool = False
    """Goes on with keys and values of old weights."""
    table: list[int] = field(default_factory=list)
    last: int | None = None


@dataclass
class ShadowWorker:
    pages: int
    page_size: int
    host_pages: int = 0
    device: list[list[Cell | None]] = field(init=False)
    host: list[list[Cell | None] | None] = field(init=False)
    slots: dict[int, Slot] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=lambda: {"": 0})
    computed: set[tuple[int, Weights]] = field(default_factory=set)
    """Every prefix that was ever computed."""
    twice: int = 0
    """Tokens of prompts computed although their prefix had been."""
    step: int = 0

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.device = [[None] * self.page_size for _ in range(self.pages)]
        self.host = [None] * self.host_pages

    def keep(self, adapter: str | None) -> None:
        """Sequences of `adapter` (None: all) go on with what they have."""
        for slot in self.slots.values():
            slot.kept |= adapter is None or slot.opened.adapter == adapter

    def execute(self, forward: m.Forward) -> m.Forwarded:
        assert forward.step == self.step + 1
        self.step = forward.step
        for group in (forward.offloads, forward.restores, forward.copies):
            targets = [to for _, to in group]
            assert len(targets) == len(set(targets)), "one page is written twice at once"
        assert not {source for source, _ in forward.copies} & {to for _, to in forward.copies}
        moved = [(list(self.device[page]), host) for page, host in forward.offloads]
        for cells, host in moved:
            self.host[host] = cells
        moved_back = [(self.host[host], page) for host, page in forward.restores]
        for back, page in moved_back:
            assert back is not None, "an empty host page is restored"
            self.device[page] = list(back)
        copied = [(list(self.device[page]), to) for page, to in forward.copies]
        for cells, to in copied:
            self.device[to] = cells
        for opened in forward.opens:
            self.slots[opened.slot] = Slot(opened)
        ids: list[int] = []
        scores: list[list[float]] = []
        written: set[tuple[int, int]] = set()
        for row in forward.rows:
            self._write(row, written)
        for row in forward.rows:
            context = self._read(row)
            if row.targets:
                assert len(row.targets) == len(row.ids)
                assert self.slots[row.slot].opened.sampling is None
                prefixes = [self._cell(row.slot, row.start + i)[1] for i in range(len(row.ids))]
                scores.append([float(hash(pair) % 1000) for pair in zip(prefixes, row.targets, strict=True)])
            for draw in row.draws:
                ids.append(self._draw(draw, row, context))
        return m.Forwarded(
            step=forward.step,
            ids=ids,
            logprobs=[-float(i) for i in ids],
            entropies=[float(i) for i in ids],
            top_logprobs=[],
            scores=scores,
            seconds=0.0,
        )

    def _cell(self, slot: int, position: int) -> Cell:
        page, at = divmod(position, self.page_size)
        cell = self.device[self.slots[slot].table[page]][at]
        assert cell is not None, "a cell is read that was never written"
        return cell

    def _write(self, row: m.Row, written: set[tuple[int, int]]) -> None:
        slot = self.slots[row.slot]
        assert row.first_page <= len(slot.table), "a gap in the page table"
        assert row.ids
        if row.pages:
            slot.table[row.first_page :] = row.pages
        assert len(slot.table) * self.page_size >= row.start + len(row.ids), "a row without pages for its tokens"
        value = self._cell(row.slot, row.start - 1)[1] if row.start else 0
        weights = slot.opened.adapter, self.versions[slot.opened.adapter]
        prefill = slot.last is None and slot.opened.sampling is not None
        for i, given in enumerate(row.ids):
            token = given
            if given == -1:
                assert len(row.ids) == 1
                assert slot.last is not None
                token = slot.last
            assert slot.last is None or token == slot.last
            value = chained(value, token)
            page, at = divmod(row.start + i, self.page_size)
            assert (slot.table[page], at) not in written, "two rows write one cell"
            written.add((slot.table[page], at))
            self.device[slot.table[page]][at] = (token, value, weights)
            if not slot.kept and slot.opened.sampling is not None:
                self.twice += prefill and (value, weights) in self.computed
                self.computed.add((value, weights))

    def _read(self, row: m.Row) -> list[int]:
        """The tokens of the row's context, each cell checked."""
        slot = self.slots[row.slot]
        weights = slot.opened.adapter, self.versions[slot.opened.adapter]
        value, context = 0, []
        for position in range(row.start + len(row.ids)):
            token, prefix, by = self._cell(row.slot, position)
            value = chained(value, token)
            assert prefix == value, "a page of another prefix is read"
            assert slot.kept or by == weights, "a page of other weights is read"
            context.append(token)
        return context

    def _draw(self, draw: m.Draw, row: m.Row, context: list[int]) -> int:
        slot = self.slots[draw.slot]
        assert slot.opened.sampling is not None
        assert slot.opened.adapter == self.slots[row.slot].opened.adapter
        if slot.opened.sampling.needs_history:
            assert draw.history == context
            assert draw.prompt_length + draw.at == len(context)
        else:
            assert draw.history is None
        slot.last = masked(next_token(chain(context), slot.opened.index, draw.at), draw.allowed)
        return slot.last
