"""A whole decoder on the Triton kernels: transformers' logits. Run by `test_triton.py` under Triton's interpreter."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollout_server.kernels.interface import Batch
from rollout_server.kernels.triton import backend, invariant
from rollout_server.models.config import read_config
from rollout_server.models.decoder import load_decoder
from rollout_server.worker.cuda_graphs import DecodeInputs
from tests.unit.triton_oracle import PAGE, random_batch


@pytest.mark.parametrize("kernels", [backend, invariant], ids=["fast", "invariant"])
def test_prefill_and_padded_decode_equal_transformers(
    kernels: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two rows prefilled in one pass, then decoded in a pass that is padded to four, as a captured one is."""
    torch.manual_seed(0)
    shape = Qwen3Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
        intermediate_size=96, vocab_size=128, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(shape).eval()
    directory = tmp_path_factory.mktemp("qwen3")
    model.save_pretrained(directory)
    config = read_config(directory)
    decoder = load_decoder(directory, config, torch.float32, kernels)
    cache = backend.allocate(config, 16, PAGE, torch.float32, torch.device("cpu"))
    scratch = 15

    lengths = [19, 3]
    tokens = [torch.randint(0, 128, (length,)) for length in lengths]
    whole = random_batch([(length, length) for length in lengths], seed=3)
    without = [length - 1 for length in lengths]
    keep = torch.cat([torch.arange(sum(lengths[:row]), sum(lengths[: row + 1]) - 1) for row in range(2)])
    last = torch.tensor([sum(lengths[: row + 1]) - 1 for row in range(2)])

    def part(places: torch.Tensor, counts: list[int], ends: list[int]) -> Batch:
        return whole._replace(
            ids=torch.cat(tokens)[places],
            positions=whole.positions[places],
            cells=whole.cells[places],
            offsets=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
            lengths=torch.tensor(ends, dtype=torch.int32),
            most=max(counts),
        )

    with torch.inference_mode():
        prefilled = decoder.logits(decoder.hidden_states(part(keep, without, without), cache))
        inputs = DecodeInputs(4, 6, PAGE, scratch, torch.device("cpu"))
        inputs.fill(part(last, [1, 1], lengths), 4)
        decoded = decoder.logits(decoder.hidden_states(inputs.first(4), cache))[:2]
        expected = [model(ids[None]).logits[0] for ids in tokens]
    torch.testing.assert_close(prefilled, torch.cat([logits[:-1] for logits in expected]), rtol=0, atol=1e-4)
    torch.testing.assert_close(decoded, torch.stack([logits[-1] for logits in expected]), rtol=0, atol=1e-4)
