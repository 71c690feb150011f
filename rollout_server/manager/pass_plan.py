"""One pass while it is planned and while it is under way: what goes to the worker, and what waits for its results."""

from __future__ import annotations

from rollout_server.manager.sequence import Sequence
from rollout_server.messages import Forward, Open, Row


class Completion:
    """A prompt whose last token is computed in this pass; others with the same ids can draw from the same logits."""

    __slots__ = ("drawing", "row", "sequence")

    def __init__(self, sequence: Sequence, row: Row, drawing: list[Sequence]) -> None:
        self.sequence, self.row, self.drawing = sequence, row, drawing


class PassPlan:
    def __init__(self, step: int) -> None:
        self.step = step
        self.rows: list[Row] = []
        self.opens: list[Open] = []
        self.offloads: list[tuple[int, int]] = []
        self.restores: list[tuple[int, int]] = []
        self.copies: list[tuple[int, int]] = []
        self.decoding: list[Sequence] = []
        """One a draw, in row order: rows that decode come first."""
        self.completions: list[Completion] = []
        """In row order, after the rows that decode."""
        self.scored: list[tuple[Sequence, bool]] = []
        """One a row with targets, in row order; True: its last."""
        self.stalled = False
        """There are no pages, and none can be had before results arrive: nothing more is planned."""
        self.pages: list[int] = []
        """Held until the results are applied."""
        self.slots: list[int] = []
        """Not given away until the results are applied."""

    def completion_of(self, sequence: Sequence) -> Completion | None:
        """The prompt in this pass that `sequence` has in common, id by id."""
        if sequence.sampling is None:
            return None
        for completion in reversed(self.completions):
            leader = completion.sequence
            if leader.ids[-1] != sequence.ids[-1] or leader.private:
                continue
            if leader.ids == sequence.ids and leader.adapter == sequence.adapter:
                return completion
        return None

    def drawing(self) -> list[Sequence]:
        """One a draw, in the order of rows and their draws."""
        drawing = self.decoding
        for completion in self.completions:
            drawing += completion.drawing
        self.completions = []
        return drawing

    def forward(self) -> Forward:
        return Forward(
            step=self.step,
            rows=self.rows,
            opens=self.opens,
            offloads=self.offloads,
            restores=self.restores,
            copies=self.copies,
        )
