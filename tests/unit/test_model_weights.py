"""Checkpoints in and out: what is refused, what stays whole, and how weights leave the device and return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lightning_rl.errors import ModelError
from rollout_server.kernels import reference
from rollout_server.models.checksum import checksum
from rollout_server.models.config import read_config
from rollout_server.models.decoder import Decoder
from rollout_server.models.parameter import copy_packed, map_packed
from rollout_server.models.weights import Checkpoint, read_tensors, tensor_shapes
from tests.decoding import FAMILIES, decoder_of, kernels_of, logits, prefill, random_adapter, random_ids, random_model

SEQUENCES = random_ids(9, 20)
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for family, config in FAMILIES.items():
        found[family] = tmp_path_factory.mktemp("model")
        random_model(config).save_pretrained(found[family])
    return found


def test_old_names_of_a_mixtral_are_stacked(directories: dict[str, Path]) -> None:
    tensors = read_tensors(directories["mixtral"])
    prefix = "model.layers.1.block_sparse_moe"
    assert f"{prefix}.experts.3.w1.weight" in tensors  # as on the hub
    checkpoint = Checkpoint(tensors, read_config(directories["mixtral"]))
    stacked = checkpoint["model.layers.1.mlp.experts.gate_up_proj"]
    for expert in range(4):
        assert torch.equal(stacked[expert, :96], tensors[f"{prefix}.experts.{expert}.w1.weight"])
        assert torch.equal(stacked[expert, 96:], tensors[f"{prefix}.experts.{expert}.w3.weight"])
    assert torch.equal(checkpoint["model.layers.1.mlp.gate.weight"], tensors[f"{prefix}.gate.weight"])


def broken(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One defect, put in place."""
    expert = "model.layers.1.block_sparse_moe.experts"
    match name:
        case "missing":
            del tensors["model.layers.2.self_attn.k_proj.weight"]
        case "unknown":
            tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        case "another shape":
            tensors["model.norm.weight"] = torch.ones(63)
        case "quantised":
            tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
        case "an expert too few":
            for module in ("w1", "w2", "w3"):
                del tensors[f"{expert}.3.{module}.weight"]
        case "half an expert":
            del tensors[f"{expert}.1.w3.weight"]
        case "an expert of another shape":
            tensors[f"{expert}.1.w2.weight"] = torch.zeros(64, 95)
    return tensors


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("missing", "lacks 1 tensors, first 'model.layers.2.self_attn.k_proj.weight'"),
        ("unknown", "1 tensors that the model does not, first 'model.layers.0.self_attn.q_proj.bias'"),
        ("another shape", r"model.norm.weight has shape \(63,\), the config says \(64,\)"),
        ("quantised", "quantised checkpoints are not served"),
        ("an expert too few", r"gate_up_proj has shape \(3, 192, 64\), the config says \(4, 192, 64\)"),
        ("half an expert", "gate_up_proj: expert 1 lacks tensors"),
        ("an expert of another shape", "down_proj: the experts have different shapes"),
    ],
)
def test_what_is_not_the_model_is_refused_and_nothing_changes(
    defect: str, message: str, directories: dict[str, Path]
) -> None:
    decoder = decoder_of(directories["mixtral"])
    before = checksum(decoder.export())
    tensors = {name: tensor * 2 for name, tensor in read_tensors(directories["mixtral"]).items()}
    with pytest.raises(ModelError, match=message):
        decoder.replace(broken(defect, tensors))
    assert checksum(decoder.export()) == before


def test_a_tied_head_may_be_named_but_not_differ(directories: dict[str, Path]) -> None:
    config, tensors = read_config(directories["qwen2"]), read_tensors(directories["qwen2"])
    assert config.tied_embeddings
    assert "lm_head.weight" not in tensors
    Decoder(config, {**tensors, "lm_head.weight": tensors[EMBEDDING]}, torch.float32, reference)
    with pytest.raises(ModelError, match="ties lm_head"):
        Decoder(config, {**tensors, "lm_head.weight": tensors[EMBEDDING] + 1}, torch.float32, reference)


