"""Each family's decoder against transformers, in fp32: logits, experts, names and bits of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rollout_server.kernels import reference
from rollout_server.kernels.interface import Kernels
from rollout_server.models.catalog import resolve_model
from rollout_server.models.checksum import checksum
from rollout_server.models.config import read_config
from rollout_server.models.decoder import Decoder
from rollout_server.models.weights import Checkpoint, read_tensors, tensor_shapes
from tests.decoding import FAMILIES, decoder_of, expected_logits, kernels_of, logits, prefill, random_ids, random_model

SEQUENCES = random_ids(37, 1, 16, 90)
MOE = [family for family in FAMILIES if family.startswith(("mixtral", "qwen3_moe"))]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    directory = tmp_path_factory.mktemp("model")
    model = random_model(FAMILIES[request.param])
    model.save_pretrained(directory)
    return model, directory


@pytest.fixture(params=["native", "reference"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_of(request.param)


def test_logits_equal_transformers(family: tuple[PreTrainedModel, Path], kernels: Kernels) -> None:
    model, directory = family
    actual, expected = logits(decoder_of(directory, kernels), prefill(SEQUENCES)), expected_logits(model, SEQUENCES)
    assert expected.std() > 0.5  # not flat
    torch.testing.assert_close(actual.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)


def test_bf16_stays_close_to_transformers_in_bf16(family: tuple[PreTrainedModel, Path], kernels: Kernels) -> None:
    """Same roundings in the same places: apart by sums in another order, not by another rounding at every layer."""
    _, directory = family
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    exact = expected_logits(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), SEQUENCES)
    theirs = expected_logits(model, SEQUENCES)
    ours = logits(decoder_of(directory, kernels, dtype=torch.bfloat16), prefill(SEQUENCES))
    assert (ours - exact).abs().mean() <= 1.25 * (theirs - exact).abs().mean()


def test_export_has_the_names_shapes_and_bits_of_transformers(
    family: tuple[PreTrainedModel, Path], kernels: Kernels
) -> None:
    model, directory = family
    decoder = decoder_of(directory, kernels)
    state = dict(model.state_dict())
    if decoder.config.tied_embeddings:
        state.pop("lm_head.weight")
    assert {name: tuple(t.shape) for name, t in state.items()} == tensor_shapes(decoder.config)
    assert checksum(decoder.export()) == checksum(state)


def test_both_names_of_experts_are_read(family: tuple[PreTrainedModel, Path]) -> None:
    """Stacked, as a trainer holds them, or one by one, as they are on disk: the same model."""
    model, directory = family
    config = read_config(directory)
    from_memory = Decoder(config, model.state_dict(), torch.float32, reference)
    assert checksum(from_memory.export()) == checksum(Checkpoint(read_tensors(directory), config))


def test_new_weights_in_place_compute_the_new_model(family: tuple[PreTrainedModel, Path], kernels: Kernels) -> None:
    model, directory = family
    decoder = decoder_of(directory, kernels)
    before = {id(tensor) for tensor in decoder.tensors()}
    other = random_model(model.config, seed=5)
    decoder.replace(other.state_dict())
    assert {id(tensor) for tensor in decoder.tensors()} == before
    actual, expected = logits(decoder, prefill(SEQUENCES)), expected_logits(other, SEQUENCES)
    torch.testing.assert_close(actual.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)


def test_batch_invariant_rows_are_the_same_bit_for_bit(family: tuple[PreTrainedModel, Path], kernels: Kernels) -> None:
    decoder = decoder_of(family[1], kernels, batch_invariant=True)
    together = logits(decoder, prefill(SEQUENCES)).split([len(ids) for ids in SEQUENCES])
    for ids, rows in zip(SEQUENCES, together, strict=True):
        assert torch.equal(logits(decoder, prefill([ids])), rows)


@pytest.mark.parametrize("name", MOE)
def test_routed_experts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = random_model(FAMILIES[name])
    model.save_pretrained(tmp_path)
    decoder = decoder_of(tmp_path)
    moe = decoder.config.moe
    assert moe is not None
    chosen: list[torch.Tensor] = []
    sparse = [layer for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    for layer in sparse:
        layer.mlp.gate.register_forward_hook(lambda _module, _inputs, outputs: chosen.append(outputs[2]))
    ids = random_ids(60)
    expected_logits(model, ids)
    routed = torch.full((60, len(moe.layers), moe.top_k), -1, dtype=torch.int16)
    logits(decoder, prefill(ids), routed)
    assert len(moe.layers) == len(sparse) == len(chosen)
    assert torch.equal(routed.long(), torch.stack(chosen, dim=1))


def test_upcycled_smollm2_computes_what_the_dense_one_does(smollm2: Path) -> None:
    upcycled = resolve_model("smollm2-moe")
    config = read_config(upcycled)
    assert config.family == "mixtral"
    assert config.moe is not None
    sequences = random_ids(24, 7, vocab=40000)
    routed = torch.zeros(31, config.layers, config.moe.top_k, dtype=torch.int16)
    sparse = logits(decoder_of(upcycled), prefill(sequences), routed)
    dense = logits(decoder_of(smollm2), prefill(sequences))
    torch.testing.assert_close(sparse.log_softmax(-1), dense.log_softmax(-1), atol=1e-4, rtol=0)
    assert torch.unique(routed).tolist() == [0, 1, 2, 3]  # a router that routes
    assert (routed[..., 0] != routed[..., 1]).all()


def test_tiny_moe_equals_transformers() -> None:
    directory = resolve_model("tiny-moe")
    sequences = random_ids(30, 5, vocab=49152)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    actual, expected = logits(decoder_of(directory), prefill(sequences)), expected_logits(model, sequences)
    torch.testing.assert_close(actual.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)
