"""What a backend computes for the decoder besides matrix products.

Two implementations: `reference` (plain torch, any device, the oracle) and `native` (C, CPU). Token batches are flat:
T tokens of many sequences, each with its position and the page slot where its key and value live.

Shapes: T tokens, H query heads, K key/value heads, D head dim, P pages of S positions, W hidden width.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Batch(NamedTuple):
    """Where the tokens of one forward pass stand."""

    ids: torch.Tensor
    """int64 [T]."""
    positions: torch.Tensor
    """int32 [T]."""
    slots: torch.Tensor
    """int64 [T]: page * S + offset."""
    pages: torch.Tensor
    """int32: the page tables of all rows, one after the other."""
    table: torch.Tensor
    """int64 [T]: where in `pages` the token's row begins."""
    lengths: torch.Tensor
    """int32 [T]: keys the token sees, its own included."""


class LayerCache(NamedTuple):
    keys: torch.Tensor
    """[P, K, D, S]: dimensions before positions, so that one load takes a page's keys of one dimension."""
    values: torch.Tensor
    """[P, K, S, D]."""


class Kernels(Protocol):
    """Sums are taken in fp32; results have the input's dtype."""

    name: str

    def add_norm(
        self, x_TW: torch.Tensor, delta_TW: torch.Tensor | None, weight_W: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """x += delta in place, then RMS norm of x times weight."""

    def rope_store(
        self, qkv_TX: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], batch: Batch, cache: LayerCache, heads: int
    ) -> torch.Tensor:
        """Rotate q and k, store k and v at the tokens' slots, return q [T, H, D].

        `rope`: cos and sin, fp32 [positions, D/2].
        """

    def attention(self, q_THD: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
        """Causal attention of each token over its own row's pages: [T, H * D]."""
