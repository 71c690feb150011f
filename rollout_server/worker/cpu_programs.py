"""Small decode passes on a CPU as recorded operations: one call for all layers, where Python would take a tenth of the time.

What CUDA graphs are to a GPU (`cuda_graphs`). The first pass of a kind is recorded while it is computed; later ones copy
their rows into the same inputs and run the tape.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from rollout_server.kernels.interface import AdapterSpan, Batch, LayerCache
from rollout_server.kernels.native import NativeKernels, Tape
from rollout_server.models.decoder import Decoder

MAX_ROWS = 64
"""Beyond this many rows arithmetic takes so long that Python in between does not show."""
KEPT = 24
"""Programs kept, least recently used out first: up to 7 MB each for a model of width 576."""


class Program(NamedTuple):
    inputs: Batch
    embedded: torch.Tensor
    tape: Tape
    hidden: torch.Tensor


class DecodePrograms:
    """`cache` and the tensors of page tables and weights must stay where they are; adapters may change if `forget` is told."""

    def __init__(self, decoder: Decoder, cache: Sequence[LayerCache], kernels: NativeKernels) -> None:
        self._decoder, self._cache, self._kernels = decoder, cache, kernels
        # Experts and Qwen3's head norms are partly computed by torch, which no tape sees.
        self._recordable = decoder.config.moe is None and not decoder.config.head_norm
        self._programs: OrderedDict[tuple[int, int, tuple[AdapterSpan, ...]], Program] = OrderedDict()

    def covers(self, batch: Batch) -> bool:
        """One token a row, no shared runs, not too many rows."""
        rows = batch.lines.shape[0]
        return self._recordable and batch.most == 1 and rows == batch.ids.shape[0] <= MAX_ROWS and not batch.runs

    def run(self, batch: Batch) -> torch.Tensor:
        """Hidden states [T, W] of a batch that is covered: valid until the next run."""
        key = (batch.lines.shape[0], batch.tables.data_ptr(), tuple(batch.adapters))
        program = self._programs.get(key)
        if program is None:
            return self._record(key, batch)
        self._programs.move_to_end(key)
        inputs = program.inputs
        inputs.positions.copy_(batch.positions)
        inputs.cells.copy_(batch.cells)
        inputs.lines.copy_(batch.lines)
        torch.index_select(self._decoder.embedding.value, 0, batch.ids, out=program.embedded)
        program.tape.replay()
        return program.hidden

    def forget(self) -> None:
        """Adapters were loaded, replaced or removed: their tensors are elsewhere now."""
        self._programs.clear()
        self._kernels.forget()

    def _record(self, key: tuple[int, int, tuple[AdapterSpan, ...]], batch: Batch) -> torch.Tensor:
        inputs = batch._replace(
            positions=batch.positions.clone(),
            cells=batch.cells.clone(),
            offsets=batch.offsets.clone(),
            lines=batch.lines.clone(),
        )
        embedded = self._decoder.embedding.value[batch.ids]
        with self._kernels.record() as tape:
            hidden = self._decoder.layers_over(embedded, inputs, self._cache)
        if tape.whole:
            self._programs[key] = Program(inputs, embedded, tape, hidden)
            if len(self._programs) > KEPT:
                self._programs.popitem(last=False)
        return hidden
