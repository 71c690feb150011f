"""The decoder's operations in C (`cpu/kernels.c`), called through ctypes on torch's own memory.

Results of a token depend on nothing but its own row, bit for bit: neither batch size nor chunked prefill, prefix hits
or shared-prefix attention change them. `load()` returns None where the extension was not built.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache as once
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch  # first: the extension resolves its OpenMP symbols against the runtime that torch brings

from rollout_server.kernels.interface import Batch, LayerCache, Lora, SharedRun
from rollout_server.models.config import ModelConfig

PAGE_SIZE = 16
"""Fixed by the memory layout."""
_UNIT = 16
_TILE_QUERIES = 6
_MAX_RANK = 512
_LORA_ROWS = 32
_SPANS_KEPT = 1024


class Packed(NamedTuple):
    """A weight [outputs, inputs] as [units of 16 outputs, lanes, 16], a lane being 32 bits: one fp32 or two bf16."""

    data: torch.Tensor
    outputs: int
    inputs: int

    @property
    def lanes(self) -> int:
        return self.data.shape[1]


class _AttentionPlan(NamedTuple):
    """What is the same for all layers of a pass."""

    bite: int
    """Tokens of one task, all of one row."""
    bite_rows: npt.NDArray[np.int32]
    bite_tokens: npt.NDArray[np.int64]
    """First token of each task."""
    shared: npt.NDArray[np.int32] | None
    """[R]: leading pages that runs cover."""
    runs: npt.NDArray[np.int32]
    """[runs, 4]: rows, first page, last page, where its rows begin in `run_rows`."""
    run_rows: npt.NDArray[np.int32]
    level_runs: npt.NDArray[np.int32]
    """Runs of level i are level_runs[i] … level_runs[i+1]-1."""
    states: torch.Tensor | None


class _LoraWork(NamedTuple):
    """Spans as the kernel wants them, cut so that threads share a long one. Most passes have the spans of the last."""

    spans: Sequence[tuple[int, int, Lora]]
    bounds: npt.NDArray[np.int64]
    """[count, 3]: start, end, rank."""
    pairs: npt.NDArray[np.uint64]
    """[count, 2]: addresses of the packed maps."""
    scales: npt.NDArray[np.float32]
    wide: list[tuple[int, int, Lora]]
    """Of a rank beyond the kernel's buffers."""


