"""What a request changes in its logits before anything is drawn: bias, penalties, grammar mask, in this order.

All draws of a pass are edited together, in place. Bias and penalties touch the few ids concerned; only a mask touches
whole rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from rollout_server import messages as m
from rollout_server.worker.slots import Bias, Settings
from rollout_server.worker.transfer import to_device


def add_biases(logits_BV: torch.Tensor, biases: Mapping[int, Bias]) -> None:
    """Add each row's bias. Keys of `biases` are rows of the logits."""
    if not biases:
        return
    vocab = logits_BV.shape[1]
    cells = np.concatenate([row * vocab + bias.ids for row, bias in biases.items()])
    index, values = to_device([cells, np.concatenate([bias.values for bias in biases.values()])], logits_BV.device)
    logits_BV.view(-1).index_add_(0, index, values)


def penalise(logits_BV: torch.Tensor, settings: Settings, draws: Sequence[m.Draw]) -> None:
    """Repetition penalty for ids in prompt or output, then frequency and presence penalties for ids in the output.

    Raises ValueError for a draw that needs its history and has none, or whose history names ids the model has not.
    """
    rows = np.flatnonzero(settings["penalised"])
    if not rows.size:
        return
    vocab = logits_BV.shape[1]
    found = [_history(draws[row], row, vocab) for row in rows.tolist()]
    cells = np.concatenate([cells for cells, _ in found])
    sampled = np.concatenate([counts for _, counts in found])
    which = cells // vocab
    drop = settings["frequency"][which] * sampled + settings["presence"][which] * (sampled > 0)
    index, repetition, subtracted = to_device(
        [cells, settings["repetition"][which], drop.astype(np.float32)], logits_BV.device
    )
    flat = logits_BV.view(-1)
    logits = flat[index]
    flat[index] = torch.where(logits > 0, logits / repetition, logits * repetition) - subtracted


def _history(draw: m.Draw, row: int, vocab: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The cells (row * vocab + id) of the ids seen so far, each once, and how often each was sampled."""
    if draw.history is None:
        raise ValueError(f"slot {draw.slot} has penalties, and its draw has no history")
    history = np.asarray(draw.history, np.int64)
    if history.size and not 0 <= history.min() <= history.max() < vocab:
        raise ValueError(f"the history of slot {draw.slot} has ids outside 0 … {vocab - 1}")
    ids, place = np.unique(history, return_inverse=True)
    return row * vocab + ids, np.bincount(place[draw.prompt_length :], minlength=ids.size)


def mask(logits_BV: torch.Tensor, draws: Sequence[m.Draw]) -> None:
    """-inf for what a draw's grammar does not allow. Raises ValueError for a mask of a wrong size or that allows
    nothing."""
    rows = [row for row, draw in enumerate(draws) if draw.allowed is not None]
    if not rows:
        return
    vocab = logits_BV.shape[1]
    allowed: npt.NDArray[np.bool_] = np.stack([unpack_mask(draws[row].allowed or b"", vocab) for row in rows])
    nothing = [draws[rows[place]].slot for place in np.flatnonzero(~np.any(allowed, axis=1)).tolist()]
    if nothing:
        raise ValueError(f"the grammar masks of slots {nothing} allow nothing")
    index, forbidden = to_device([np.array(rows), ~allowed], logits_BV.device)
    logits_BV[index] = logits_BV[index].masked_fill(forbidden, -torch.inf)


def unpack_mask(allowed: bytes, vocab: int) -> npt.NDArray[np.bool_]:
    """bool [vocab] of the mask's bits, least significant first."""
    if len(allowed) != -(-vocab // 8):
        raise ValueError(f"a grammar mask has {len(allowed)} bytes, {vocab} ids need {-(-vocab // 8)}")
    return np.unpackbits(np.frombuffer(allowed, np.uint8), count=vocab, bitorder="little").astype(np.bool_)
