"""The decoder: one definition for the Llama, Qwen and Mixtral families, driven by the checkpoint's config.

The forward pass takes a flat batch of tokens, whatever mixture of prompts and decodes they are, and the paged cache. It
knows nothing of requests, and nothing of devices but the one that its weights are on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from rollout_server.kernels.interface import Batch, Kernels, LayerCache
from rollout_server.models.attention import Attention
from rollout_server.models.config import ModelConfig
from rollout_server.models.feed_forward import Dense, FeedForward
from rollout_server.models.linear import Stacked
from rollout_server.models.lora import Adapters, LayerLinears
from rollout_server.models.moe import SparseFeedForward
from rollout_server.models.parameter import Backend, Holder, Parameter, TensorMap
from rollout_server.models.rope import rope_tables
from rollout_server.models.weights import AdapterWeights, Checkpoint, LiveTensors, Tensors, read_tensors

ROW_BLOCK = 32
"""Rows of one matrix product in batch-invariant mode, where the kernels' own products are not invariant."""


class Layer(NamedTuple):
    input_norm: Parameter
    attention: Attention
    post_norm: Parameter
    feed_forward: FeedForward


class Decoder:
    """Weights in the kernels' layout, and the forward pass.

    Raises:
        ModelError: the tensors are not those of the config.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Tensors,
        dtype: torch.dtype,
        kernels: Kernels,
        *,
        batch_invariant: bool = False,
        device: torch.device | str = "cpu",
        max_adapters: int = 64,
    ) -> None:
        self.config, self.dtype, self.kernels = config, dtype, kernels
        self.batch_invariant = batch_invariant
        block = ROW_BLOCK if batch_invariant and not kernels.invariant else None
        backend = Backend(kernels, dtype, torch.device(device), block)
        self.embedding = Parameter(backend, "model.embed_tokens.weight")
        self.layers = [_layer(config, backend, index) for index in range(config.layers)]
        self.final_norm = Parameter(backend, "model.norm.weight")
        tied = config.tied_embeddings
        self.head = Stacked(backend, {"model.embed_tokens" if tied else "lm_head": config.vocab}, config.hidden)
        self._holders: list[Holder] = [
            self.embedding,
            *(holder for layer in self.layers for holder in _holders(layer)),
            self.final_norm,
            *([] if tied else [self.head]),
        ]
        self._adapters = Adapters(backend, [_linears(layer) for layer in self.layers], max_adapters)
        self._rope = rope_tables(config, backend.device)
        self._routes = _route_places(config)
        self.replace(tensors)

    # forward -----------------------------------------------------------------------------------------------------

    def hidden_states(
        self, batch: Batch, cache: Sequence[LayerCache], routed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states [T, W] after the last norm; keys and values enter the cache.

        `routed`: int16 [T, layers with experts, top K], filled with the experts that each token went to, likeliest
        first. Layers without experts have no place in it.

        Raises ModelError when the batch names an adapter that is not loaded.
        """
        return self.layers_over(F.embedding(batch.ids, self.embedding.value), batch, cache, routed)

    def layers_over(
        self, x: torch.Tensor, batch: Batch, cache: Sequence[LayerCache], routed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`hidden_states` of tokens that are embedded already, [T, W]; x is overwritten."""
        add_norm, eps, rope = self.kernels.add_norm, self.config.norm_eps, self._rope
        delta: torch.Tensor | None = None
        for layer, layer_cache, spans, place in zip(
            self.layers, cache, self._adapters.spans(batch.adapters), self._routes, strict=True
        ):
            normed = add_norm(x, delta, layer.input_norm.value, eps)
            delta = layer.attention(normed, rope, batch, layer_cache, spans)
            normed = add_norm(x, delta, layer.post_norm.value, eps)
            here = None if routed is None or place is None else routed[:, place]
            delta = layer.feed_forward(normed, spans, here)
        return add_norm(x, delta, self.final_norm.value, eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocab] of the chosen rows of `hidden_states`, in the decoder's dtype."""
        return self.head(hidden)

    # weights -----------------------------------------------------------------------------------------------------

    def replace(self, tensors: Tensors) -> None:
        """Take over a whole checkpoint's values, in place; adapters stay. Copies, casts to the decoder's dtype.

        Raises ModelError before anything has changed, when names or shapes are not the model's.
        """
        checkpoint = Checkpoint(tensors, self.config)
        for holder in self._holders:
            holder.load(checkpoint)
        if self.config.tied_embeddings:
            self.head.set(self.embedding.value)

    def set_adapter(self, name: str, weights: AdapterWeights | None) -> None:
        """Load or replace the adapter `name` ("": the policy's own), or remove it. Raises ModelError, with nothing changed."""
        self._adapters.set(name, weights)

    def has_adapter(self, name: str) -> bool:
        return name in self._adapters

    def export(self, adapter: str | None = "") -> LiveTensors:
        """The live tensors under Hugging Face's (or PEFT's) names: what a checksum must be taken of.

        By default the policy: its adapter if it has one, else the base weights. A name is that adapter; None is the
        base weights. Raises ModelError for the name of an adapter that is not loaded.
        """
        if adapter is None or (adapter == "" and "" not in self._adapters):
            return LiveTensors({name: partial(h.live, name) for h in self._holders for name in h.names})
        return self._adapters.export(adapter)

    def map_tensors(self, fn: TensorMap) -> None:
        """Put fn(tensor) in the place of every tensor, adapters' too: to move them off the device and back. Tensors that
        are one stay one."""
        seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def once(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in seen:
                seen[id(tensor)] = tensor, fn(tensor)
            return seen[id(tensor)][1]

        for holder in self._holders:
            holder.map_tensors(once)
        if self.config.tied_embeddings:
            self.head.map_tensors(once)
        self._adapters.map_tensors(once)
        self._rope = once(self._rope[0]), once(self._rope[1])

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that `map_tensors` meets, once each."""
        found: list[torch.Tensor] = []

        def collect(tensor: torch.Tensor) -> torch.Tensor:
            found.append(tensor)
            return tensor

        self.map_tensors(collect)
        return found


def load_decoder(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    kernels: Kernels,
    *,
    batch_invariant: bool = False,
    device: torch.device | str = "cpu",
    max_adapters: int = 64,
) -> Decoder:
    """From a directory of Hugging Face safetensors. Raises ModelError."""
    return Decoder(
        config,
        read_tensors(directory),
        dtype,
        kernels,
        batch_invariant=batch_invariant,
        device=device,
        max_adapters=max_adapters,
    )


def _layer(config: ModelConfig, backend: Backend, index: int) -> Layer:
    prefix = f"model.layers.{index}"
    feed_forward: FeedForward
    if config.moe is not None and config.is_moe(index):
        feed_forward = SparseFeedForward(config.moe, config.hidden, backend, f"{prefix}.mlp")
    else:
        feed_forward = Dense(config, backend, f"{prefix}.mlp")
    return Layer(
        Parameter(backend, f"{prefix}.input_layernorm.weight"),
        Attention(config, backend, f"{prefix}.self_attn"),
        Parameter(backend, f"{prefix}.post_attention_layernorm.weight"),
        feed_forward,
    )


def _holders(layer: Layer) -> list[Holder]:
    return [layer.input_norm, *layer.attention.holders(), layer.post_norm, *layer.feed_forward.holders()]


def _linears(layer: Layer) -> LayerLinears:
    attention, forward = layer.attention, layer.feed_forward
    dense = (forward.gate_up, forward.down) if isinstance(forward, Dense) else (None, None)
    return LayerLinears(attention.qkv, attention.out, *dense)


def _route_places(config: ModelConfig) -> list[int | None]:
    """For each layer, which of the layers with experts it is."""
    places = {} if config.moe is None else {layer: place for place, layer in enumerate(config.moe.layers)}
    return [places.get(layer) for layer in range(config.layers)]
