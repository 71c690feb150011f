"""Attention kernels against the plain-torch reference. Run by `test_triton.py` under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from rollout_server.kernels import reference
from rollout_server.kernels.interface import LayerCache
from rollout_server.kernels.triton import attention as kernels
from rollout_server.kernels.triton import invariant
from tests.unit.triton_oracle import (
    PAGE,
    assert_near,
    random_batch,
    random_cache,
    random_tensor,
    round_as_hardware_does,
)

round_as_hardware_does()

DECODE = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 133)]
PREFILL = [(7, 7), (18, 18), (9, 41)]
MIXED = [(1, 40), (10, 10), (1, 1), (0, 5), (4, 70), (1, 100)]
PLAIN = (16, 1, 3, torch.float32)
ODD_GROUP = (64, 3, 1, torch.bfloat16)
LLAMA = (128, 4, 1, torch.bfloat16)
ODD_DIM = (24, 4, 1, torch.float32)
"""Head dim, query heads of a key/value head, key/value heads, dtype."""


def tiling(most: int, group: int, *, splits: int = 1, run_splits: int = 1) -> kernels.Tiling:
    return kernels.Tiling(most == 1, 16 if most == 1 else 32, splits, 16 * max(1, group // 16), run_splits)


@pytest.mark.parametrize(("shape", "splits"), [(PLAIN, 4), (ODD_GROUP, 2), (LLAMA, 1), (ODD_DIM, 1)])
@pytest.mark.parametrize("rows", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])
def test_own_pages(shape: tuple[int, int, int, torch.dtype], rows: list[tuple[int, int]], splits: int) -> None:
    dim, group, kv_heads, dtype = shape
    batch = random_batch(rows)
    cache = random_cache(batch, kv_heads, dim, dtype)
    q = random_tensor(len(batch.ids), group * kv_heads, dim, dtype=dtype)
    found = kernels.attend(q, batch, cache, tiling(batch.most, group, splits=splits))
    assert_near(found, reference.attention(q, batch, cache))


FLAT = [((0, 1, 2, 3, 4), 0, 3)]
TREE = [((0, 1, 2, 3, 4, 6), 0, 2), ((0, 2, 4), 2, 3), ((0, 4), 3, 4), ((1, 3), 2, 4)]


@pytest.mark.parametrize("shape", [ODD_GROUP, ODD_DIM])
@pytest.mark.parametrize(("shared", "splits", "run_splits"), [(FLAT, 1, 1), (TREE, 1, 1), (TREE, 2, 4)])
@pytest.mark.parametrize("news", [(1, 1, 1, 1, 1, 1, 1), (1, 9, 1, 0, 3, 2, 1)], ids=["decode", "mixed"])
def test_shared_runs(
    shape: tuple[int, int, int, torch.dtype],
    shared: list[tuple[tuple[int, ...], int, int]],
    splits: int,
    run_splits: int,
    news: tuple[int, ...],
) -> None:
    dim, group, kv_heads, dtype = shape
    beyond = [1, 30, 2, 17, 16, 0, 5]
    rows = [(new, 4 * PAGE + new + more) for new, more in zip(news, beyond, strict=True)]
    batch = random_batch(rows, shared=shared)
    cache = random_cache(batch, kv_heads, dim, dtype)
    q = random_tensor(len(batch.ids), group * kv_heads, dim, dtype=dtype)
    found = kernels.attend(q, batch, cache, tiling(batch.most, group, splits=splits, run_splits=run_splits))
    assert_near(found, reference.attention(q, batch._replace(runs=[]), cache))


def test_tiling_is_chosen_from_the_host_alone() -> None:
    batch = random_batch(DECODE)
    cache = random_cache(batch, 2, 64, torch.bfloat16)
    q = random_tensor(len(batch.ids), 6, 64, dtype=torch.bfloat16)
    assert_near(kernels.attention(q, batch, cache), reference.attention(q, batch, cache))


@pytest.mark.parametrize(
    ("wanted", "launched", "keys", "splits"),
    [(528, 8, 4096, 32), (528, 8, 200, 4), (528, 512, 4096, 1), (528, 0, 0, 1)],
)
def test_splits_fill_the_device_and_no_more(wanted: int, launched: int, keys: int, splits: int) -> None:
    assert kernels._splits(wanted, launched, keys, 64) == splits


def test_padding_rows_read_nothing_and_become_zero() -> None:
    """As a captured pass has them: length 0, a table of nonsense."""
    batch = random_batch([(1, 20), (1, 1), (1, 1)])
    batch = batch._replace(lengths=torch.tensor([20, 0, 0], dtype=torch.int32))
    batch.tables[batch.lines[1:].long()] = 2**30
    cache = random_cache(batch, 2, 64, torch.float32)
    q = random_tensor(3, 6, 64, dtype=torch.float32)
    for splits in (1, 2):
        found = kernels.attend(q, batch, cache, tiling(1, 3, splits=splits))
        assert_near(found[:1], reference.attention(q, batch, cache)[:1])
        assert torch.equal(found[1:], torch.zeros_like(found[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_invariant_mode_has_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    """Row 1's first token: among later tokens of its tile, other rows and a shared run; and decoded alone. (It is the
    first of a tile in both: the interpreter's matrix product rounds by place, a GPU's does not.)"""
    batch = random_batch([(1, 40), (21, 85), (4, 70)], shared=[((0, 1, 2), 0, 2)])
    cache = random_cache(batch, 2, 64, dtype)
    q = random_tensor(len(batch.ids), 6, 64, dtype=dtype)
    together = invariant.attention(q, batch, cache)
    assert_near(together, reference.attention(q, batch._replace(runs=[]), cache))
    alone = batch._replace(
        ids=batch.ids[1:2],
        positions=batch.positions[1:2],
        cells=batch.cells[1:2],
        offsets=torch.tensor([0, 1], dtype=torch.int32),
        lines=batch.lines[1:2],
        lengths=batch.positions[1:2] + 1,
        longest=65,
        most=1,
        runs=[],
    )
    assert torch.equal(invariant.attention(q[1:2], alone, cache), together[1:2])


def test_an_empty_pass() -> None:
    batch = random_batch([(0, 3)])
    cache = LayerCache(torch.zeros(2, 2, PAGE, 64), torch.zeros(2, 2, PAGE, 64))
    assert kernels.attention(torch.zeros(0, 6, 64), batch, cache).shape == (0, 6 * 64)
