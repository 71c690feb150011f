"""Runs what the manager planned: moves pages, computes one flat batch, samples, and answers.

It knows slots and pages, not requests: which sequence owns which page, and what a slot's next row is, is the manager's
business. A pass is launched and collected apart, so that a GPU has its next pass before the results of the last are read.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from lightning_rl.errors import ModelError
from rollout_server import messages as m
from rollout_server.kernels.interface import Batch
from rollout_server.kernels.native import NativeKernels
from rollout_server.models.checksum import checksum
from rollout_server.models.decoder import Decoder
from rollout_server.models.weights import AdapterWeights
from rollout_server.weight_sources import open_source
from rollout_server.worker.batch import Flat, flatten
from rollout_server.worker.cpu_programs import DecodePrograms
from rollout_server.worker.kv_cache import KVCache
from rollout_server.worker.parked_weights import ParkedWeights, return_freed_memory
from rollout_server.worker.sampler import Alternatives, Sampled, sample
from rollout_server.worker.slots import Slots
from rollout_server.worker.transfer import to_device, to_host

SCORED_AT_ONCE = 128
"""Rows of logits that scoring holds: 78 MB of a vocabulary of 152,000."""


class Graphs(Protocol):
    """Recorded passes, see `cuda_graphs` and `cpu_programs`."""

    def covers(self, batch: Batch) -> bool: ...

    def run(self, batch: Batch) -> torch.Tensor:
        """Hidden states [T, W] of a batch that it covers."""

    def forget(self) -> None:
        """Adapters have changed."""


class Launched(NamedTuple):
    """A pass under way. Tensors are the host's and valid once `done` has happened."""

    step: int
    started: float
    sampled: Sampled | None
    scores: list[torch.Tensor]
    done: torch.cuda.Event | None
    """None: it is finished."""

    def ready(self) -> bool:
        return self.done is None or self.done.query()


