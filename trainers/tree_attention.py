"""Attention over a row that is a prefix tree, for any transformers model, without touching the model.

In depth-first order the keys that a block of neighbouring queries sees are few: the ancestors of its first node, and the block
itself. Computing block by block costs what the tree costs; one dense product with a mask would cost the row squared, four times
as much for a group of eight. Registered with transformers under NAME; the blocks travel as a keyword of the model's forward.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

NAME = "lrl_tree"
BLOCK = 128
"""Queries of one block at most."""
SHORTEST = 48
"""A new branch starts a new block once the block has this many queries."""


class Block(NamedTuple):
    start: int
    end: int
    keys: Tensor
    """int64 [k]: ancestors of node `start`, then start … end-1."""
    visible: Tensor
    """bool [end - start, k]"""


def tree_blocks(ends: list[int]) -> list[Block]:
    """The blocks of a row of N nodes; `ends[k]` is one past the last descendant of node k."""
    parents = _parents(ends)
    n = len(ends)
    cuts = [0]
    for node in range(1, n):
        length = node - cuts[-1]
        if length == BLOCK or (length >= SHORTEST and parents[node] != node - 1):
            cuts.append(node)
    cuts.append(n)
    last = torch.tensor(ends)
    return [_block(start, end, parents, last) for start, end in itertools.pairwise(cuts)]


def _block(start: int, end: int, parents: list[int], ends: Tensor) -> Block:
    ancestors = []
    node = parents[start]
    while node >= 0:
        ancestors.append(node)
        node = parents[node]
    keys = torch.tensor([*reversed(ancestors), *range(start, end)])
    queries = torch.arange(start, end)
    visible = (keys[None, :] <= queries[:, None]) & (queries[:, None] < ends[keys][None, :])
    return Block(start, end, keys, visible)


def _parents(ends: list[int]) -> list[int]:
    parents: list[int] = []
    stack: list[int] = []
    for node, end in enumerate(ends):
        while stack and ends[stack[-1]] <= node:
            stack.pop()
        parents.append(stack[-1] if stack else -1)
        if end > node + 1:
            stack.append(node)
    return parents


class _TreeAttention(torch.autograd.Function):
    """Softmax attention block by block, gradients added up in place: autograd alone would allocate and add one full
    gradient of keys and values for every block."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: list[Block], scaling: float) -> Tensor:
        # query [K, G, N, D]; key, value [K, N, D]
        kv_heads, group, _, dim = query.shape
        out = torch.empty_like(query)
        kept: list[Tensor] = []
        for block in tree:
            q = query[:, :, block.start : block.end].reshape(kv_heads, -1, dim)
            scores = torch.matmul(q, key[:, block.keys].transpose(1, 2)).float().mul_(scaling)
            scores.view(kv_heads, group, *block.visible.shape).masked_fill_(~block.visible, -torch.inf)
            weights = torch.softmax(scores, dim=-1).to(query.dtype)
            out[:, :, block.start : block.end] = torch.matmul(weights, value[:, block.keys]).view(
                kv_heads, group, -1, dim
            )
            kept.append(weights)
        ctx.tree, ctx.scaling = tree, scaling
        ctx.save_for_backward(query, key, value, out, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *kept = ctx.saved_tensors
        kv_heads, group, _, dim = query.shape
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block, weights in zip(ctx.tree, kept, strict=True):
            part = slice(block.start, block.end)
            q, o, go = (t[:, :, part].reshape(kv_heads, -1, dim) for t in (query, out, grad_out))
            grad_weights = torch.matmul(go, value[:, block.keys].transpose(1, 2)).float()
            mean = (go.float() * o.float()).sum(-1, keepdim=True)
            grad_scores = grad_weights.sub_(mean).mul_(weights).mul_(ctx.scaling).to(query.dtype)
            grad_query[:, :, part] = torch.matmul(grad_scores, key[:, block.keys]).view(kv_heads, group, -1, dim)
            grad_key.index_add_(1, block.keys, torch.matmul(grad_scores.transpose(1, 2), q))
            grad_value.index_add_(1, block.keys, torch.matmul(weights.transpose(1, 2), go))
        return grad_query, grad_key, grad_value, None, None


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: list[Block],
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """query [1, H, N, D], key and value [1, K, N, D] -> [1, N, H, D]."""
    heads, n, dim = query.shape[1:]
    kv_heads = key.shape[1]
    grouped = query.reshape(kv_heads, heads // kv_heads, n, dim)
    out = _TreeAttention.apply(grouped, key[0], value[0], tree, dim**-0.5 if scaling is None else scaling)
    return out.view(1, heads, n, dim).transpose(1, 2), None


AttentionInterface.register(NAME, tree_attention)
