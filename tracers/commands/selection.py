"""`--step` of commands that look at episodes: it counts as the console does, from 1; stores and ids of episodes count from 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rl.errors import StoreError

if TYPE_CHECKING:
    from lightning_rl.store import Store

TRAINING = "train"
HELP = "only this step of the training, from 1 as the console counts"


def selected(store: Store, phase: str | None, step: int | None) -> tuple[str | None, int | None]:
    """Phase and step as stores know them; a step alone is one of the training.

    Raises StoreError for a step of another phase, and for one that has no episode.
    """
    if step is None:
        return phase, None
    if phase not in (None, TRAINING):
        raise StoreError(f"--step {step}: the phase {phase} has no steps", hint=f"--phase {TRAINING} has them")
    steps = {summary.step + 1 for summary in store.starts(phase=TRAINING)}
    if step not in steps:
        known = f"it has {min(steps)} to {max(steps)}" if steps else "it has no training episode"
        raise StoreError(f"there is no step {step} of the training: {known}")
    return TRAINING, step - 1
