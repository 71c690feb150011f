"""What a backend computes for the decoder.

Three implementations: `reference` (plain torch, any device, the oracle), `native` (C, CPU) and `triton` (CUDA). Token
batches are flat: T tokens of R rows, each row a sequence's share of the pass, each token with its position and the
cell of the paged cache where its key and value live.

Shapes: T tokens, R rows, H query heads, K key/value heads, D head dim, P pages of S positions, W hidden width,
N outputs and X inputs of a linear map, I intermediate width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from rollout_server.models.config import ModelConfig


class SharedRun(NamedTuple):
    """Pages `first` … `last`-1 of the page tables of `rows` are the same pages: their queries meet them together.

    Runs of a row do not overlap and cover its first pages without a gap; every position in them is visible to every
    token of those rows. A run's rows are a subset of those of the run before it (a tree, after DeFT, Yao et al. 2024).
    """

    rows: list[int]
    first: int
    last: int


class AdapterSpan(NamedTuple):
    """Tokens `start` … `end`-1 use the adapter `name`. Tokens in no span use none."""

    start: int
    end: int
    name: str


class Batch(NamedTuple):
    """Where the tokens of one forward pass stand. Tensors are on the cache's device."""

    ids: torch.Tensor
    """int64 [T]."""
    positions: torch.Tensor
    """int32 [T]: consecutive within a row."""
    cells: torch.Tensor
    """int64 [T]: page * S + offset, where the token's key and value go."""
    offsets: torch.Tensor
    """int32 [R + 1]: row r has the tokens offsets[r] … offsets[r+1]-1."""
    tables: torch.Tensor
    """int32 [lines, max pages]: page tables; what stands beyond a row's length is meaningless."""
    lines: torch.Tensor
    """int32 [R]: which line of `tables` is the row's."""
    lengths: torch.Tensor
    """int32 [R]: keys the row's last token sees, its own included. Token t of row r sees positions[t] + 1."""
    longest: int
    """Upper bound of `lengths`, on the host."""
    most: int
    """Tokens of the row that has most, on the host: 1 in a pass that only decodes."""
    runs: Sequence[SharedRun] = ()
    adapters: Sequence[AdapterSpan] = ()


class LayerCache(NamedTuple):
    """Keys and values of one layer. Dimension 0 is the page; the rest is the backend's own layout."""

    keys: torch.Tensor
    values: torch.Tensor


class Lora(NamedTuple):
    """y += (x down^T · scale) up^T. `down` [rank, X] and `up` [N, rank] as `Kernels.pack` left them."""

    down: Any
    up: Any
    scale: float


class Kernels(Protocol):
    """Sums are taken in fp32; results have the input's dtype."""

    name: str
    invariant: bool
    """A row of `linear` or `add_lora` has the same bits whatever the other rows are. Where False, batch-invariant mode computes
    products in blocks of fixed size."""

    def allocate(
        self, config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> list[LayerCache]:
        """One zeroed cache a layer."""

    def pack(self, weight_NX: torch.Tensor) -> Any:
        """A weight in the layout that `linear` wants. A copy, unless the layout is torch's own."""

    def unpack(self, packed: Any) -> torch.Tensor:
        """The weight [N, X] again, bit for bit."""

    def linear(self, x_TX: torch.Tensor, packed: Any, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b: [T, N]."""

    def add_lora(self, y_TN: torch.Tensor, x_TX: torch.Tensor, spans: Sequence[tuple[int, int, Lora]]) -> None:
        """y[start:end] += adapter's share, in place, for each (start, end, adapter). The low-rank product is rounded to
        the input's dtype between the two maps, as PEFT's is."""

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2 I] -> silu(first half) * second half: [T, I], silu rounded to the dtype before the product."""

    def add_norm(
        self, x_TW: torch.Tensor, delta_TW: torch.Tensor | None, weight_W: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """x += delta in place, then RMS norm of x times weight."""

    def rope_store(
        self, qkv_TX: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], batch: Batch, cache: LayerCache, heads: int
    ) -> torch.Tensor:
        """Rotate q and k, store k and v at the tokens' cells, return q [T, H, D].

        `rope`: cos and sin, fp32 [positions, D/2].
        """

    def attention(self, q_THD: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
        """Causal attention of each token over its own row's pages: [T, H * D]."""

    def log_softmax_sample(
        self, logits_BV: torch.Tensor, temperatures_B: torch.Tensor, uniforms_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unfiltered sampling: ids int64 [B] by inverse CDF of softmax(logits / temperature) at `uniforms` (fp64, in
        (0, 1)), their log-probs fp32 [B], and the entropies of those distributions, in nats, fp32 [B]. Rows of temperature 0
        take the first of the likeliest ids, with log-prob and entropy at temperature 1."""
