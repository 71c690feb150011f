"""One decoder for every dense family: Llama, Qwen2, Qwen3, by their config alone.

A pure function of weights, cache and a flat batch of tokens; it knows neither sequences nor requests nor ranks.
Adapters are applied unmerged, as the trainer applies them, so that both sides round alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from rollout_server.kernels.interface import Batch, Kernels, LayerCache
from rollout_server.models.config import ModelConfig
from rollout_server.models.weights import PARTS, AdapterWeights, Tensors, part_sizes, stack_adapter, take

ROW_BLOCK = 32
"""Rows of one matrix product in batch-invariant mode."""


@dataclass
class Linear:
    """y = x W^T + b, plus the adapter's (x A^T · scale) B^T when one is set."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    adapter: tuple[torch.Tensor, torch.Tensor, float] | None = None
    block: int | None = None
    """Compute this many rows at a time, whatever the batch: equal shapes give equal bits."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.block is None:
            return self._product(x)
        rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -rows % self.block))
        return torch.cat([self._product(part) for part in padded.split(self.block)])[:rows]

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.adapter is not None:
            down, up, scale = self.adapter
            y += F.linear(F.linear(x, down) * scale, up)
        return y


@dataclass
class Layer:
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    linears: dict[str, Linear]
    head_norms: tuple[torch.Tensor, torch.Tensor] | None


class Decoder:
    """Weights in the decoder's layout, and the forward pass."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Tensors,
        dtype: torch.dtype,
        kernels: Kernels,
        *,
        batch_invariant: bool = False,
    ) -> None:
        self.config, self.dtype, self.kernels = config, dtype, kernels
        self.batch_invariant = batch_invariant
        self.adapter: AdapterWeights | None = None
        block = ROW_BLOCK if batch_invariant else None
        c = config
        inputs = {"qkv": c.hidden, "out": c.heads * c.head_dim, "gate_up": c.hidden, "down": c.intermediate}

        def linear(layer: int, name: str) -> Linear:
            sizes = part_sizes(c, name)
            prefix = f"model.layers.{layer}"
            parts = [
                take(tensors, f"{prefix}.{module}.weight", (size, inputs[name]), dtype)
                for module, size in zip(PARTS[name], sizes, strict=True)
            ]
            bias = None
            if c.attention_bias and name == "qkv":
                bias = torch.cat(
                    [
                        take(tensors, f"{prefix}.{module}.bias", (size,), dtype)
                        for module, size in zip(PARTS[name], sizes, strict=True)
                    ]
                )
            return Linear(torch.cat(parts), bias, block=block)

        self.embedding = take(tensors, "model.embed_tokens.weight", (c.vocab, c.hidden), dtype)
        self.layers = [
            Layer(
                take(tensors, f"model.layers.{i}.input_layernorm.weight", (c.hidden,), dtype),
                take(tensors, f"model.layers.{i}.post_attention_layernorm.weight", (c.hidden,), dtype),
                {name: linear(i, name) for name in PARTS},
                (
                    take(tensors, f"model.layers.{i}.self_attn.q_norm.weight", (c.head_dim,), dtype),
                    take(tensors, f"model.layers.{i}.self_attn.k_norm.weight", (c.head_dim,), dtype),
                )
                if c.head_norm
                else None,
            )
            for i in range(c.layers)
        ]
        self.final_norm = take(tensors, "model.norm.weight", (c.hidden,), dtype)
        head = self.embedding if c.tied_embeddings else take(tensors, "lm_head.weight", (c.vocab, c.hidden), dtype)
        self.head = Linear(head, block=block)
        half = torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim
        angles = torch.outer(torch.arange(c.max_positions, dtype=torch.float32), 1.0 / c.rope_theta**half)
        self.rope = (angles.cos().contiguous(), angles.sin().contiguous())

    def set_adapter(self, adapter: AdapterWeights | None) -> None:
        """Replace the adapter of every linear map; None removes it. Raises ModelError before anything has changed."""
        if adapter is not None:
            adapter.check_modules(self.config)
        self.adapter = adapter
        for index, layer in enumerate(self.layers):
            for name, linear in layer.linears.items():
                linear.adapter = None
                if adapter is None:
                    continue
                pairs = [adapter.pair(index, module) for module in PARTS[name]]
                stacked = stack_adapter(pairs, linear.weight.shape[1], part_sizes(self.config, name))
                if stacked is not None:
                    linear.adapter = (*stacked, adapter.scale)

    def hidden_states(self, batch: Batch, cache: list[LayerCache]) -> torch.Tensor:
        """Final hidden states [T, W] before the last norm has been taken to logits; keys and values enter the cache."""
        c, kernels = self.config, self.kernels
        x = self.embedding[batch.ids]
        delta: torch.Tensor | None = None
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            normed = kernels.add_norm(x, delta, layer.input_norm, c.norm_eps)
            qkv = layer.linears["qkv"](normed)
            if layer.head_norms is not None:
                qkv = self._norm_heads(qkv, layer.head_norms)
            q = kernels.rope_store(qkv, self.rope, batch, layer_cache, c.heads)
            delta = layer.linears["out"](kernels.attention(q, batch, layer_cache))
            normed = kernels.add_norm(x, delta, layer.post_norm, c.norm_eps)
            gate, up = layer.linears["gate_up"](normed).chunk(2, dim=-1)
            delta = layer.linears["down"](F.silu(gate) * up)
        return kernels.add_norm(x, delta, self.final_norm, c.norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits [rows, vocab] of the chosen rows of `hidden_states`."""
        return self.head(hidden).float()

    def _norm_heads(self, qkv: torch.Tensor, norms: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        c = self.config
        widths = part_sizes(c, "qkv")
        q, k, v = qkv.split(widths, dim=-1)
        normed = [
            self.kernels.add_norm(part.reshape(-1, c.head_dim).contiguous(), None, norm, c.norm_eps).view(part.shape)
            for part, norm in ((q, norms[0]), (k, norms[1]))
        ]
        return torch.cat([*normed, v], dim=-1)

    def export(self) -> dict[str, torch.Tensor]:
        """The live trainable tensors under Hugging Face's (or PEFT's) names: what a checksum must be taken of."""
        return self._export_adapter(self.adapter) if self.adapter is not None else self.export_full()

    def export_full(self) -> dict[str, torch.Tensor]:
        """The base weights, views of the live tensors."""
        tensors = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.final_norm}
        if not self.config.tied_embeddings:
            tensors["lm_head.weight"] = self.head.weight
        for i, layer in enumerate(self.layers):
            prefix = f"model.layers.{i}"
            tensors[f"{prefix}.input_layernorm.weight"] = layer.input_norm
            tensors[f"{prefix}.post_attention_layernorm.weight"] = layer.post_norm
            if layer.head_norms is not None:
                tensors[f"{prefix}.self_attn.q_norm.weight"], tensors[f"{prefix}.self_attn.k_norm.weight"] = (
                    layer.head_norms
                )
            for name, linear in layer.linears.items():
                sizes = part_sizes(self.config, name)
                for module, part in zip(PARTS[name], linear.weight.split(sizes), strict=True):
                    tensors[f"{prefix}.{module}.weight"] = part
                if linear.bias is not None:
                    for module, part in zip(PARTS[name], linear.bias.split(sizes), strict=True):
                        tensors[f"{prefix}.{module}.bias"] = part
        return tensors

    def _export_adapter(self, adapter: AdapterWeights) -> dict[str, torch.Tensor]:
        tensors = {}
        for i, layer in enumerate(self.layers):
            for name, linear in layer.linears.items():
                if linear.adapter is None:
                    continue
                down, up, _ = linear.adapter
                rank = row = 0
                for module, size in zip(PARTS[name], part_sizes(self.config, name), strict=True):
                    if adapter.pair(i, module) is not None:
                        prefix = f"base_model.model.model.layers.{i}.{module}"
                        tensors[f"{prefix}.lora_A.weight"] = down[rank : rank + adapter.rank]
                        tensors[f"{prefix}.lora_B.weight"] = up[row : row + size, rank : rank + adapter.rank]
                        rank += adapter.rank
                    row += size
        return tensors


def load_decoder(
    directory: Path, config: ModelConfig, dtype: torch.dtype, kernels: Kernels, *, batch_invariant: bool = False
) -> Decoder:
    from rollout_server.models.weights import read_tensors

    return Decoder(config, read_tensors(directory), dtype, kernels, batch_invariant=batch_invariant)
