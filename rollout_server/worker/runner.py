"""Runs one forward pass over the rows that the manager planned, and samples.

Stateless but for weights and KV pages: which sequence owns which page is the manager's business.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from lightning_rl.errors import ModelError
from rollout_server.kernels.interface import Batch, LayerCache
from rollout_server.messages import Row
from rollout_server.models.decoder import ROW_BLOCK, Decoder
from rollout_server.models.weights import AdapterWeights, read_tensors
from rollout_server.worker.sampler import distribution, sample


class Results:
    """What one pass produced, in row order; a row that sampled nothing has id -1."""

    def __init__(self, rows: int) -> None:
        self.ids = [-1] * rows
        self.logprobs = [0.0] * rows
        self.top_logprobs: list[list[tuple[int, float]]] = [[] for _ in range(rows)]
        self.scores: list[list[float]] = [[] for _ in range(rows)]


class Runner:
    def __init__(self, decoder: Decoder, cache: list[LayerCache], page_size: int) -> None:
        self.decoder, self.cache, self.page_size = decoder, cache, page_size
        self._scratch_slot = (cache[0].values.shape[0] - 1) * page_size

    @torch.inference_mode()
    def forward(self, rows: list[Row]) -> Results:
        hidden = self.decoder.hidden_states(self._batch(rows), self.cache)
        results = Results(len(rows))
        ends = list(itertools.accumulate(len(row.ids) for row in rows))
        sampling = [(i, row.sampling) for i, row in enumerate(rows) if row.sampling is not None]
        if sampling:
            which, params = [i for i, _ in sampling], [p for _, p in sampling]
            logits = self.decoder.logits(hidden[[ends[i] - 1 for i in which]])
            logprobs = distribution(logits, params)
            ids, chosen = sample(logprobs, params, [rows[i].draw for i in which])
            for i, token, logprob in zip(which, ids.tolist(), chosen.tolist(), strict=True):
                results.ids[i], results.logprobs[i] = token, logprob
            for at, (i, p) in enumerate(sampling):
                if p.top_logprobs:
                    values, best = logprobs[at].topk(p.top_logprobs)
                    results.top_logprobs[i] = list(zip(best.tolist(), values.tolist(), strict=True))
        for i, row in enumerate(rows):
            if row.targets:
                first = ends[i] - len(row.ids)
                logits = self.decoder.logits(hidden[first : first + len(row.targets)])
                chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(row.targets)[:, None])
                results.scores[i] = chosen[:, 0].tolist()
        return results

    def _batch(self, rows: list[Row]) -> Batch:
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        pages: list[int] = []
        table: list[int] = []
        size = self.page_size
        for row in rows:
            ids += row.ids
            here = range(row.start, row.start + len(row.ids))
            positions += here
            slots += [row.pages[p // size] * size + p % size for p in here]
            table += [len(pages)] * len(row.ids)
            pages += row.pages
        if self.decoder.batch_invariant and len(ids) % ROW_BLOCK:
            padding = -len(ids) % ROW_BLOCK
            ids += [0] * padding
            positions += [0] * padding
            slots += [self._scratch_slot] * padding
            table += [len(pages)] * padding
            pages.append(self._scratch_slot // size)
        at = torch.tensor(positions, dtype=torch.int32)
        return Batch(
            ids=torch.tensor(ids),
            positions=at,
            slots=torch.tensor(slots),
            pages=torch.tensor(pages, dtype=torch.int32),
            table=torch.tensor(table),
            lengths=at + 1,
        )

    @torch.inference_mode()
    def load(self, path: Path) -> None:
        """Replace adapter or weights in place. Raises ModelError, with the old policy still whole."""
        if (path / "adapter_config.json").is_file():
            self.decoder.set_adapter(AdapterWeights(path, self.decoder.dtype))
            return
        fresh = Decoder(
            self.decoder.config,
            read_tensors(path),
            self.decoder.dtype,
            self.decoder.kernels,
            batch_invariant=self.decoder.batch_invariant,
        )
        live, new = self.decoder.export_full(), fresh.export_full()
        if live.keys() != new.keys():
            raise ModelError(f"{path}: tensors differ from the served model's")
        self.decoder.set_adapter(None)
        for name, tensor in live.items():
            tensor.copy_(new[name])
