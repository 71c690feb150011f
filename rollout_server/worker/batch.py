"""The rows that the manager planned as one flat `Batch`.

Rows of equal adapters are put side by side, so that an adapter's tokens are one span; `ends` says where each of the
manager's rows went. Everything is numpy over all rows at once: at 256 decoding rows this is Python that a step waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from rollout_server import messages as m
from rollout_server.kernels.interface import AdapterSpan, Batch
from rollout_server.worker import sharing
from rollout_server.worker.slots import Slots
from rollout_server.worker.transfer import to_device


class Flat(NamedTuple):
    batch: Batch
    ends: npt.NDArray[np.int64]
    """[R], in the manager's order of rows: one past the place of the row's last token in the batch."""


def flatten(
    rows: Sequence[m.Row], slots: Slots, page_size: int, *, policy_adapter: bool = False, shared: bool = False
) -> Flat:
    """The slots' tables must hold the rows' pages already. `policy_adapter`: the policy has an adapter of its own, so
    that rows of no named adapter are a span too; `shared`: look for shared prefixes."""
    order = _by_adapter(rows, slots)
    ordered = rows if order is None else [rows[i] for i in order]
    count = len(rows)
    lines = np.fromiter(map(attrgetter("slot"), ordered), np.int32, count)
    starts = np.fromiter(map(attrgetter("start"), ordered), np.int32, count)
    sizes = np.fromiter((len(row.ids) for row in ordered), np.int32, count)
    offsets = np.zeros(count + 1, np.int32)
    np.cumsum(sizes, out=offsets[1:])
    tokens = int(offsets[-1])
    most, lengths = int(sizes.max()), starts + sizes
    ids = np.fromiter(chain.from_iterable(row.ids for row in ordered), np.int64, tokens)
    if most == 1 and tokens == count:
        positions, token_lines = starts, lines
    else:
        positions = np.arange(tokens, dtype=np.int32) + np.repeat(starts - offsets[:-1], sizes)
        token_lines = np.repeat(lines, sizes)
    pages = slots.host_tables[token_lines, positions // page_size].astype(np.int64)
    cells = pages * page_size + positions % page_size
    unknown = bool((ids < 0).any())
    extra = [token_lines.astype(np.int64)] if unknown else []
    on_device = to_device([ids, cells, positions, offsets, lines, lengths, *extra], slots.device)
    if unknown:
        on_device[0] = torch.where(on_device[0] < 0, slots.last_ids[on_device[6]], on_device[0])
    batch = Batch(
        ids=on_device[0],
        cells=on_device[1],
        positions=on_device[2],
        offsets=on_device[3],
        tables=slots.tables,
        lines=on_device[4],
        lengths=on_device[5],
        longest=int(lengths.max()),
        most=most,
        runs=sharing.shared_runs(
            slots.host_tables[lines, : -(-int(starts.max()) // page_size)], starts, page_size, sharing.MEASURED
        )
        if shared
        else [],
        adapters=_spans([slots.adapters[row.slot] for row in ordered], offsets.tolist(), policy_adapter),
    )
    ends = offsets[1:].astype(np.int64)
    if order is not None:
        ends[order] = ends.copy()
    return Flat(batch, ends)


def _by_adapter(rows: Sequence[m.Row], slots: Slots) -> list[int] | None:
    """A stable order in which equal adapters are neighbours, None when they are already all the same."""
    names = [slots.adapters[row.slot] for row in rows]
    return None if len(set(names)) == 1 else sorted(range(len(rows)), key=names.__getitem__)


def _spans(names: list[str], offsets: list[int], policy_adapter: bool) -> list[AdapterSpan]:
    spans = []
    row = 0
    for name, group in groupby(names):
        first, row = row, row + len(list(group))
        if name or policy_adapter:
            spans.append(AdapterSpan(offsets[first], offsets[row], name))
    return spans