class Runner:
    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        slots: Slots,
        page_size: int,
        *,
        shared_prefix: bool = True,
        park_dir: Path | None = None,
    ) -> None:
        self.decoder, self.cache, self.slots, self.page_size = decoder, cache, slots, page_size
        self._shared_prefix, self._park_dir = shared_prefix, park_dir
        self._device = cache.device
        self._parked: ParkedWeights | None = None
        self._graphs = self._record()

    # passes ------------------------------------------------------------------------------------------------------

    def execute(self, forward: m.Forward) -> m.Forwarded:
        return self.collect(self.launch(forward))

    @torch.inference_mode()
    def launch(self, forward: m.Forward) -> Launched:
        """Start a pass, in the order that `Forward` states. On a CPU it is finished on return."""
        started = time.perf_counter()
        self.cache.offload(forward.offloads)
        self.cache.restore(forward.restores)
        self.cache.copy(forward.copies)
        self.slots.open(forward.opens)
        self.slots.extend(forward.rows)
        sampled, scores = None, []
        if forward.rows:
            flat = flatten(
                forward.rows,
                self.slots,
                self.page_size,
                policy_adapter=self.decoder.has_adapter(""),
                shared=self._shared_prefix,
            )
            hidden = self._hidden_states(flat.batch)
            sampled = self._sample(forward.rows, flat, hidden)
            scores = self._score(forward.rows, flat, hidden)
        done = None
        if self._device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return Launched(forward.step, started, sampled, scores, done)

    def collect(self, launched: Launched) -> m.Forwarded:
        """Wait for a pass and read its results."""
        if launched.done is not None:
            launched.done.synchronize()
        sampled = launched.sampled
        return m.Forwarded(
            step=launched.step,
            ids=[] if sampled is None else sampled.ids.tolist(),
            logprobs=[] if sampled is None else sampled.logprobs.tolist(),
            entropies=[] if sampled is None else sampled.entropies.tolist(),
            top_logprobs=[]
            if sampled is None or sampled.alternatives is None
            else _top_logprobs(sampled.alternatives, len(sampled.ids)),
            scores=[scores.tolist() for scores in launched.scores],
            seconds=time.perf_counter() - launched.started,
        )

    def _hidden_states(self, batch: Batch) -> torch.Tensor:
        if self._graphs is not None and self._graphs.covers(batch):
            return self._graphs.run(batch)
        return self.decoder.hidden_states(batch, self.cache.layers)

    def _sample(self, rows: Sequence[m.Row], flat: Flat, hidden: torch.Tensor) -> Sampled | None:
        """Every draw of every row, in order; slots remember the ids."""
        draws = list(chain.from_iterable(row.draws for row in rows))
        if not draws:
            return None
        counts = np.fromiter((len(row.draws) for row in rows), np.int64, len(rows))
        drawing = np.flatnonzero(counts)
        slots = np.fromiter((draw.slot for draw in draws), np.int64, len(draws))
        last, repeated, slots_B = to_device(
            [flat.ends[drawing] - 1, np.repeat(np.arange(drawing.size), counts[drawing]), slots], self._device
        )
        logits = self.decoder.logits(hidden[last])
        if len(draws) > drawing.size:
            logits = logits[repeated]
        known = self.slots.biases
        biases = {row: known[draw.slot] for row, draw in enumerate(draws) if draw.slot in known} if known else {}
        sampled = sample(logits, self.slots.settings[slots], draws, biases, self.decoder.kernels)
        self.slots.last_ids.index_copy_(0, slots_B, sampled.ids)
        alternatives = sampled.alternatives
        if alternatives is not None:
            alternatives = alternatives._replace(ids=to_host(alternatives.ids), logprobs=to_host(alternatives.logprobs))
        return Sampled(to_host(sampled.ids), to_host(sampled.logprobs), to_host(sampled.entropies), alternatives)

    def _score(self, rows: Sequence[m.Row], flat: Flat, hidden: torch.Tensor) -> list[torch.Tensor]:
        """For each row with targets, their log-probs at temperature 1."""
        scored = [i for i, row in enumerate(rows) if row.targets]
        if not scored:
            return []
        firsts = [int(flat.ends[i]) - len(rows[i].ids) for i in scored]
        sizes = [len(rows[i].targets) for i in scored]
        places = np.concatenate([np.arange(first, first + size) for first, size in zip(firsts, sizes, strict=True)])
        targets = np.fromiter(chain.from_iterable(rows[i].targets for i in scored), np.int64, places.size)
        places_N, targets_N = to_device([places, targets], self._device)
        logprobs = [
            torch.log_softmax(self.decoder.logits(hidden[some]).float(), -1).gather(1, ids[:, None])[:, 0]
            for some, ids in zip(places_N.split(SCORED_AT_ONCE), targets_N.split(SCORED_AT_ONCE), strict=True)
        ]
        return list(to_host(torch.cat(logprobs)).split(sizes))

    # weights and memory ------------------------------------------------------------------------------------------

    def load(self, load: m.Load) -> m.Loaded:
        """Replace or add weights in place. What is rejected changes nothing and is answered with why."""
        error = None
        try:
            self._load(load)
        except ModelError as failure:
            error = str(failure)
        known = not load.adapter or self.decoder.has_adapter(load.adapter)
        live = checksum(self.decoder.export(load.adapter)) if known else ""
        return m.Loaded(version=load.version, checksum=live, error=error)

    def _load(self, load: m.Load) -> None:
        loaded, adapter = self._open(load.source)
        for name, tensor in loaded.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"{name} has values that are not finite", hint="the publisher's training has diverged")
        if adapter is not None:
            self._set_adapter(load.adapter, adapter)
            return
        if load.adapter:
            raise ModelError(
                f"base weights cannot be the adapter {load.adapter!r}", hint="publish a LoRA adapter under that name"
            )
        self.decoder.replace(loaded)
        self._set_adapter("", None)

    def _open(self, source: m.WeightSource) -> tuple[dict[str, torch.Tensor], AdapterWeights | None]:
        """What a source holds. Whatever is wrong with it is a ModelError: the worker serves on with what it has."""
        try:
            loaded = open_source(source, self._device)
            if loaded.adapter_config is None:
                return loaded.tensors, None
            return loaded.tensors, AdapterWeights(loaded.adapter_config, loaded.tensors, self.decoder.dtype)
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
            raise ModelError(f"the weights cannot be read: {type(error).__name__}: {error}") from error

    def _set_adapter(self, name: str, weights: AdapterWeights | None) -> None:
        self.decoder.set_adapter(name, weights)
        if self._graphs is not None:
            self._graphs.forget()

    def unload(self, unload: m.Unload) -> m.Acknowledged:
        if not self.decoder.has_adapter(unload.adapter):
            return m.Acknowledged(error=f"no adapter {unload.adapter!r} is loaded")
        self._set_adapter(unload.adapter, None)
        return m.Acknowledged()

    def release(self, release: m.Release) -> m.Acknowledged:
        """Free the device's pages, and the weights' memory if asked. The host tier of pages stays. Answers with an error, and
        everything as it was, when there is no room for the weights elsewhere."""
        if release.weights and self._parked is None:
            try:
                self._parked = ParkedWeights(self.decoder, self._device, self._park_dir)
            except (OSError, RuntimeError) as error:
                return m.Acknowledged(error=f"no room to put the weights: {error}")
        if self._graphs is not None:
            self._graphs.forget()
        self._graphs = None
        self.cache.release()
        return_freed_memory(self._device)
        return m.Acknowledged()

    def reclaim(self) -> m.Acknowledged:
        """Take the memory again: zeroed pages, and the weights as they were. Answers with an error, still released, when
        the device has no room for the pages."""
        try:
            self.cache.reclaim()
        except RuntimeError as error:  # torch's allocators raise it, on a GPU the subclass OutOfMemoryError
            self.cache.release()
            return_freed_memory(self._device)
            return m.Acknowledged(error=f"no room for keys and values: {error}")
        if self._parked is not None:
            self._parked.restore()
            self._parked = None
        self._graphs = self._record()
        return m.Acknowledged()

    def _record(self) -> Graphs | None:
        """What replays passes that only decode: CUDA graphs, or recorded C operations; None for plain torch."""
        if isinstance(self.decoder.kernels, NativeKernels):
            return DecodePrograms(self.decoder, self.cache.layers, self.decoder.kernels)
        if self._device.type != "cuda":
            return None
        from rollout_server.worker.cuda_graphs import DecodeGraphs

        return DecodeGraphs(
            self.decoder, self.cache.layers, self.slots.scratch_line, self.slots.tables.shape[1], self.cache.scratch
        )


def _top_logprobs(alternatives: Alternatives, draws: int) -> list[list[tuple[int, float]]]:
    """One list a draw, empty for those who did not ask; ids of no probability are left out."""
    found: list[list[tuple[int, float]]] = [[] for _ in range(draws)]
    for draw, count, ids, logprobs in zip(
        alternatives.draws, alternatives.counts, alternatives.ids.tolist(), alternatives.logprobs.tolist(), strict=True
    ):
        found[draw] = [
            (token, value) for token, value in zip(ids[:count], logprobs[:count], strict=True) if value > -torch.inf
        ]
    return found
