"""Grouped-query attention over the paged cache (Ainslie et al., 2023), with Qwen's variations."""

from __future__ import annotations

import torch

from rollout_server.kernels.interface import Batch, LayerCache
from rollout_server.models.config import ModelConfig
from rollout_server.models.linear import Stacked
from rollout_server.models.lora import LayerSpans
from rollout_server.models.parameter import Backend, Holder, TensorMap
from rollout_server.models.rope import Rope
from rollout_server.models.weights import Tensors


class Attention:
    """q, k and v as one linear map, rotation, attention, output."""

    def __init__(self, config: ModelConfig, backend: Backend, prefix: str) -> None:
        c = config
        query, key = c.heads * c.head_dim, c.kv_heads * c.head_dim
        modules = {f"{prefix}.q_proj": query, f"{prefix}.k_proj": key, f"{prefix}.v_proj": key}
        self.qkv = Stacked(backend, modules, c.hidden, bias=c.attention_bias)
        self.out = Stacked(backend, {f"{prefix}.o_proj": c.hidden}, query)
        self.norms = HeadNorms(config, backend, prefix) if c.head_norm else None
        self._heads = c.heads
        self._rope_store, self._attention = backend.kernels.rope_store, backend.kernels.attention

    def __call__(
        self, x_TW: torch.Tensor, rope: Rope, batch: Batch, cache: LayerCache, spans: LayerSpans
    ) -> torch.Tensor:
        """[T, W]; the tokens' keys and values enter the cache."""
        qkv = self.qkv(x_TW, spans.qkv)
        if self.norms is not None:
            self.norms(qkv)
        q = self._rope_store(qkv, rope, batch, cache, self._heads)
        return self.out(self._attention(q, batch, cache), spans.out)

    def holders(self) -> list[Holder]:
        return [self.qkv, self.out] if self.norms is None else [self.qkv, self.out, self.norms]


class HeadNorms:
    """RMS norm on each head of q and k (Qwen3). A `Holder`."""

    def __init__(self, config: ModelConfig, backend: Backend, prefix: str) -> None:
        self.names = (f"{prefix}.q_norm.weight", f"{prefix}.k_norm.weight")
        self._heads, self._both, self._dim = config.heads, config.heads + config.kv_heads, config.head_dim
        self._eps, self._add_norm = config.norm_eps, backend.kernels.add_norm
        self._weights_HD = torch.ones(self._both, self._dim, dtype=backend.dtype, device=backend.device)
        self._ones_D = torch.ones(self._dim, dtype=backend.dtype, device=backend.device)

    def __call__(self, qkv_TX: torch.Tensor) -> None:
        """Normalise q and k in place. One norm over all heads, v's too, costs less than taking them apart."""
        normed = self._add_norm(qkv_TX.view(-1, self._dim), None, self._ones_D, self._eps)
        heads = (qkv_TX.shape[0], -1, self._dim)
        torch.mul(normed.view(heads)[:, : self._both], self._weights_HD, out=qkv_TX.view(heads)[:, : self._both])

    def load(self, tensors: Tensors) -> None:
        q, k = (tensors[name] for name in self.names)
        self._weights_HD[: self._heads] = q
        self._weights_HD[self._heads :] = k

    def live(self, name: str) -> torch.Tensor:
        return self._weights_HD[0 if name == self.names[0] else self._heads]

    def map_tensors(self, fn: TensorMap) -> None:
        self._weights_HD, self._ones_D = fn(self._weights_HD), fn(self._ones_D)
