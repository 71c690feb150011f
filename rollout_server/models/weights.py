"""Checkpoint tensors into the decoder's layout and back.

The decoder keeps q, k and v in one matrix and gate and up in another, for speed. `export` undoes that on the live
tensors, under Hugging Face's names: a checksum taken there is of what the worker really computes with, not of what it
was sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lightning_rl.errors import ModelError
from rollout_server.models.config import ModelConfig

Tensors = Mapping[str, torch.Tensor]

PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The decoder's linear maps and the checkpoint's modules stacked in each, in order."""


def part_sizes(config: ModelConfig, linear: str) -> list[int]:
    """Output rows of each module stacked in `linear`."""
    return {
        "qkv": [config.heads * config.head_dim, config.kv_heads * config.head_dim, config.kv_heads * config.head_dim],
        "out": [config.hidden],
        "gate_up": [config.intermediate, config.intermediate],
        "down": [config.hidden],
    }[linear]


def read_tensors(directory: Path, stem: str = "model") -> dict[str, torch.Tensor]:
    """All tensors of a safetensors checkpoint, sharded or not, on the CPU.

    Raises ModelError when files are missing or damaged.
    """
    index = directory / f"{stem}.safetensors.index.json"
    try:
        names = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.is_file()
            else [f"{stem}.safetensors"]
        )
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            with safe_open(directory / name, framework="pt", device="cpu") as file:
                tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{directory}: weights cannot be read: {error}") from error
    return tensors


def take(tensors: Tensors, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """One tensor, of the shape the config promises."""
    if name not in tensors:
        raise ModelError(f"the checkpoint has no tensor {name!r}")
    if tuple(tensors[name].shape) != shape:
        raise ModelError(f"{name} has shape {tuple(tensors[name].shape)}, the config says {shape}")
    return tensors[name].to(dtype)


class AdapterWeights:
    """A PEFT LoRA adapter, per module: y += (x A^T) B^T · alpha/rank."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        try:
            raw = json.loads((directory / "adapter_config.json").read_text())
        except (OSError, ValueError) as error:
            raise ModelError(f"{directory}: adapter_config.json cannot be read: {error}") from error
        if raw.get("peft_type") != "LORA" or raw.get("use_dora") or raw.get("bias", "none") != "none":
            raise ModelError(f"{directory}: only plain LoRA adapters without biases are served")
        if raw.get("rank_pattern") or raw.get("alpha_pattern"):
            raise ModelError(f"{directory}: adapters with per-module ranks are not served")
        self.rank: int = raw["r"]
        self.scale = raw["lora_alpha"] / (self.rank**0.5 if raw.get("use_rslora") else self.rank)
        self.tensors = {name: tensor.to(dtype) for name, tensor in read_tensors(directory, "adapter_model").items()}

    def pair(self, layer: int, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        prefix = f"base_model.model.model.layers.{layer}.{module}"
        a, b = self.tensors.get(f"{prefix}.lora_A.weight"), self.tensors.get(f"{prefix}.lora_B.weight")
        return None if a is None or b is None else (a, b)

    def check_modules(self, config: ModelConfig) -> None:
        """Raises ModelError when the adapter holds a tensor that no linear map of the decoder takes."""
        known = {
            f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"
            for layer in range(config.layers)
            for modules in PARTS.values()
            for module in modules
            for side in "AB"
        }
        unknown = sorted(set(self.tensors) - known)
        if unknown:
            raise ModelError(f"the adapter has {len(unknown)} tensors for unknown modules, first {unknown[0]!r}")


def stack_adapter(
    pairs: list[tuple[torch.Tensor, torch.Tensor] | None], inputs: int, sizes: list[int]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Adapters of stacked modules as one pair: A [ranks, in] stacked, B [out, ranks] block-diagonal."""
    present = [pair for pair in pairs if pair is not None]
    if not present:
        return None
    dtype = present[0][0].dtype
    ranks = sum(a.shape[0] for a, _ in present)
    down = torch.empty(ranks, inputs, dtype=dtype)
    up = torch.zeros(sum(sizes), ranks, dtype=dtype)
    row = rank = 0
    for pair, size in zip(pairs, sizes, strict=True):
        if pair is not None:
            a, b = pair
            down[rank : rank + a.shape[0]] = a
            up[row : row + size, rank : rank + a.shape[0]] = b
            rank += a.shape[0]
        row += size
    return down, up
