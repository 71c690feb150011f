"""What the decoder needs to know of a checkpoint, read from its Hugging Face `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msgspec import Struct

from lightning_rl.errors import ModelError

FAMILIES = {"llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"}
_THETA = {"mixtral": 1e6}
"""Base wavelength where `config.json` names none, if it is not 10,000."""


class MoeConfig(Struct, frozen=True, kw_only=True):
    """Sparse feed-forwards: a router sends each token to `top_k` of `experts` gated feed-forwards."""

    experts: int
    top_k: int
    intermediate: int
    """Of one expert."""
    layers: tuple[int, ...]
    """Layers that have experts; the others are dense."""
    normalise: bool
    """The chosen experts' probabilities are divided by their sum."""
    wide_weights: bool
    """They stay fp32 instead of being rounded to the model's dtype (Mixtral)."""


class Llama3Rope(Struct, frozen=True, kw_only=True):
    """Rotation stretched to contexts longer than those of pretraining (`rope_type` llama3)."""

    factor: float
    """By which low frequencies are divided."""
    low_turns: float
    """Frequencies that turn less often in `pretrained_positions` are low."""
    high_turns: float
    """Those that turn more often stay as they are."""
    pretrained_positions: int


class ModelConfig(Struct, frozen=True, kw_only=True):
    """Shape of a decoder-only transformer with grouped-query attention and gated feed-forwards."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Of the dense feed-forward."""
    vocab: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    attention_bias: bool
    """Bias on the q, k and v projections."""
    head_norm: bool
    """RMS norm on each head of q and k before rotation (Qwen3)."""
    eos_ids: tuple[int, ...]
    moe: MoeConfig | None = None
    rope_stretch: Llama3Rope | None = None

    def is_moe(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.layers


def read_config(directory: Path) -> ModelConfig:
    """Raises ModelError for a family or a variation that the decoder does not implement: nothing is ignored."""
    path = directory / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    family = raw.get("model_type", "")
    if family not in FAMILIES:
        raise ModelError(
            f"{directory}: model_type {family!r} is not served", hint=f"served are {', '.join(sorted(FAMILIES))}"
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    _check_variations(directory, family, raw, rope)
    try:
        heads = raw["num_attention_heads"]
        return ModelConfig(
            family=family,
            hidden=raw["hidden_size"],
            layers=raw["num_hidden_layers"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            intermediate=raw["intermediate_size"],
            vocab=raw["vocab_size"],
            max_positions=raw["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or _THETA.get(family, 10000.0)),
            norm_eps=raw["rms_norm_eps"],
            tied_embeddings=raw.get("tie_word_embeddings", False),
            attention_bias=family == "qwen2",
            head_norm=family in ("qwen3", "qwen3_moe"),
            eos_ids=_eos_ids(directory, raw),
            moe=_moe(family, raw),
            rope_stretch=_rope_stretch(rope),
        )
    except KeyError as error:
        raise ModelError(f"{path} has no {error.args[0]!r}", hint="a Hugging Face config.json names it") from error


def _check_variations(directory: Path, family: str, raw: dict[str, Any], rope: dict[str, Any]) -> None:
    if _rope_type(rope) not in ("default", "llama3"):
        raise ModelError(f"{directory}: rope scaling {rope} is not implemented")
    if (rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError(f"{directory}: rotation of a part of each head is not implemented")
    window = raw.get("sliding_window") if family == "mixtral" else None  # elsewhere `use_sliding_window` decides
    if (
        raw.get("use_sliding_window")
        or window is not None
        or raw.get("mlp_bias")
        or raw.get("hidden_act", "silu") != "silu"
    ):
        raise ModelError(
            f"{directory}: sliding windows, MLP biases and activations other than SiLU are not implemented"
        )
    if raw.get("quantization_config"):
        raise ModelError(f"{directory}: quantised checkpoints are not served")
    if family != "qwen2" and raw.get("attention_bias"):
        raise ModelError(f"{directory}: {family} with attention biases is not implemented")


def _rope_type(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _rope_stretch(rope: dict[str, Any]) -> Llama3Rope | None:
    if _rope_type(rope) != "llama3":
        return None
    return Llama3Rope(
        factor=rope["factor"],
        low_turns=rope["low_freq_factor"],
        high_turns=rope["high_freq_factor"],
        pretrained_positions=rope["original_max_position_embeddings"],
    )


def _moe(family: str, raw: dict[str, Any]) -> MoeConfig | None:
    """A layer without experts is dense: those in `mlp_only_layers`, and all but each `decoder_sparse_step`th."""
    layers = range(raw["num_hidden_layers"])
    if family == "mixtral":
        return MoeConfig(
            experts=raw["num_local_experts"],
            top_k=raw["num_experts_per_tok"],
            intermediate=raw["intermediate_size"],
            layers=tuple(layers),
            normalise=True,
            wide_weights=True,
        )
    if family == "qwen3_moe":
        experts = raw["num_local_experts"] if "num_local_experts" in raw else raw["num_experts"]
        step, dense = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
        sparse = tuple(i for i in layers if experts > 0 and i not in dense and (i + 1) % step == 0)
        if not sparse:
            return None
        return MoeConfig(
            experts=experts,
            top_k=raw["num_experts_per_tok"],
            intermediate=raw["moe_intermediate_size"],
            layers=sparse,
            normalise=raw.get("norm_topk_prob", False),
            wide_weights=False,
        )
    return None


def _eos_ids(directory: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    generation = directory / "generation_config.json"
    found = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
    found = raw.get("eos_token_id") if found is None else found
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)
