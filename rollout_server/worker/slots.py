"""What the worker remembers of each running sequence, so that the manager says it once.

A slot has a sequence's sampling parameters, its adapter, its page table and the id last sampled. Parameters are records of
one array on the host: those of a pass are one gather. Tables and last ids live on the device too, so that a decode
pass needs nothing from the host that the host does not know yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from rollout_server import messages as m
from rollout_server.worker.transfer import to_device
from rollout_server.worker.uniforms import stream

SETTINGS = np.dtype(
    [
        ("stream", np.uint64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("top_k", np.int64),
        ("top_logprobs", np.int64),
        ("temperature", np.float32),
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("filtered", np.bool_),
        ("penalised", np.bool_),
    ],
    align=True,  # torch takes a field only where records are multiples of its size
)
"""Sampling parameters as vectors. `filtered`: top-k, top-p or min-p leave something out. top_k 0 is off."""

_COLDEST = 1e-30
"""fp32 logits over a smaller temperature would overflow; at this one already only the largest logit is left."""

Settings = npt.NDArray[np.void]
"""One `SETTINGS` record a draw."""


class Bias(NamedTuple):
    ids: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]


def settings_of(sampling: m.SamplingParams, index: int) -> tuple[Any, ...]:
    """The record of choice `index` of a request."""
    p = sampling
    temperature = max(p.temperature, _COLDEST) if p.temperature > 0 else 0.0
    filtered = temperature > 0 and (p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0)
    return (
        stream(p.seed, index), p.top_p, p.min_p, p.top_k, p.top_logprobs, temperature, p.repetition_penalty,
        p.presence_penalty, p.frequency_penalty, filtered, p.needs_history,
    )  # fmt: skip


def bias_of(sampling: m.SamplingParams, vocab: int) -> Bias:
    """Raises ValueError for an id that the model does not have."""
    bias = Bias(
        np.fromiter(sampling.logit_bias.keys(), np.int64), np.fromiter(sampling.logit_bias.values(), np.float32)
    )
    if bias.ids.size and not 0 <= bias.ids.min() <= bias.ids.max() < vocab:
        raise ValueError(f"logit_bias names ids outside 0 … {vocab - 1}: {sorted(sampling.logit_bias)}")
    return bias


class Slots:
    def __init__(self, count: int, table_width: int, scratch_page: int, vocab: int, device: torch.device) -> None:
        """Line `count` of the tables belongs to no sequence: it is all `scratch_page`, for padding rows."""
        self.scratch_line, self.vocab, self.device = count, vocab, device
        self.settings: Settings = np.zeros(count, SETTINGS)
        self.biases: dict[int, Bias] = {}
        self.adapters = [""] * count
        self.host_tables = np.full((count + 1, table_width), scratch_page, np.int32)
        host = torch.from_numpy(self.host_tables)
        self.tables = host if device.type == "cpu" else host.to(device)
        """int32 [count + 1, table_width], the device's own or, on a CPU, the host's."""
        self.last_ids = torch.zeros(count, dtype=torch.int64, device=device)

    def open(self, opens: Sequence[m.Open]) -> None:
        for each in opens:
            self.adapters[each.slot] = each.adapter
            self.biases.pop(each.slot, None)
            if each.sampling is not None:
                self.settings[each.slot] = settings_of(each.sampling, each.index)
                if each.sampling.logit_bias:
                    self.biases[each.slot] = bias_of(each.sampling, self.vocab)

    def extend(self, rows: Sequence[m.Row]) -> None:
        """Enter the rows' new pages into the tables of their slots."""
        new = [row for row in rows if row.pages]
        for row in new:
            self.host_tables[row.slot, row.first_page : row.first_page + len(row.pages)] = row.pages
        if not new or self.device.type == "cpu":
            return
        width = self.host_tables.shape[1]
        cells = np.concatenate([np.arange(len(row.pages)) + row.slot * width + row.first_page for row in new])
        index, pages = to_device([cells, self.host_tables.reshape(-1)[cells]], self.device)
        self.tables.view(-1).index_copy_(0, index, pages)
