"""A step's groups, cut into the minibatches of its optimiser steps.

A group is never cut: its rollouts were compared with each other. Which group is in which minibatch follows from the recipe's seed,
the step and the epoch, so that a resumed or replayed step is cut in the same way.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence


def minibatches(groups: Sequence[str], with_loss: Collection[str], count: int, seed: str) -> list[list[str]]:
    """The groups in `count` parts, in the order of the optimiser steps; fewer where there are fewer groups with a loss, never none.

    `with_loss`: the groups that have a gradient. Both kinds are dealt out evenly: parts differ by at most one group of each. One
    part has the groups as they come.
    """
    count = max(1, min(count, len(with_loss)))
    if count == 1:
        return [list(groups)]
    place = random.Random(seed)
    parts: list[list[str]] = [[] for _ in range(count)]
    for kind in ([g for g in groups if g in with_loss], [g for g in groups if g not in with_loss]):
        ordered = sorted(kind)
        place.shuffle(ordered)
        for number, group in enumerate(ordered):
            parts[number % count].append(group)
    return parts