def test_a_tied_head_is_one_tensor_and_follows_new_weights(directories: dict[str, Path]) -> None:
    decoder = decoder_of(directories["qwen2"])
    sizes = [tensor.numel() for tensor in decoder.tensors()]
    assert sizes.count(300 * 64) == 1
    other = random_model(FAMILIES["qwen2"], seed=3)
    decoder.replace(other.state_dict())
    fresh = Decoder(decoder.config, other.state_dict(), torch.float32, reference)
    assert torch.equal(logits(decoder, prefill(SEQUENCES)), logits(fresh, prefill(SEQUENCES)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_the_decoder_keeps_no_memory_of_the_callers(family: str, kernels: str, directories: dict[str, Path]) -> None:
    """The source may be a shared block or a mapped file that is written again."""
    config = read_config(directories[family])
    tensors = dict(Checkpoint(read_tensors(directories[family]), config))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    decoder = Decoder(config, tensors, torch.float32, kernels_of(kernels))
    before = checksum(decoder.export())
    assert before == checksum(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert checksum(decoder.export()) == before
    other = random_model(FAMILIES[family], seed=3).state_dict()
    decoder.replace(other)
    before = checksum(decoder.export())
    for tensor in other.values():
        tensor.zero_()
    assert checksum(decoder.export()) == before


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mixtral"])
@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_tensors_leave_and_return(family: str, kernels: str, directories: dict[str, Path]) -> None:
    decoder = decoder_of(directories[family], kernels_of(kernels))
    decoder.set_adapter("a", random_adapter(decoder, 2, 4.0, ("self_attn.q_proj",), 0))
    batch = prefill(SEQUENCES, ["a", None])
    before, tensors = logits(decoder, batch), decoder.tensors()
    names = {name: tuple(tensor.shape) for name, tensor in decoder.export(None).items()}
    assert names == tensor_shapes(decoder.config)
    assert sum(t.numel() for t in tensors) >= sum(torch.Size(shape).numel() for shape in names.values())
    decoder.map_tensors(lambda tensor: tensor.to("meta"))  # nothing may still be computed with
    assert all(tensor.is_meta for tensor in decoder.tensors())
    returning = iter(tensors)
    decoder.map_tensors(lambda _: next(returning))
    assert torch.equal(logits(decoder, batch), before)


def test_casts_are_to_the_decoders_dtype(directories: dict[str, Path]) -> None:
    decoder = decoder_of(directories["llama"], dtype=torch.bfloat16)
    decoder.replace(read_tensors(directories["llama"]))
    tensors = read_tensors(directories["llama"])
    assert checksum(decoder.export()) == checksum({name: tensor.bfloat16() for name, tensor in tensors.items()})


class Packed(NamedTuple):
    data: torch.Tensor
    rows: int


def test_packed_weights_may_be_tuples() -> None:
    value = Packed(torch.ones(2), 7)
    mapped = map_packed(value, lambda tensor: tensor + 1)
    assert isinstance(mapped, Packed)
    assert torch.equal(mapped.data, torch.full((2,), 2.0))
    assert mapped.rows == 7
    copied = copy_packed(value, mapped)
    assert copied.data is value.data
    assert torch.equal(value.data, torch.full((2,), 2.0))


BASE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96,
    "vocab_size": 100, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip
MIXTRAL = {**BASE, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN = {
    **BASE, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "head_dim": 128,
}  # fmt: skip


def config_of(raw: dict[str, Any], tmp_path: Path) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return read_config(tmp_path)


def test_layers_with_experts(tmp_path: Path) -> None:
    assert config_of(BASE, tmp_path).moe is None
    mixtral = config_of(MIXTRAL, tmp_path)
    assert mixtral.moe.layers == (0, 1, 2, 3)
    assert mixtral.rope_theta == 1e6
    assert mixtral.moe.normalise
    assert config_of(QWEN, tmp_path).moe.layers == (0, 1, 2, 3)
    assert config_of({**QWEN, "mlp_only_layers": [0, 2]}, tmp_path).moe.layers == (1, 3)
    sparse = config_of({**QWEN, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, tmp_path)
    assert sparse.moe.layers == (1,)
    assert not sparse.moe.normalise
    assert config_of({**QWEN, "mlp_only_layers": [0, 1, 2, 3]}, tmp_path).moe is None
    renamed = {k: v for k, v in QWEN.items() if k != "num_experts"} | {"num_local_experts": 6}
    assert config_of(renamed, tmp_path).moe.experts == 6  # as transformers 5 writes it


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**BASE, "model_type": "gpt2"}, "'gpt2' is not served"),
        ({**BASE, "rope_scaling": {"rope_type": "yarn"}}, "rope scaling"),
        ({**BASE, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rotation of a part"),
        ({**BASE, "attention_bias": True}, "attention biases"),
        ({**QWEN, "attention_bias": True}, "attention biases"),
        ({**BASE, "hidden_act": "gelu"}, "SiLU"),
        ({**MIXTRAL, "sliding_window": 4096}, "sliding windows"),
        ({**QWEN, "use_sliding_window": True}, "sliding windows"),
        ({**BASE, "quantization_config": {"bits": 4}}, "quantised"),
        ({k: v for k, v in BASE.items() if k != "vocab_size"}, "has no 'vocab_size'"),
        ({k: v for k, v in MIXTRAL.items() if k != "num_experts_per_tok"}, "has no 'num_experts_per_tok'"),
    ],
)
def test_variations_that_are_not_implemented_are_refused(raw: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        config_of(raw, tmp_path)
