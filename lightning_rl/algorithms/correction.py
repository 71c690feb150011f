"""Correction for the difference between trainer and server: w = π_old / μ, and the constant c that comes of it.

    none              c = 1
    truncate          c = min(max(w, low), high)                      truncated importance sampling (TIS)
    mask              c = w where low ≤ w ≤ high, else 0              masked importance sampling (MIS)
    icepop            c = w where low ≤ w ≤ high, else 0              as `mask`, with bounds on both sides: arXiv 2510.18855
    sequence_mask     c = w where low ≤ (Π w)^(1/n) ≤ high, else 0    the geometric mean over the n tokens of the call
    decoupled         c = min(max(w, low), high)                      as `truncate`, unbounded: decoupled PPO, arXiv 2110.00641

At level `token`, w is the token's own; at level `sequence` it is the product over its call. What a call loses by a mask is not
given to others: the weights of the step's mean stay as they were. Tokens whose μ is of another distribution (`correctable` is
false) have c = 1 and are no part of their call's product or mean. Each kind has bounds of its own where a recipe names none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rl.algorithms.kl import LARGEST_LOG_RATIO
from lightning_rl.algorithms.sequences import sequence_means, sequence_sums
from lightning_rl.algorithms.settings import Correction, CorrectionKind, Level

if TYPE_CHECKING:
    from torch import Tensor

BOUNDS: dict[CorrectionKind, tuple[float, float]] = {
    "none": (0.0, float("inf")),
    "truncate": (0.0, 2.0),
    "mask": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "sequence_mask": (0.5, 2.0),
    "decoupled": (0.0, float("inf")),
}


def correction(
    kind: CorrectionKind, level: Level = "token", low: float | None = None, high: float | None = None
) -> Correction:
    """With the kind's own bounds where none are given."""
    own_low, own_high = BOUNDS[kind]
    return Correction(
        kind=kind, level=level, low=own_low if low is None else low, high=own_high if high is None else high
    )


def corrections(log_weight: Tensor, correctable: Tensor, sequences: Tensor, settings: Correction) -> Tensor:
    """c of each token, [L], without gradient.

    `log_weight`: log π_old − log μ, [L]. `correctable`: bool, [L]. `sequences`: the number of the token's call, int64, [L].
    """
    if settings.kind == "none":
        return log_weight.new_ones(log_weight.shape)
    log_weight = log_weight.detach().where(correctable, 0.0)
    level = sequence_sums(log_weight, sequences) if settings.level == "sequence" else log_weight
    weight = level.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    match settings.kind:
        case "truncate" | "decoupled":
            constant = weight.clamp(settings.low, settings.high)
        case "mask" | "icepop":
            constant = weight.where((weight >= settings.low) & (weight <= settings.high), 0.0)
        case "sequence_mask":
            mean = sequence_means(log_weight, sequences, of=correctable).exp()
            constant = weight.where((mean >= settings.low) & (mean <= settings.high), 0.0)
    return constant.where(correctable, 1.0)
