"""Random LoRA adapters in PEFT's directory format, for every linear layer of a dense decoder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from rollout_server.models.config import ModelConfig

RANK = 16
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(directory: Path, config: ModelConfig, dtype: torch.dtype, seed: int) -> None:
    """Rank 16, alpha 32, both factors random, so that no product is zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config.layers):
        for module, (inputs, outputs) in _widths(config).items():
            part = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{part}.{module}"
            down = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
            up = torch.randn(outputs, RANK, generator=generator) * 0.01
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down.to(dtype), up.to(dtype)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(_peft_config(), indent=2))


def _widths(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Module → (inputs, outputs)."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    hidden, inner = config.hidden, config.intermediate
    shapes = ((hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden))
    return dict(zip(_MODULES, (*shapes, (hidden, inner), (hidden, inner), (inner, hidden)), strict=True))


def _peft_config() -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": list(_MODULES),
    }
