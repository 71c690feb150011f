"""What is on disk or on the wire: checkpoint tensors by name, and LoRA adapters.

The names used inside are those of transformers' modules in memory (`state_dict`): experts stacked, one tensor for all
gates and ups of a layer, one for all downs. `Checkpoint` reads them from that form and from the one on disk (and on the
hub), where each expert has tensors of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lightning_rl.errors import ModelError
from rollout_server.models.config import ModelConfig

Tensors = Mapping[str, torch.Tensor]

_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(\w+)\.weight")
_STACKED = {
    "gate_proj": ("gate_up_proj", 0), "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1), "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0), "w2": ("down_proj", 0),
}  # fmt: skip
"""An expert's module: the stacked tensor that it is part of, and its place in it."""


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, as transformers names it in memory, and its shape."""
    c = config
    query, key = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab, c.hidden)}
    for layer in range(c.layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (c.hidden,)
        for module, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            shapes[f"{prefix}.self_attn.{module}.weight"] = (rows, c.hidden)
            if c.attention_bias:
                shapes[f"{prefix}.self_attn.{module}.bias"] = (rows,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (c.hidden, query)
        if c.head_norm:
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (c.head_dim,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (c.head_dim,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (c.hidden,)
        if c.moe is not None and c.is_moe(layer):
            experts, wide = c.moe.experts, c.moe.intermediate
            shapes[f"{prefix}.mlp.gate.weight"] = (experts, c.hidden)
            shapes[f"{prefix}.mlp.experts.gate_up_proj"] = (experts, 2 * wide, c.hidden)
            shapes[f"{prefix}.mlp.experts.down_proj"] = (experts, c.hidden, wide)
        else:
            shapes[f"{prefix}.mlp.gate_proj.weight"] = (c.intermediate, c.hidden)
            shapes[f"{prefix}.mlp.up_proj.weight"] = (c.intermediate, c.hidden)
            shapes[f"{prefix}.mlp.down_proj.weight"] = (c.hidden, c.intermediate)
    shapes["model.norm.weight"] = (c.hidden,)
    if not c.tied_embeddings:
        shapes["lm_head.weight"] = (c.vocab, c.hidden)
    return shapes


class Checkpoint(Mapping[str, torch.Tensor]):
    """A model's base weights under transformers' names in memory, checked against its config.

    Experts are stacked when they are asked for, so that no more than one layer of them is held twice.

    Raises:
        ModelError: tensors are missing, unknown, of another shape or of a type that is no plain float.
    """

    def __init__(self, tensors: Tensors, config: ModelConfig) -> None:
        self._tensors = tensors
        self._whole: dict[str, str] = {}
        self._stacks: dict[str, dict[tuple[int, int], str]] = {}
        for source in tensors:
            name = source.replace(".block_sparse_moe.", ".mlp.")
            expert = _EXPERT.fullmatch(name)
            if expert is not None and expert[3] in _STACKED:
                stack, part = _STACKED[expert[3]]
                self._stacks.setdefault(f"{expert[1]}.{stack}", {})[int(expert[2]), part] = source
            elif not name.endswith(".rotary_emb.inv_freq"):  # a constant that old checkpoints hold
                self._whole[name] = source
        if config.tied_embeddings and "lm_head.weight" in self._whole:
            self._drop_tied_head()
        self._check(tensor_shapes(config))

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._whole:
            return self._tensors[self._whole[name]]
        pieces = self._stacks[name]
        experts, parts = (last + 1 for last in max(pieces))
        return torch.stack(
            [torch.cat([self._tensors[pieces[e, part]] for part in range(parts)]) for e in range(experts)]
        )

    def __contains__(self, name: object) -> bool:
        return name in self._whole or name in self._stacks

    def __iter__(self) -> Iterator[str]:
        return iter([*self._whole, *self._stacks])

    def __len__(self) -> int:
        return len(self._whole) + len(self._stacks)

    def _drop_tied_head(self) -> None:
        head, embedding = self._whole.pop("lm_head.weight"), self._whole.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(self._tensors[head], self._tensors[embedding]):
            raise ModelError(
                "the config ties lm_head to the embedding, the tensors differ",
                hint='set "tie_word_embeddings": false in config.json if the head is one of its own',
            )

    def _check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        missing = [name for name in shapes if name not in self]
        if missing:
            raise ModelError(f"the checkpoint lacks {len(missing)} tensors, first {missing[0]!r}")
        unknown = sorted(name for name in self if name not in shapes)
        if unknown:
            raise ModelError(f"the checkpoint has {len(unknown)} tensors that the model does not, first {unknown[0]!r}")
        for name, shape in shapes.items():
            found = self._shape(name)
            if found != shape:
                raise ModelError(f"{name} has shape {found}, the config says {shape}")
        for name, tensor in self._tensors.items():
            if tensor.dtype not in _DTYPES:
                raise ModelError(f"{name} is {tensor.dtype}: quantised checkpoints are not served")

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self._whole:
            return tuple(self._tensors[self._whole[name]].shape)
        pieces = self._stacks[name]
        experts = max(expert for expert, _ in pieces) + 1
        parts = 2 if name.endswith("gate_up_proj") else 1
        lacking = [(e, part) for e in range(experts) for part in range(parts) if (e, part) not in pieces]
        if lacking:
            raise ModelError(f"{name}: expert {lacking[0][0]} lacks tensors")
        found = {tuple(self._tensors[source].shape) for source in pieces.values()}
        if len(found) > 1:
            raise ModelError(f"{name}: the experts have different shapes: {sorted(found)}")
        rows, *rest = found.pop()
        return experts, parts * rows, *rest


class LiveTensors(Mapping[str, torch.Tensor]):
    """Tensors by name, each brought into the checkpoint's layout when it is asked for: what the decoder computes with at
    that moment. Writing to them may or may not write to the model."""

    def __init__(self, readers: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


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


_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_UNSERVED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
    "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens",
    "velora_config", "monteclora_config", "arrow_config", "kasa_config",
)  # fmt: skip
"""Settings of PEFT's LoraConfig under which a forward pass is not plain LoRA's."""


class AdapterWeights:
    """A LoRA adapter (Hu et al., 2021) as PEFT saves it, per module: y += (x A^T) B^T · scale.

    `config` is PEFT's `adapter_config.json`; scale is alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski, 2023).

    Raises:
        ModelError: it is not plain LoRA, or a tensor's name is not one that PEFT gives.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Tensors, dtype: torch.dtype) -> None:
        kind = config.get("peft_type")
        if kind != "LORA" or config.get("bias", "none") != "none":
            raise ModelError(
                f"only LoRA adapters without biases are served, not {kind} with bias {config.get('bias')!r}"
            )
        unserved = [setting for setting in _UNSERVED if config.get(setting)]
        if unserved:
            raise ModelError(f"only plain LoRA adapters are served, this one has {', '.join(unserved)}")
        try:
            self.rank = int(config["r"])
            alpha = float(config["lora_alpha"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"the adapter's config has no usable r and lora_alpha: {error!r}") from error
        if self.rank < 1:
            raise ModelError(f"the adapter's config has r = {self.rank}")
        self.scale = alpha / (self.rank**0.5 if config.get("use_rslora") else self.rank)
        self.modules: dict[str, dict[str, torch.Tensor]] = {}
        """Module name (`model.layers.0.self_attn.q_proj`) to A [rank, inputs] and B [outputs, rank]."""
        for name, tensor in tensors.items():
            parsed = _LORA.fullmatch(name)
            if parsed is None:
                raise ModelError(f"the adapter has a tensor {name!r}, which is no linear map's LoRA")
            self.modules.setdefault(parsed[1], {})[parsed[2]] = tensor.to(dtype)

    @classmethod
    def from_directory(cls, directory: Path, dtype: torch.dtype) -> AdapterWeights:
        """`adapter_config.json` and `adapter_model.safetensors`. Raises ModelError."""
        try:
            config = json.loads((directory / "adapter_config.json").read_text())
        except (OSError, ValueError) as error:
            raise ModelError(f"{directory}: adapter_config.json cannot be read: {error}") from error
        try:
            return cls(config, read_tensors(directory, "adapter_model"), dtype)
        except ModelError as error:
            raise ModelError(f"{directory}: {error}", hint=error.hint) from error
