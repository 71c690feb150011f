"""What of CUDA graphs is plain Python: sizes, and the refusal on a CPU. `tests/gpu` replays them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_rl.errors import ModelError
from rollout_server.kernels.interface import LayerCache
from rollout_server.models.catalog import resolve_model
from rollout_server.models.config import read_config
from rollout_server.models.decoder import load_decoder
from rollout_server.worker.cuda_graphs import DecodeGraphs, ladder


@given(st.integers(1, 600))
def test_a_ladder_has_every_batch_size_nearly(max_batch: int) -> None:
    sizes = ladder(max_batch)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == max_batch
    for rows in range(1, max_batch + 1):
        assert next(size for size in sizes if size >= rows) < rows + 8


def test_graphs_are_refused_on_a_cpu() -> None:
    from rollout_server.kernels import reference

    directory = resolve_model("tiny-llama")
    decoder = load_decoder(directory, read_config(directory), torch.float32, reference)
    cache = [LayerCache(torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 16, 16))]
    with pytest.raises(ModelError, match="CUDA device"):
        DecodeGraphs(decoder, cache, 4, 8, 1)
