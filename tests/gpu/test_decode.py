"""The decoder on a GPU: greedy ids are transformers', and captured passes are the passes that were captured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rollout_server.kernels.interface import SharedRun
from tests.gpu.models import FAMILIES, Greedy, make, prompts

pytest.importorskip("triton")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["backend", "invariant"])
def test_greedy_ids_and_logprobs_equal_transformers(family: str, mode: str, tmp_path: Path) -> None:
    from rollout_server.kernels.triton import backend, invariant
    from rollout_server.worker.cuda_graphs import DecodeGraphs

    kernels = {"backend": backend, "invariant": invariant}[mode]
    rows, steps = 13, 32
    model, decoder = make(family, tmp_path, kernels, torch.float32)
    asked = prompts(rows)
    greedy = Greedy(decoder, rows, pages_each=8)
    graphs = DecodeGraphs(decoder, greedy.cache, 16, 8, greedy.scratch)
    ids, logits = greedy.decode(asked, steps, graphs.run)
    for row, prompt in enumerate(asked):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt + ids[row][:-1]], device="cuda")).logits[0, len(prompt) - 1 :]
        assert expected.argmax(-1).tolist() == ids[row]
        torch.testing.assert_close(
            torch.log_softmax(logits[:, row], -1), torch.log_softmax(expected.float(), -1), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("rows", [1, 3, 16, 21])
def test_replay_equals_eager(rows: int, tmp_path: Path) -> None:
    """The same ids, and logits as near as another tile or split allows: eager passes know their longest row."""
    from rollout_server.kernels.triton import backend
    from rollout_server.worker.cuda_graphs import DecodeGraphs

    _, decoder = make("llama", tmp_path, backend, torch.float32)
    greedy = Greedy(decoder, rows, pages_each=8)
    asked = prompts(rows)
    eager_ids, eager = greedy.decode(asked, 16, lambda batch: decoder.hidden_states(batch, greedy.cache))
    graphs = DecodeGraphs(decoder, greedy.cache, 24, 8, greedy.scratch)
    ids, logits = greedy.decode(asked, 16, graphs.run)
    assert ids == eager_ids
    torch.testing.assert_close(logits, eager, rtol=0, atol=1e-4)


def test_invariant_mode_has_the_same_bits_for_any_batch(tmp_path: Path) -> None:
    from rollout_server.kernels.triton import invariant
    from rollout_server.worker.cuda_graphs import DecodeGraphs

    _, decoder = make("qwen3", tmp_path, invariant, torch.bfloat16)
    asked = prompts(19)
    many = Greedy(decoder, 19, pages_each=8)
    graphs = DecodeGraphs(decoder, many.cache, 24, 8, many.scratch)
    _, together = many.decode(asked, 16, graphs.run)
    for row in (0, 7, 18):
        one = Greedy(decoder, 1, pages_each=8)
        _, alone = one.decode([asked[row]], 16, lambda batch, one=one: decoder.hidden_states(batch, one.cache))
        assert torch.equal(alone[:, 0], together[:, row])


def test_shared_runs_change_no_id(tmp_path: Path) -> None:
    """Eight samples of one prompt of 5 pages, on the same pages, with and without the run."""
    from rollout_server.kernels.triton import backend

    _, decoder = make("llama", tmp_path, backend, torch.float32)
    common = prompts(1, seed=4)[0] * 40
    asked = [common[:80] + tail[:7] for tail in prompts(8, seed=5)]
    results = []
    for runs in ([], [SharedRun(list(range(8)), 0, 5)]):
        greedy = Greedy(decoder, 8, pages_each=8)
        greedy.tables[:, :5] = greedy.tables[0, :5].clone()
        results.append(greedy.decode(asked, 16, lambda b, g=greedy: decoder.hidden_states(b, g.cache), runs))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-4)


def test_graphs_cover_plain_decode_passes_only(tmp_path: Path) -> None:
    from rollout_server.kernels.interface import AdapterSpan
    from rollout_server.kernels.triton import backend
    from rollout_server.worker.cuda_graphs import DecodeGraphs

    _, decoder = make("llama", tmp_path, backend, torch.bfloat16)
    greedy = Greedy(decoder, 4, pages_each=8)
    graphs = DecodeGraphs(decoder, greedy.cache, 3, 8, greedy.scratch)
    plain = greedy.batch([[1], [2]], [5, 9])
    assert graphs.covers(plain)
    assert not graphs.covers(greedy.batch([[1]] * 4, [5] * 4)), "more rows than captured"
    assert not graphs.covers(greedy.batch([[1, 2], [3]], [5, 9]))
    assert not graphs.covers(plain._replace(adapters=[AdapterSpan(0, 1, "a")]))
    assert not graphs.covers(plain._replace(runs=[SharedRun([0, 1], 0, 1)]))
