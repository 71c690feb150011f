"""Sums and means over the tokens of each call, given back to each of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def sequence_sums(values: Tensor, sequences: Tensor) -> Tensor:
    """[L] from [L]; `sequences`: the number of each token's call, int64, from 0."""
    if not len(values):
        return values
    number = int(sequences.max()) + 1
    return values.new_zeros(number).index_add(0, sequences, values)[sequences]


def sequence_means(values: Tensor, sequences: Tensor, of: Tensor | None = None) -> Tensor:
    """[L] from [L]: over all tokens of the call, or those that `of` (bool, [L]) is true for; 0 where there are none."""
    counted = values.new_ones(values.shape) if of is None else of.to(values.dtype)
    return sequence_sums(values * counted, sequences) / sequence_sums(counted, sequences).clamp(min=1)
