"""The critic: a small head that says what a state is worth, read from the policy's last hidden states.

Its gradient ends at those states: what it learns does not change them. It has its own optimiser and its own gradient clipping, is
checkpointed with the policy, and is no part of what is published or exported.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from trainers.deepspeed_engine import OptimiserConfig


class Critic(nn.Module):
    """V = w · tanh(A x + a) + b, where x is the state, normalised to mean 0 and variance 1. At first V = 0 everywhere. In fp32
    whatever the policy is in.
    """

    def __init__(self, width: int, hidden: int, *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, states: Tensor) -> Tensor:
        """[L, W] -> fp32 [L]."""
        x = functional.layer_norm(states.detach().float(), states.shape[-1:])
        values: Tensor = self.outer(self.inner(x).tanh())[:, 0]
        return values


class CriticOptimiser:
    """AdamW for the critic alone, in fp32 and outside DeepSpeed: the policy's clipping does not see its gradient.

    Every rank holds the whole critic and makes the same update.
    """

    def __init__(self, critic: Critic, config: OptimiserConfig) -> None:
        self.critic = critic
        self._parameters = list(critic.parameters())
        self._clipping = config.gradient_clipping
        self._adamw = torch.optim.AdamW(
            self._parameters, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]  # rows add to them in place
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def step(self, learning_rate: float) -> float:
        """One update from the mean of the ranks' gradients, as the policy's is; returns their norm before clipping."""
        for gradient in self._gradients:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clipping)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=False)
        return float(norm)

    def state(self) -> dict[str, Any]:
        return {"critic": self.critic.state_dict(), "optimiser": self._adamw.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.critic.load_state_dict(state["critic"])
        self._adamw.load_state_dict(state["optimiser"])


def value_loss(values: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Σ weight · (V − target)² over a row's terms, [L] each, and sums over those with a weight.

    `value_loss`: the loss itself; `value_targets`: their number.
    """
    error = targets - values
    loss = (weights * error.square()).sum()
    return loss, {"value_loss": float(loss.detach()), "value_targets": float((weights > 0).sum())}
