"""Decode passes as CUDA graphs: one launch for all layers' kernels, so that a small batch waits for no Python.

A graph replays fixed launches on fixed addresses. There is one for each of a ladder of batch sizes, all on the same input
buffers; a pass is copied in and filled up to the next size with rows of length 0, which read nothing and write to the
scratch page. Page tables are copied whole lines at a time, lengths are read on the device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch

from lightning_rl.errors import ModelError
from rollout_server.kernels.interface import Batch, LayerCache
from rollout_server.models.decoder import Decoder

_SMALL = (1, 2, 4)
_STEP = 8
"""Beyond the small ones, sizes are multiples of this: at most 7 rows are computed for nothing."""


def ladder(max_batch: int) -> list[int]:
    """Batch sizes to capture, ascending: 1, 2, 4, 8, 16, 24, … and `max_batch` itself."""
    sizes = {*_SMALL, *range(_STEP, max_batch, _STEP), max_batch}
    return sorted(size for size in sizes if size <= max_batch)


class DecodeInputs:
    """The buffers that graphs read: a batch of padding, until a pass is copied in."""

    def __init__(
        self, max_batch: int, table_width: int, page_size: int, scratch_page: int, device: torch.device
    ) -> None:
        self._page, self._scratch_cell = page_size, scratch_page * page_size
        with torch.inference_mode():
            steps = torch.arange(max_batch + 1, dtype=torch.int32, device=device)
            zeros = torch.zeros(max_batch, dtype=torch.int32, device=device)
            self._batch = Batch(
                ids=zeros.long(),
                positions=zeros.clone(),
                cells=torch.full((max_batch,), self._scratch_cell, dtype=torch.int64, device=device),
                offsets=steps,
                tables=torch.zeros(max_batch, table_width, dtype=torch.int32, device=device),
                lines=steps[:max_batch].clone(),
                lengths=zeros.clone(),
                longest=table_width * page_size,
                most=1,
            )

    @property
    def longest(self) -> int:
        return self._batch.longest

    def first(self, size: int) -> Batch:
        """The first rows as a batch, on the buffers' own memory."""
        whole = self._batch
        return whole._replace(
            ids=whole.ids[:size],
            positions=whole.positions[:size],
            cells=whole.cells[:size],
            offsets=whole.offsets[: size + 1],
            lines=whole.lines[:size],
            lengths=whole.lengths[:size],
        )

    @torch.inference_mode()
    def fill(self, batch: Batch, size: int) -> None:
        """Copy a batch of one token a row to the first rows; the rest up to `size` become padding."""
        rows, pages = batch.lines.shape[0], -(-batch.longest // self._page)
        into = self._batch
        into.ids[:rows].copy_(batch.ids)
        into.positions[:rows].copy_(batch.positions)
        into.cells[:rows].copy_(batch.cells)
        into.lengths[:rows].copy_(batch.lengths)
        into.tables[:rows, :pages].copy_(batch.tables[:, :pages].index_select(0, batch.lines))
        into.cells[rows:size].fill_(self._scratch_cell)
        into.lengths[rows:size].fill_(0)


class DecodeGraphs:
    """Captures on construction, largest batch first, so that the smaller graphs fit in its memory.

    Weights may change in place afterwards; once weights or cache have moved to other addresses, make a new one.

    `cache` is the Triton backend's, [P, K, S, D]; `table_width` pages are the longest row; what padding writes goes to
    `scratch_page`. Raises ModelError off CUDA.
    """

    def __init__(
        self, decoder: Decoder, cache: Sequence[LayerCache], max_batch: int, table_width: int, scratch_page: int
    ) -> None:
        device = cache[0].keys.device
        if device.type != "cuda":
            raise ModelError(f"CUDA graphs need a CUDA device; the cache is on {device}", hint="run passes directly")
        self._decoder, self._cache = decoder, cache
        self._inputs = DecodeInputs(max_batch, table_width, cache[0].keys.shape[2], scratch_page, device)
        # Experts are routed by counts that the host reads: a pass of such a model cannot be captured.
        self._sizes = ladder(max_batch) if decoder.config.moe is None else []
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._hidden: dict[int, torch.Tensor] = {}
        self._capture()

    def covers(self, batch: Batch) -> bool:
        """Whether `run` computes this batch: one token a row, no adapters, no shared runs, not too many rows."""
        rows = batch.lines.shape[0]
        return (
            batch.most == 1
            and bool(self._sizes)
            and 0 < rows == batch.ids.shape[0] <= self._sizes[-1]
            and batch.longest <= self._inputs.longest
            and not batch.adapters
            and not batch.runs
        )

    def run(self, batch: Batch) -> torch.Tensor:
        """Hidden states [T, W] of a batch that is covered: valid until the next run."""
        rows = batch.lines.shape[0]
        size = self._sizes[bisect_left(self._sizes, rows)]
        self._inputs.fill(batch, size)
        self._graphs[size].replay()
        return self._hidden[size][:rows]

    def forget(self) -> None:
        """Nothing to forget: passes with adapters are not captured."""

    @torch.inference_mode()
    def _capture(self) -> None:
        pool = None
        for size in reversed(self._sizes):
            batch = self._inputs.first(size)
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # compiles kernels and lets cuBLAS take its workspace
                self._decoder.hidden_states(batch, self._cache)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._hidden[size] = self._decoder.hidden_states(batch, self._cache)
            pool = graph.pool()
            self._graphs[size] = graph
