"""What the decoder needs to know of a checkpoint, read from its Hugging Face `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msgspec import Struct

from lightning_rl.errors import ModelError

FAMILIES = {"llama", "qwen2", "qwen3"}


class ModelConfig(Struct, frozen=True, kw_only=True):
    """Shape of a decoder-only transformer with grouped-query attention and a gated feed-forward."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
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


def read_config(directory: Path) -> ModelConfig:
    """Raises ModelError for a family or a variation that the decoder does not implement: nothing is ignored."""
    try:
        raw: dict[str, Any] = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory / 'config.json'} cannot be read: {error}") from error
    family = raw.get("model_type", "")
    if family not in FAMILIES:
        raise ModelError(
            f"{directory}: model_type {family!r} is not served", hint=f"served are {', '.join(sorted(FAMILIES))}"
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ModelError(f"{directory}: rope scaling {rope} is not implemented")
    if raw.get("use_sliding_window") or raw.get("mlp_bias") or raw.get("hidden_act", "silu") != "silu":
        raise ModelError(
            f"{directory}: sliding windows, MLP biases and activations other than SiLU are not implemented"
        )
    heads = raw["num_attention_heads"]
    if family == "llama" and raw.get("attention_bias"):
        raise ModelError(f"{directory}: Llama with attention biases is not implemented")
    return ModelConfig(
        family=family,
        hidden=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=raw.get("num_key_value_heads", heads),
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        intermediate=raw["intermediate_size"],
        vocab=raw["vocab_size"],
        max_positions=raw["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta", 10000.0)),
        norm_eps=raw["rms_norm_eps"],
        tied_embeddings=raw.get("tie_word_embeddings", False),
        attention_bias=family == "qwen2",
        head_norm=family == "qwen3",
        eos_ids=_eos_ids(directory, raw),
    )


def _eos_ids(directory: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    generation = directory / "generation_config.json"
    found = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
    found = raw.get("eos_token_id") if found is None else found
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)
