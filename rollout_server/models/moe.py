"""Sparse feed-forwards: a router, and the experts that it chooses from (Mixtral, Qwen3-MoE).

What the router computes and how the experts' outputs are summed follows transformers to the rounding. Experts stand
behind one call, `experts(x, ids, weights)`: a faster backend takes the place of `LoopedExperts`.
"""

from __future__ import annotations

from typing import Protocol

import torch

from rollout_server.models.config import MoeConfig
from rollout_server.models.linear import Linear, Stacked
from rollout_server.models.lora import LayerSpans
from rollout_server.models.parameter import Backend, Holder, TensorMap
from rollout_server.models.weights import Tensors


class Experts(Holder, Protocol):
    def __call__(self, x_TW: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Sum over K of weights · expert(x): [T, W]. `ids` int64; `weights` fp32 or the model's dtype."""


class SparseFeedForward:
    """softmax over all experts in fp32, the top K of them, their outputs weighted and summed."""

    def __init__(self, config: MoeConfig, hidden: int, backend: Backend, prefix: str) -> None:
        self.router = Stacked(backend, {f"{prefix}.gate": config.experts}, hidden)
        self.experts: Experts = LoopedExperts(config, backend, f"{prefix}.experts")
        self._top_k, self._normalise, self._wide = config.top_k, config.normalise, config.wide_weights

    def __call__(self, x_TW: torch.Tensor, spans: LayerSpans, routed_TK: torch.Tensor | None) -> torch.Tensor:
        weights, ids = self.route(x_TW)
        if routed_TK is not None:
            routed_TK.copy_(ids)
        return self.experts(x_TW, ids, weights)

    def route(self, x_TW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids [T, K] of each token's experts, likeliest first."""
        weights, ids = torch.softmax(self.router(x_TW).float(), dim=-1).topk(self._top_k, dim=-1)
        if self._normalise:
            weights /= weights.sum(dim=-1, keepdim=True)
        return (weights if self._wide else weights.to(x_TW.dtype)), ids

    def holders(self) -> list[Holder]:
        return [self.router, self.experts]


class LoopedExperts:
    """One expert after the other, each on the tokens that chose it: the plain path on any backend. A `Holder`."""

    def __init__(self, config: MoeConfig, backend: Backend, prefix: str) -> None:
        self.names = (f"{prefix}.gate_up_proj", f"{prefix}.down_proj")
        self._backend = backend
        self._gate_up = [Linear(backend) for _ in range(config.experts)]
        self._down = [Linear(backend) for _ in range(config.experts)]

    def __call__(self, x_TW: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        tokens, top_k = ids_TK.shape
        chosen = ids_TK.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self._down)).tolist()
        outputs = x_TW.new_empty(tokens * top_k, x_TW.shape[1])
        for expert, places in enumerate(torch.split(order, counts)):
            if len(places):
                wide = self._gate_up[expert](x_TW[places // top_k])
                outputs[places] = self._down[expert](self._backend.kernels.silu_mul(wide))
        weighted = outputs.view(tokens, top_k, -1) * weights_TK[..., None]
        return weighted.sum(dim=1).to(x_TW.dtype)

    def load(self, tensors: Tensors) -> None:
        for linears, name in zip((self._gate_up, self._down), self.names, strict=True):
            weights = tensors[name].to(self._backend.device, self._backend.dtype, copy=True)
            for linear, weight in zip(linears, weights, strict=True):
                linear.set(weight)

    def live(self, name: str) -> torch.Tensor:
        linears = self._gate_up if name == self.names[0] else self._down
        return torch.stack([linear.weight() for linear in linears])

    def map_tensors(self, fn: TensorMap) -> None:
        for linear in (*self._gate_up, *self._down):
            linear.map_tensors(fn)
