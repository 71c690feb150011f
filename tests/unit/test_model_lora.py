"""Many adapters over one decoder: each row computes what its own adapter merged into the weights would compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightning_rl.errors import ModelError
from rollout_server.kernels import reference
from rollout_server.models.checksum import checksum
from rollout_server.models.config import read_config
from rollout_server.models.decoder import Decoder
from rollout_server.models.weights import AdapterWeights, read_tensors
from tests.decoding import (
    FAMILIES,
    decoder_of,
    kernels_of,
    logits,
    lora_config,
    prefill,
    random_adapter,
    random_ids,
    random_model,
)

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
ALL = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ADAPTERS = {  # rank, alpha, modules
    "": (4, 8.0, ALL),
    "small": (1, 3.0, ("self_attn.v_proj",)),
    "wide": (16, 16.0, ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")),
    "attention": (8, 4.0, ATTENTION),
}
SEQUENCES = random_ids(9, 1, 30, 17, 4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    random_model(FAMILIES["llama"]).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def moe_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe")
    random_model(FAMILIES["qwen3_moe"]).save_pretrained(path)
    return path


def adapter(decoder: Decoder, name: str, seed: int = 0) -> AdapterWeights:
    rank, alpha, modules = ADAPTERS[name]
    return random_adapter(decoder, rank, alpha, modules, seed + len(name))


@pytest.fixture(scope="module", params=["native", "reference"])
def loaded(directory: Path, request: pytest.FixtureRequest) -> Decoder:
    decoder = decoder_of(directory, kernels_of(request.param))
    for name in ADAPTERS:
        decoder.set_adapter(name, adapter(decoder, name))
    return decoder


def merged(directory: Path, weights: AdapterWeights) -> Decoder:
    tensors = read_tensors(directory)
    for module, pair in weights.modules.items():
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + weights.scale * (pair["B"] @ pair["A"])
    return Decoder(read_config(directory), tensors, torch.float32, reference)


@pytest.mark.parametrize("name", ADAPTERS)
def test_rows_with_an_adapter_equal_merged_weights(name: str, loaded: Decoder, directory: Path) -> None:
    actual = logits(loaded, prefill(SEQUENCES, [name] * len(SEQUENCES))).log_softmax(-1)
    expected = logits(merged(directory, adapter(loaded, name)), prefill(SEQUENCES)).log_softmax(-1)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert (actual - logits(loaded, prefill(SEQUENCES)).log_softmax(-1)).abs().max() > 1e-2


def test_an_adapter_of_a_moe_equals_merged_weights(moe_directory: Path) -> None:
    """On attention everywhere and on the feed-forward of the layer that is dense."""
    decoder = decoder_of(moe_directory)
    weights = random_adapter(decoder, 4, 8.0, ALL, 0)
    assert "model.layers.0.mlp.up_proj" in weights.modules
    assert "model.layers.1.mlp.up_proj" not in weights.modules
    decoder.set_adapter("a", weights)
    actual = logits(decoder, prefill(SEQUENCES, ["a"] * len(SEQUENCES))).log_softmax(-1)
    expected = logits(merged(moe_directory, weights), prefill(SEQUENCES)).log_softmax(-1)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(names=st.lists(st.sampled_from([*ADAPTERS, None]), min_size=5, max_size=5))
def test_mixed_rows_equal_each_alone(loaded: Decoder, names: list[str | None]) -> None:
    mixed = logits(loaded, prefill(SEQUENCES, names)).split([len(ids) for ids in SEQUENCES])
    for ids, name, rows in zip(SEQUENCES, names, mixed, strict=True):
        torch.testing.assert_close(rows, logits(loaded, prefill([ids], [name])), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_mixed_rows_are_the_same_bit_for_bit_in_batch_invariant_mode(directory: Path, kernels: str) -> None:
    decoder = decoder_of(directory, kernels_of(kernels), batch_invariant=True)
    for name in ADAPTERS:
        decoder.set_adapter(name, adapter(decoder, name))
    names = [*ADAPTERS, None]
    mixed = logits(decoder, prefill(SEQUENCES, names)).split([len(ids) for ids in SEQUENCES])
    for ids, name, rows in zip(SEQUENCES, names, mixed, strict=True):
        assert torch.equal(rows, logits(decoder, prefill([ids], [name])))


def test_loading_replacing_and_removing_touch_no_other(directory: Path) -> None:
    decoder = decoder_of(directory)
    plain = logits(decoder, prefill(SEQUENCES))
    decoder.set_adapter("a", adapter(decoder, "attention"))
    decoder.set_adapter("b", adapter(decoder, "wide"))
    of = {name: logits(decoder, prefill(SEQUENCES, [name] * 5)) for name in "ab"}
    decoder.set_adapter("a", adapter(decoder, "small"))
    assert torch.equal(logits(decoder, prefill(SEQUENCES, ["b"] * 5)), of["b"])
    small = logits(decoder, prefill(SEQUENCES, ["a"] * 5))
    assert not torch.equal(small, of["a"])
    decoder.set_adapter("b", None)
    assert torch.equal(logits(decoder, prefill(SEQUENCES, ["a"] * 5)), small)
    with pytest.raises(ModelError, match="no adapter 'b' is loaded"):
        logits(decoder, prefill(SEQUENCES, ["b"] * 5))
    decoder.set_adapter("a", None)
    assert torch.equal(logits(decoder, prefill(SEQUENCES)), plain)


def test_the_policys_own_name_is_plain_until_it_has_an_adapter(directory: Path) -> None:
    decoder = decoder_of(directory)
    own = prefill(SEQUENCES, [""] * 5)
    plain = logits(decoder, own)
    assert torch.equal(plain, logits(decoder, prefill(SEQUENCES)))
    decoder.set_adapter("", adapter(decoder, ""))
    assert not torch.equal(logits(decoder, own), plain)
    decoder.set_adapter("", None)
    assert torch.equal(logits(decoder, own), plain)


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_new_base_weights_leave_adapters_in_place(directory: Path, kernels: str) -> None:
    decoder = decoder_of(directory, kernels_of(kernels))
    weights = adapter(decoder, "wide")
    decoder.set_adapter("a", weights)
    other = {name: tensor * 1.1 for name, tensor in read_tensors(directory).items()}
    decoder.replace(other)
    fresh = Decoder(decoder.config, other, torch.float32, decoder.kernels)
    fresh.set_adapter("a", weights)
    batch = prefill(SEQUENCES, ["a"] * 5)
    assert torch.equal(logits(decoder, batch), logits(fresh, batch))


def test_export_gives_what_was_loaded_bit_for_bit(loaded: Decoder, directory: Path) -> None:
    for name in ADAPTERS:
        pairs = adapter(loaded, name).modules
        expected = {
            f"base_model.model.{module}.lora_{side}.weight": tensor
            for module, pair in pairs.items()
            for side, tensor in pair.items()
        }
        assert checksum(loaded.export(name)) == checksum(expected)
    plain = decoder_of(directory)
    assert checksum(plain.export()) == checksum(plain.export(None)) == checksum(loaded.export(None))
    assert checksum(loaded.export()) == checksum(loaded.export(""))
    with pytest.raises(ModelError, match="no adapter 'x' is loaded"):
        loaded.export("x")


@pytest.mark.parametrize("rslora", [False, True])
def test_a_directory_holds_what_peft_saves(directory: Path, tmp_path: Path, rslora: bool) -> None:
    decoder = decoder_of(directory)
    weights = adapter(decoder, "wide")
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": tensor.contiguous()
        for module, pair in weights.modules.items()
        for side, tensor in pair.items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(lora_config(16, 24.0, use_rslora=rslora)))
    read = AdapterWeights.from_directory(tmp_path, torch.float32)
    assert read.rank == 16
    assert read.scale == pytest.approx(6.0 if rslora else 1.5)
    assert {module: set(pair) for module, pair in read.modules.items()} == {m: {"A", "B"} for m in weights.modules}
    decoder.set_adapter("a", read)
    assert checksum(decoder.export("a")) == checksum(tensors)


def peft(*modules: str, rank: int = 2, rows: int = 64, inputs: int = 64) -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.{module}.lora_{side}.weight": torch.zeros((rank, inputs) if side == "A" else (rows, rank))
        for module in modules
        for side in "AB"
    }


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (peft("model.layers.7.self_attn.q_proj"), "which is not in the model"),
        (peft("lm_head"), "which is not in the model"),
        (peft("model.layers.1.mlp.experts.0.gate_proj"), "LoRA there is not served"),
        (peft("model.layers.1.mlp.experts"), "LoRA there is not served"),
        (peft("model.layers.1.mlp.gate"), "LoRA there is not served"),
        (peft(Q, rank=3), r"lora_A of .*q_proj has shape \(3, 64\), it should be \(2, 64\)"),
        (peft(Q, rows=65), "lora_B of .* has shape"),
        ({name: t for name, t in peft(Q).items() if "lora_A" in name}, "has only lora_A"),
        ({}, "no tensors"),
    ],
)
def test_an_adapter_that_does_not_fit_is_rejected_whole(
    tensors: dict[str, torch.Tensor], message: str, moe_directory: Path
) -> None:
    decoder = decoder_of(moe_directory)
    good = random_adapter(decoder, 2, 4.0, ATTENTION, 0)
    decoder.set_adapter("a", good)
    before = checksum(decoder.export("a"))
    if tensors and "lora_B" in str(list(tensors)):
        tensors = {**peft("model.layers.1.self_attn.q_proj", rows=128), **tensors}  # a good part does not save it
    with pytest.raises(ModelError, match=message):
        decoder.set_adapter("a", AdapterWeights(lora_config(2, 4.0), tensors, torch.float32))
    assert checksum(decoder.export("a")) == before


def test_there_may_be_too_many(directory: Path) -> None:
    decoder = decoder_of(directory, max_adapters=2)
    weights = adapter(decoder, "small")
    decoder.set_adapter("", weights)
    decoder.set_adapter("a", weights)
    with pytest.raises(ModelError, match="2 adapters are loaded"):
        decoder.set_adapter("b", weights)
    assert not decoder.has_adapter("b")
    decoder.set_adapter("a", weights)
    decoder.set_adapter("a", None)
    decoder.set_adapter("b", weights)
    assert decoder.has_adapter("b")


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "IA3", "r": 2, "lora_alpha": 2},
        {"peft_type": "LORA", "r": 2},
        {"peft_type": "LORA", "r": 0, "lora_alpha": 2},
        lora_config(2, 2, use_dora=True),
        lora_config(2, 2, bias="all"),
        lora_config(2, 2, rank_pattern={"q_proj": 4}),
        lora_config(2, 2, target_parameters=["mlp.experts.down_proj"]),
        lora_config(2, 2, modules_to_save=["lm_head"]),
    ],
)
def test_what_is_not_plain_lora_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ModelError):
        AdapterWeights(config, peft(Q), torch.float32)


def test_tensors_of_other_names_are_refused() -> None:
    tensors = {**peft(Q), f"base_model.model.{Q}.lora_magnitude_vector": torch.zeros(64)}
    with pytest.raises(ModelError, match="lora_magnitude_vector"):
        AdapterWeights(lora_config(2, 2), tensors, torch.float32)
