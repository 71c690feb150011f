"""Gated feed-forwards: SwiGLU (Shazeer, 2020), and what dense and sparse ones have in common."""

from __future__ import annotations

from typing import Protocol

import torch

from rollout_server.models.config import ModelConfig
from rollout_server.models.linear import Stacked
from rollout_server.models.lora import LayerSpans
from rollout_server.models.parameter import Backend, Holder


class FeedForward(Protocol):
    def __call__(self, x_TW: torch.Tensor, spans: LayerSpans, routed_TK: torch.Tensor | None) -> torch.Tensor:
        """[T, W]. A sparse feed-forward writes each token's experts to `routed_TK`, int16, likeliest first."""

    def holders(self) -> list[Holder]: ...


class Dense:
    """down(silu(gate(x)) · up(x)), gate and up as one linear map."""

    def __init__(self, config: ModelConfig, backend: Backend, prefix: str) -> None:
        wide = config.intermediate
        modules = {f"{prefix}.gate_proj": wide, f"{prefix}.up_proj": wide}
        self.gate_up = Stacked(backend, modules, config.hidden)
        self.down = Stacked(backend, {f"{prefix}.down_proj": config.hidden}, wide)
        self._silu_mul = backend.kernels.silu_mul

    def __call__(self, x_TW: torch.Tensor, spans: LayerSpans, routed_TK: torch.Tensor | None) -> torch.Tensor:
        return self.down(self._silu_mul(self.gate_up(x_TW, spans.gate_up)), spans.down)

    def holders(self) -> list[Holder]:
        return [self.gate_up, self.down]