class NativeKernels:
    name = "native"
    invariant = True

    def __init__(self, library: ctypes.CDLL) -> None:
        def function(symbol: str, *arguments: object) -> ctypes._NamedFuncPointer:
            found = getattr(library, symbol)
            found.argtypes, found.restype = arguments, None
            return found

        p, n, i = c_void_p, c_int64, c_int
        self._linear = function("lrl_linear", p, p, p, p, n, n, n, i)
        self._add_lora = function("lrl_add_lora", p, p, p, p, p, n, n, n, i)
        self._add_norm = function("lrl_add_norm", p, p, p, p, n, i, c_float, i)
        self._silu_mul = function("lrl_silu_mul", p, p, n, i, i)
        self._rope_store = function("lrl_rope_store", p, p, p, p, p, p, p, p, n, i, i, i, i)
        self._attention = function(
            "lrl_attention", p, p, p, p, p, p, p, p, p, p, p, p, n, n, n, n, i, i, i, c_float, p, p, n, p, i
        )
        self._sample = function("lrl_sample", p, p, p, p, p, p, n, n, i)
        self._spans: dict[int, _LoraWork] = {}
        self._planned: tuple[Batch, _AttentionPlan] | None = None

    def allocate(
        self, config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> list[LayerCache]:
        """Keys [P, K, lanes of D, 16], values [P, K, lanes of 16, D]; a bf16 lane holds neighbours along its dimension."""
        if page_size != PAGE_SIZE or device.type != "cpu":
            raise ValueError(f"native kernels want pages of {PAGE_SIZE} on the CPU, not {page_size} on {device}")
        shape = (pages, config.kv_heads, config.head_dim * page_size)
        return [
            LayerCache(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(config.layers)
        ]

    def pack(self, weight_NX: torch.Tensor) -> Packed:
        outputs, inputs = weight_NX.shape
        pair = 2 if weight_NX.dtype is torch.bfloat16 else 1
        padded = torch.nn.functional.pad(weight_NX, (0, -inputs % pair, 0, -outputs % _UNIT))
        data = padded.view(padded.shape[0] // _UNIT, _UNIT, padded.shape[1] // pair, pair).transpose(1, 2).contiguous()
        return Packed(data, outputs, inputs)

    def unpack(self, packed: Packed) -> torch.Tensor:
        units, lanes, _, pair = packed.data.shape
        padded = packed.data.transpose(1, 2).reshape(units * _UNIT, lanes * pair)
        return padded[: packed.outputs, : packed.inputs].contiguous()

    def linear(self, x_TX: torch.Tensor, packed: Packed, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        rows, inputs = x_TX.shape
        bf16 = _is_bf16(x_TX)
        if inputs != packed.inputs or inputs % (1 + bf16) or packed.data.dtype is not x_TX.dtype:
            raise ValueError(f"input [{rows}, {inputs}] {x_TX.dtype} for weight [{packed.outputs}, {packed.inputs}]")
        y = x_TX.new_empty(rows, packed.outputs)
        bias = None if bias_N is None else bias_N.data_ptr()
        self._linear(
            x_TX.data_ptr(),
            packed.data.data_ptr(),
            bias,
            y.data_ptr(),
            rows,
            packed.data.shape[1],
            packed.outputs,
            bf16,
        )
        return y

    def add_lora(self, y_TN: torch.Tensor, x_TX: torch.Tensor, spans: Sequence[tuple[int, int, Lora]]) -> None:
        bf16 = _is_bf16(x_TX)
        _is_bf16(y_TN)
        work = self._spans.get(id(spans))
        if work is None or work.spans is not spans:
            if len(self._spans) >= _SPANS_KEPT:
                self._spans.clear()
            work = self._spans[id(spans)] = _lora_work(spans, bf16)
        for start, end, lora in work.wide:
            y_TN[start:end] += self.linear(self.linear(x_TX[start:end], lora.down) * lora.scale, lora.up)
        if work.scales.size:
            self._add_lora(
                y_TN.data_ptr(), x_TX.data_ptr(), work.bounds.ctypes.data, work.pairs.ctypes.data,
                work.scales.ctypes.data, work.scales.size, x_TX.shape[1], y_TN.shape[1], bf16,
            )  # fmt: skip

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(tokens, width)
        self._silu_mul(gate_up.data_ptr(), out.data_ptr(), tokens, width, _is_bf16(gate_up))
        return out

    def add_norm(
        self, x_TW: torch.Tensor, delta_TW: torch.Tensor | None, weight_W: torch.Tensor, eps: float
    ) -> torch.Tensor:
        out = torch.empty_like(x_TW)
        tokens, width = x_TW.shape
        delta = None if delta_TW is None else delta_TW.data_ptr()
        self._add_norm(x_TW.data_ptr(), delta, weight_W.data_ptr(), out.data_ptr(), tokens, width, eps, _is_bf16(x_TW))
        return out

    def rope_store(
        self, qkv_TX: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], batch: Batch, cache: LayerCache, heads: int
    ) -> torch.Tensor:
        tokens, width = qkv_TX.shape
        kv_heads = cache.keys.shape[1]
        dim = width // (heads + 2 * kv_heads)
        q = qkv_TX.new_empty(tokens, heads, dim)
        cos, sin = rope
        self._rope_store(
            qkv_TX.data_ptr(), q.data_ptr(), cache.keys.data_ptr(), cache.values.data_ptr(), cos.data_ptr(),
            sin.data_ptr(), batch.positions.data_ptr(), batch.cells.data_ptr(), tokens, heads, kv_heads, dim,
            _is_bf16(qkv_TX),
        )  # fmt: skip
        return q

    def attention(self, q_THD: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
        tokens, heads, dim = q_THD.shape
        kv_heads = cache.keys.shape[1]
        if self._planned is None or self._planned[0] is not batch:
            self._planned = (batch, _plan(batch, heads, kv_heads, dim))
        plan = self._planned[1]
        out = torch.empty_like(q_THD)
        self._attention(
            q_THD.data_ptr(), cache.keys.data_ptr(), cache.values.data_ptr(), out.data_ptr(),
            None if plan.states is None else plan.states.data_ptr(), batch.positions.data_ptr(),
            batch.offsets.data_ptr(), batch.tables.data_ptr(), batch.lines.data_ptr(),
            None if plan.shared is None else plan.shared.ctypes.data, plan.bite_rows.ctypes.data,
            plan.bite_tokens.ctypes.data, batch.lines.shape[0], plan.bite, len(plan.bite_rows), batch.tables.shape[1],
            heads, kv_heads, dim, dim**-0.5, plan.runs.ctypes.data, plan.run_rows.ctypes.data,
            len(plan.level_runs) - 1, plan.level_runs.ctypes.data, _is_bf16(q_THD),
        )  # fmt: skip
        return out.view(tokens, heads * dim)

    def log_softmax_sample(
        self, logits_BV: torch.Tensor, temperatures_B: torch.Tensor, uniforms_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, vocab = logits_BV.shape
        ids = torch.empty(rows, dtype=torch.int64)
        logprobs = torch.empty(rows)
        spans = np.empty(rows * -(-vocab // 256), np.float64)
        self._sample(
            logits_BV.data_ptr(), temperatures_B.float().data_ptr(), uniforms_B.double().data_ptr(), spans.ctypes.data,
            ids.data_ptr(), logprobs.data_ptr(), rows, vocab, _is_bf16(logits_BV),
        )  # fmt: skip
        return ids, logprobs


def _lora_work(spans: Sequence[tuple[int, int, Lora]], bf16: int) -> _LoraWork:
    bounds, pairs, scales, wide = [], [], [], []
    for start, end, lora in spans:
        rank = lora.down.outputs + (lora.down.outputs % 2 if bf16 else 0)
        if rank > _MAX_RANK:
            wide.append((start, end, lora))
            continue
        for first in range(start, end, _LORA_ROWS):
            bounds += [first, min(first + _LORA_ROWS, end), rank]
            pairs += [lora.down.data.data_ptr(), lora.up.data.data_ptr()]
            scales.append(lora.scale)
    return _LoraWork(spans, np.array(bounds, np.int64), np.array(pairs, np.uint64), np.array(scales, np.float32), wide)


def _plan(batch: Batch, heads: int, kv_heads: int, dim: int) -> _AttentionPlan:
    bite = max(1, _TILE_QUERIES // (heads // kv_heads))
    offsets = batch.offsets.numpy()
    counts = np.diff(offsets)
    bites = -(-counts // bite)
    bite_rows = np.repeat(np.arange(len(counts), dtype=np.int32), bites)
    within = np.arange(len(bite_rows)) - np.repeat(np.cumsum(bites) - bites, bites)
    bite_tokens = (offsets[bite_rows] + within * bite).astype(np.int64)
    levels = _levels(batch.runs, len(counts))
    if not batch.runs:
        empty = np.zeros(0, np.int32)
        return _AttentionPlan(bite, bite_rows, bite_tokens, None, empty, empty, np.zeros(1, np.int32), None)
    shared = np.zeros(len(counts), np.int32)
    runs: list[tuple[int, int, int, int]] = []
    run_rows: list[int] = []
    for run in (run for level in levels for run in level):
        runs.append((len(run.rows), run.first, run.last, len(run_rows)))
        run_rows += run.rows
        shared[run.rows] = np.maximum(shared[run.rows], run.last)
    states = torch.empty(int(offsets[-1]), heads, 32 + dim)
    bounds = np.cumsum([0, *(len(level) for level in levels)]).astype(np.int32)
    return _AttentionPlan(
        bite, bite_rows, bite_tokens, shared, np.array(runs, np.int32), np.array(run_rows, np.int32), bounds, states
    )


def _levels(runs: Sequence[SharedRun], rows: int) -> list[list[SharedRun]]:
    """Runs by depth: those of one level share no row."""
    depth = [0] * rows
    levels: list[list[SharedRun]] = []
    for run in sorted(runs, key=lambda run: run.first):
        level = depth[run.rows[0]]
        if level == len(levels):
            levels.append([])
        levels[level].append(run)
        for row in run.rows:
            depth[row] = level + 1
    return levels


def supports(heads: int, kv_heads: int, dim: int) -> bool:
    """Shapes within the kernel's fixed buffers."""
    return dim % 16 == 0 and dim <= 256


@once
def load() -> NativeKernels | None:
    """The compiled kernels, or None when the extension was not built."""
    spec = importlib.util.find_spec("rollout_server.kernels.cpu._kernels")
    return NativeKernels(ctypes.CDLL(spec.origin)) if spec is not None and spec.origin else None


def _is_bf16(tensor: torch.Tensor) -> int:
    if tensor.dtype not in (torch.bfloat16, torch.float32) or not tensor.is_contiguous():
        raise TypeError(f"native kernels take contiguous float32 or bfloat16, not {tensor.dtype}")
    return int(tensor.dtype is torch.bfloat16)
