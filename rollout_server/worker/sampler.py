"""From logits to sampled ids, the log-prob of each under the very distribution that it was drawn from, and its entropy.

A token is the inverse CDF of one uniform that belongs to it (see `uniforms`): what else is in the batch has no influence.
Order: bias, penalties and mask change logits, temperature divides them, then top-k, top-p and min-p filter. Draws that
filter nothing go through the backend's kernel, the others through their few kept candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from rollout_server import messages as m
from rollout_server.kernels.interface import Kernels
from rollout_server.worker.filters import Filter, Kept, keep, leading
from rollout_server.worker.logit_edits import add_biases, mask, penalise
from rollout_server.worker.slots import Bias, Settings
from rollout_server.worker.transfer import to_device
from rollout_server.worker.uniforms import uniforms


class Alternatives(NamedTuple):
    """The likeliest ids of some draws, for those who asked."""

    draws: list[int]
    counts: list[int]
    """How many each of `draws` asked for; fewer are given when the filters kept fewer."""
    ids: torch.Tensor
    """int64 [len(draws), most asked for], likeliest first."""
    logprobs: torch.Tensor
    """fp32, of the distribution that was sampled from; -inf where nothing is left."""


class Sampled(NamedTuple):
    """Tensors on the logits' device, one entry a draw."""

    ids: torch.Tensor
    """int64 [B]."""
    logprobs: torch.Tensor
    """fp32 [B]. Of a greedy draw: at temperature 1."""
    entropies: torch.Tensor
    """fp32 [B], in nats, of the same distributions: of a filtered draw, what the filters kept."""
    alternatives: Alternatives | None


def sample(
    logits_BV: torch.Tensor,
    settings: Settings,
    draws: Sequence[m.Draw],
    biases: Mapping[int, Bias],
    kernels: Kernels,
) -> Sampled:
    """One id a row. Keys of `biases` are rows. The logits may be edited in place; the kernel reads them in the model's own
    dtype, whoever changes or orders them gets fp32.

    Raises ValueError for a draw that cannot be made: a mask that allows nothing, a history that is missing.
    """
    if (
        biases
        or (settings["penalised"] | settings["filtered"] | (settings["top_logprobs"] > 0)).any()
        or any(draw.allowed is not None for draw in draws)
    ):
        logits_BV = logits_BV.float()
    add_biases(logits_BV, biases)
    penalise(logits_BV, settings, draws)
    mask(logits_BV, draws)
    at = np.fromiter((draw.at for draw in draws), np.uint64, len(draws))
    uniform = uniforms(settings["stream"], at)
    filtered = np.flatnonzero(settings["filtered"])
    if not filtered.size:
        temperatures, uniforms_B = to_device([settings["temperature"], uniform], logits_BV.device)
        ids, logprobs, entropies = kernels.log_softmax_sample(logits_BV, temperatures, uniforms_B)
        return Sampled(ids, logprobs, entropies, _alternatives(logits_BV, settings, {}))
    ids = torch.empty(len(draws), dtype=torch.int64, device=logits_BV.device)
    logprobs, entropies = (torch.empty(len(draws), dtype=torch.float32, device=logits_BV.device) for _ in range(2))
    plain = np.flatnonzero(~settings["filtered"])
    if plain.size:
        rows, temperatures, uniforms_B = to_device(
            [plain, settings["temperature"][plain], uniform[plain]], logits_BV.device
        )
        drawn = kernels.log_softmax_sample(logits_BV[rows], temperatures, uniforms_B)
        ids[rows], logprobs[rows], entropies[rows] = drawn
    kept_of: dict[int, tuple[Kept, int]] = {}
    for rows, kept, uniforms_n in _filter(logits_BV, settings, filtered, uniform):
        place = _inverse_cdf(kept, uniforms_n)
        ids[rows], logprobs[rows], entropies[rows] = (
            kept.ids.gather(1, place)[:, 0],
            kept.logprobs.gather(1, place)[:, 0].float(),
            torch.special.entr(kept.logprobs.exp()).sum(-1).float(),
        )
        if settings["top_logprobs"].any():
            kept_of |= {row: (kept, i) for i, row in enumerate(rows.tolist())}
    return Sampled(ids, logprobs, entropies, _alternatives(logits_BV, settings, kept_of))


def _filter(
    logits_BV: torch.Tensor, settings: Settings, filtered: npt.NDArray[np.intp], uniform: npt.NDArray[np.float64]
) -> list[tuple[torch.Tensor, Kept, torch.Tensor]]:
    """Groups of draws, what each keeps, and their uniforms."""
    chosen = settings[filtered]
    rows, temperature, top_k, top_p, min_p, uniforms_n = to_device(
        [
            filtered,
            chosen["temperature"].astype(np.float64),
            chosen["top_k"],
            chosen["top_p"],
            chosen["min_p"],
            uniform[filtered],
        ],
        logits_BV.device,
    )
    groups = keep(logits_BV[rows], Filter(temperature, top_k, top_p, min_p))
    return [(rows[which], kept, uniforms_n[which]) for which, kept in groups]


def _inverse_cdf(kept: Kept, uniforms_n: torch.Tensor) -> torch.Tensor:
    """The place [n, 1] among the kept ids where the cumulative probability exceeds the uniform."""
    cumulative = kept.logprobs.exp().cumsum(-1)
    last = (kept.counts - 1)[:, None]
    target = uniforms_n[:, None] * cumulative.gather(1, last)
    return torch.minimum(torch.searchsorted(cumulative, target, right=True), last)


def _alternatives(
    logits_BV: torch.Tensor, settings: Settings, kept_of: Mapping[int, tuple[Kept, int]]
) -> Alternatives | None:
    asked = np.minimum(settings["top_logprobs"], logits_BV.shape[1])
    draws = np.flatnonzero(asked > 0).tolist()
    if not draws:
        return None
    most = int(asked.max())
    ids = torch.zeros(len(draws), most, dtype=torch.int64, device=logits_BV.device)
    logprobs = torch.full((len(draws), most), -torch.inf, device=logits_BV.device)
    whole = [place for place, draw in enumerate(draws) if draw not in kept_of]
    if whole:
        chosen = [draws[place] for place in whole]
        temperature = settings["temperature"][chosen]
        places, rows, scale = to_device(
            [np.array(whole), np.array(chosen), np.where(temperature == 0, np.float32(1), temperature)],
            logits_BV.device,
        )
        logits = logits_BV[rows]
        best = leading(logits, most)
        ids[places] = best
        logprobs[places] = torch.log_softmax(logits / scale[:, None], -1).gather(1, best)
    for place, draw in enumerate(draws):
        if draw in kept_of:
            kept, row = kept_of[draw]
            count = min(most, kept.ids.shape[1])
            ids[place, :count] = kept.ids[row, :count]
            logprobs[place, :count] = kept.logprobs[row, :count].float()
    return Alternatives(draws, asked[draws].tolist(), ids, logprobs)
