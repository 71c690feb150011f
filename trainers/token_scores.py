"""Log-prob and entropy of chosen tokens from hidden states, without keeping logits.

With a vocabulary of 50,000 the logits of a row are its largest tensor by far. They are made a slice at a time, reduced at once,
and made again in the backward pass, whose gradient is written out. With p = softmax(z / T), l = log p[target] and entropy H,
dl/dz = (onehot(target) - p) / T and dH/dz = -p (log p + H) / T. The second costs nothing where no loss has entropies in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SLICE = 128


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(targets), dtype=torch.float32)
        entropies = torch.empty_like(logprobs)
        normalisers = torch.empty_like(logprobs)
        for start in range(0, len(targets), SLICE):
            part = slice(start, start + SLICE)
            logits = _logits(hidden[part], head, temperatures[part])
            chosen = logits.gather(1, targets[part, None])[:, 0]
            top = logits.amax(-1, keepdim=True)
            weights = (logits - top).exp_()
            total = weights.sum(-1)
            normalisers[part] = total.log() + top[:, 0]
            logprobs[part] = chosen - normalisers[part]
            entropies[part] = normalisers[part] - weights.mul_(logits).sum(-1) / total
        ctx.save_for_backward(hidden, head, targets, temperatures, normalisers, entropies)
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, head, targets, temperatures, normalisers, entropies = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros(head.shape, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), SLICE):
            part = slice(start, start + SLICE)
            logp = _logits(hidden[part], head, temperatures[part]).sub_(normalisers[part, None])
            scale = torch.zeros_like(logp[:, :1]) if grad is None else (grad[part] / temperatures[part])[:, None]
            if grad_entropy is None:
                d = logp.exp_().mul_(-scale)
            else:
                bonus = (grad_entropy[part] / temperatures[part])[:, None]
                p = logp.exp()
                d = logp.add_(entropies[part, None]).mul_(bonus).add_(scale).mul_(p).neg_()
            d.scatter_add_(1, targets[part, None], scale)
            low = d.to(head.dtype)
            grad_hidden[part] = low @ head
            if grad_head is not None:
                grad_head += (low.T @ hidden[part]).float()
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), None, None


def _logits(hidden: Tensor, head: Tensor, temperatures: Tensor) -> Tensor:
    """fp32 [L, V], divided by the temperature."""
    logits = torch.nn.functional.linear(hidden, head).float()
    return logits if bool((temperatures == 1).all()) else logits.div_(temperatures[:, None])


def token_scores(hidden: Tensor, head: Tensor, targets: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [L, W], head [V, W], targets and temperatures [L] -> fp32 log-probs [L] and entropies [L], with gradients."""
    logprobs, entropies = _TokenScores.apply(hidden, head, targets, temperatures)
    return logprobs, entropies
