"""Rows become one flat batch, said twice: by the vectorised code and token by token."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from rollout_server.messages import Open, Row, SamplingParams
from rollout_server.worker import sharing
from rollout_server.worker.batch import flatten
from rollout_server.worker.slots import Slots
from rollout_server.worker.transfer import packed, to_device

SIZE, WIDTH, SLOTS = 4, 8, 6
CPU = torch.device("cpu")


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[Row], list[str], list[int]]:
    """Rows of different slots, their adapters, and the ids last sampled."""
    slots = draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True))
    rows = []
    for slot in slots:
        start = draw(st.integers(0, WIDTH * SIZE - 1))
        count = draw(st.integers(1, min(9, WIDTH * SIZE - start)))
        pages = [slot * WIDTH + page for page in range(-(-(start + count) // SIZE))]
        ids = (
            [-1]
            if count == 1 and draw(st.booleans())
            else draw(st.lists(st.integers(0, 99), min_size=count, max_size=count))
        )
        rows.append(Row(slot=slot, ids=ids, start=start, pages=pages))
    names = draw(st.lists(st.sampled_from(["", "", "a", "b"]), min_size=SLOTS, max_size=SLOTS))
    return rows, names, draw(st.lists(st.integers(0, 99), min_size=SLOTS, max_size=SLOTS))


@settings(deadline=None, max_examples=200)
@given(plan=plans(), policy_adapter=st.booleans())
def test_every_token_stands_where_its_row_says(
    plan: tuple[list[Row], list[str], list[int]], policy_adapter: bool
) -> None:
    rows, names, last = plan
    slots = Slots(SLOTS, WIDTH, 99, 100, CPU)
    slots.open([Open(slot=slot, sampling=None, adapter=name) for slot, name in enumerate(names)])
    slots.extend(rows)
    slots.last_ids.copy_(torch.tensor(last))
    flat = flatten(rows, slots, SIZE, policy_adapter=policy_adapter)
    batch = flat.batch
    offsets = batch.offsets.tolist()
    assert sum(len(row.ids) for row in rows) == len(batch.ids) == offsets[-1]
    adapter_at = [""] * len(batch.ids)
    covered = [False] * len(batch.ids)
    for span in batch.adapters:
        for token in range(span.start, span.end):
            assert not covered[token]
            adapter_at[token], covered[token] = span.name, True
    assert len({span.name for span in batch.adapters}) == len(batch.adapters)
    for row, end in zip(rows, flat.ends.tolist(), strict=True):
        place = offsets.index(end) - 1
        first = offsets[place]
        assert end - first == len(row.ids)
        assert batch.lines[place] == row.slot
        assert batch.lengths[place] == row.start + len(row.ids)
        for i, token in enumerate(row.ids):
            position = row.start + i
            assert batch.ids[first + i] == (last[row.slot] if token == -1 else token)
            assert batch.positions[first + i] == position
            assert batch.cells[first + i] == (row.slot * WIDTH + position // SIZE) * SIZE + position % SIZE
            assert adapter_at[first + i] == names[row.slot]
            assert covered[first + i] == (names[row.slot] != "" or policy_adapter)
    assert batch.longest == max(batch.lengths.tolist())
    assert batch.most == max(len(row.ids) for row in rows)
    dtypes = {"ids": torch.int64, "cells": torch.int64}
    for name in ("ids", "positions", "cells", "offsets", "tables", "lines", "lengths"):
        assert getattr(batch, name).dtype == dtypes.get(name, torch.int32)


def test_tables_grow_and_start_anew() -> None:
    slots = Slots(2, WIDTH, 99, 100, CPU)
    slots.open([Open(slot=1, sampling=SamplingParams(logit_bias={3: 1.0}, seed=4), index=2)])
    slots.extend([Row(slot=1, ids=[5], start=0, pages=[10, 11])])
    slots.extend([Row(slot=1, ids=[5], start=8, pages=[12], first_page=2), Row(slot=0, ids=[1], start=0, pages=[7])])
    assert slots.tables[1, :3].tolist() == [10, 11, 12]
    assert slots.tables[0, 0] == 7
    assert slots.tables[slots.scratch_line].unique().tolist() == [99]
    assert slots.biases[1].ids.tolist() == [3]
    slots.open([Open(slot=1, sampling=SamplingParams())])
    slots.extend([Row(slot=1, ids=[5], start=0, pages=[20])])
    assert slots.tables[1, 0] == 20
    assert slots.biases == {}


def test_shared_runs_speak_of_the_rows_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are put in another order for their adapters; runs must name the places after that."""
    monkeypatch.setattr(sharing, "MEASURED", sharing.Thresholds(2, 4, 1))
    slots = Slots(SLOTS, 32, 999, 100, CPU)
    names = ["b", "a", "b", "a", "b", "b"]
    slots.open([Open(slot=slot, sampling=None, adapter=name) for slot, name in enumerate(names)])
    rows = [
        Row(
            slot=slot,
            ids=[1],
            start=20 * SIZE,
            pages=[
                *(range(16) if names[slot] == "b" else range(50 * slot, 50 * slot + 16)),
                *range(500 + 9 * slot, 505 + 9 * slot),
            ],
        )
        for slot in range(SLOTS)
    ]
    slots.extend(rows)
    batch = flatten(rows, slots, SIZE, shared=True).batch
    (run,) = batch.runs
    assert (run.first, run.last) == (0, 16)
    assert sorted(batch.lines[run.rows].tolist()) == [0, 2, 4, 5]


@given(
    shapes=st.lists(st.sampled_from([(0,), (1,), (3,), (2, 5)]), min_size=1, max_size=5),
    kinds=st.lists(st.sampled_from([np.int64, np.int32, np.float32, np.float64, np.bool_]), min_size=5, max_size=5),
)
def test_one_block_carries_all_arrays(shapes: list[tuple[int, ...]], kinds: list[type]) -> None:
    arrays = [
        (np.arange(np.prod(shape)) % 2).reshape(shape).astype(kind) for shape, kind in zip(shapes, kinds, strict=False)
    ]
    for way in (packed, to_device):
        for array, tensor in zip(arrays, way(arrays, CPU), strict=True):
            assert tensor.numpy().dtype == array.dtype
            assert np.array_equal(tensor.numpy(), array)
            assert way is to_device or tensor.data_ptr() % 16 == 0 or not array.size
