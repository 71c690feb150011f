"""The decoder's operations in C (`cpu/kernels.c`), called through ctypes on torch's own memory.

Results of a token depend on nothing but its own row, bit for bit: neither batch size nor chunked prefill, prefix hits
or shared-prefix attention change them. `load()` returns None where the extension was not built.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_double, c_int, c_int64, c_void_p
from functools import cache as once
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch  # first: the extension resolves its OpenMP symbols against the runtime that torch brings

from lightning_rl.errors import ServerError
from rollout_server.kernels.interface import Batch, LayerCache, Lora, SharedRun
from rollout_server.models.config import ModelConfig

PAGE_SIZE = 16
"""Fixed by the memory layout."""
_UNIT = 16
_BITE_QUERIES = 24
_MAX_RANK = 512
_LORA_ROWS = 32
_SERIAL_WORK = 16384
"""Numbers up to which one thread is faster than waking the others."""
_SPANS_KEPT = 1024


class Packed(NamedTuple):
    """A weight [outputs, inputs] as [units of 16 outputs, lanes, 16], a lane being 32 bits: one fp32 or two bf16."""

    data: torch.Tensor
    outputs: int
    inputs: int


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


LINEAR, ADD_LORA, ADD_NORM, SILU_MUL, ROPE_STORE, ATTENTION = range(6)


class Operation(ctypes.Structure):
    """As `operation` in kernels.c."""

    _fields_: ClassVar = [
        ("kind", c_int64),
        ("bf16", c_int64),
        ("p", c_void_p * 16),
        ("n", c_int64 * 8),
        ("f", c_double),
    ]


class Tape:
    """Recorded operations, to be run again on the same memory: a whole pass in one call.

    Results live in few buffers of each shape, taken in turn: whoever records must be done with a result before `TURNS` more
    of its shape are made.
    """

    TURNS = 8

    def __init__(self, run: Callable[[int, int, int], None]) -> None:
        self._run, self._operations, self._held = run, list[Operation](), list[object]()
        self._buffers: dict[tuple[tuple[int, ...], torch.dtype], list[torch.Tensor]] = {}
        self._made: dict[tuple[tuple[int, ...], torch.dtype], int] = {}
        self._array: ctypes.Array[Operation] | None = None
        self.whole = True
        """False: something was computed that could not be recorded."""

    def append(self, operation: Operation, held: object) -> None:
        self._operations.append(operation)
        self._held.append(held)

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        ring = self._buffers.setdefault((shape, dtype), [])
        turn = self._made[shape, dtype] = self._made.get((shape, dtype), -1) + 1
        if turn < self.TURNS:
            ring.append(torch.empty(shape, dtype=dtype))
        return ring[turn % self.TURNS]

    def replay(self) -> None:
        if self._array is None:
            self._array = (Operation * len(self._operations))(*self._operations)
        self._run(ctypes.addressof(self._array), len(self._array), 1)


class NativeKernels:
    name = "native"
    invariant = True

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run_operations = library.lrl_run
        self._run_operations.argtypes, self._run_operations.restype = [c_void_p, c_int64, c_int64], None
        self._sample = library.lrl_draw
        self._sample.argtypes, self._sample.restype = [c_void_p] * 7 + [c_int64, c_int64, c_int], None
        self._use_at_most = library.lrl_use_at_most
        self._use_at_most.argtypes, self._use_at_most.restype = [c_int], None
        self._spans: dict[int, _LoraWork] = {}
        self._planned: tuple[Batch, _AttentionPlan] | None = None
        self._tape: Tape | None = None

    @contextmanager
    def at_most(self, level: int) -> Iterator[None]:
        """Use no higher instruction set than this: 0 portable, 1 AVX2, 2 AVX-512 BF16. For the whole process; for tests."""
        self._use_at_most(level)
        try:
            yield
        finally:
            self._use_at_most(2)

    @contextmanager
    def record(self) -> Iterator[Tape]:
        """Operations within are performed and recorded. Only they are: what torch does meanwhile is not on the tape."""
        self._tape = Tape(self._run_operations)
        try:
            yield self._tape
        finally:
            self._tape = None

    def forget(self) -> None:
        """Let go of adapters and buffers of the last passes."""
        self._spans.clear()
        self._planned = None

    def _do(
        self,
        kind: int,
        bf16: int,
        pointers: Sequence[int | None],
        sizes: Sequence[int],
        number: float,
        held: object,
        work: int,
    ) -> None:
        """Perform an operation; `work` decides whether more than one thread is worth it. A tape keeps `held` alive."""
        operation = Operation(kind, bf16, (c_void_p * 16)(*pointers), (c_int64 * 8)(*sizes), number)
        if self._tape is not None:
            self._tape.append(operation, held)
        self._run_operations(ctypes.addressof(operation), 1, work > _SERIAL_WORK)

    def _empty(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        return like.new_empty(shape) if self._tape is None else self._tape.buffer(shape, like.dtype)

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
        data, outputs, wanted = packed
        if inputs != wanted or inputs % (1 + bf16) or data.dtype is not x_TX.dtype:
            raise ValueError(f"input [{rows}, {inputs}] {x_TX.dtype} for weight [{outputs}, {wanted}] {data.dtype}")
        y = self._empty(x_TX, rows, outputs)
        bias = None if bias_N is None else bias_N.data_ptr()
        pointers = (x_TX.data_ptr(), data.data_ptr(), bias, y.data_ptr())
        self._do(LINEAR, bf16, pointers, (rows, data.shape[1], outputs), 0.0, (x_TX, packed, bias_N), _SERIAL_WORK + 1)
        return y

    def add_lora(self, y_TN: torch.Tensor, x_TX: torch.Tensor, spans: Sequence[tuple[int, int, Lora]]) -> None:
        bf16 = _is_bf16(x_TX)
        _is_bf16(y_TN)
        work = self._spans.get(id(spans))
        if work is None or work.spans is not spans:
            if len(self._spans) >= _SPANS_KEPT:
                self._spans.clear()
            work = self._spans[id(spans)] = _lora_work(spans, bf16)
        if work.wide and self._tape is not None:
            self._tape.whole = False
        for start, end, lora in work.wide:
            low = self.linear(x_TX[start:end], lora.down) * lora.scale
            odd = low.shape[1] % 2 if bf16 else 0  # `pack` has filled up the lane
            up = lora.up._replace(inputs=lora.up.inputs + odd)
            y_TN[start:end] += self.linear(torch.nn.functional.pad(low, (0, odd)), up)
        if work.scales.size:
            pointers = (
                y_TN.data_ptr(), x_TX.data_ptr(), work.bounds.ctypes.data, work.pairs.ctypes.data, work.scales.ctypes.data
            )  # fmt: skip
            sizes = (work.scales.size, x_TX.shape[1], y_TN.shape[1])
            self._do(ADD_LORA, bf16, pointers, sizes, 0.0, (y_TN, x_TX, work), _SERIAL_WORK + 1)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = self._empty(gate_up, tokens, width)
        pointers = (gate_up.data_ptr(), out.data_ptr())
        self._do(SILU_MUL, _is_bf16(gate_up), pointers, (tokens, width), 0.0, gate_up, 2 * tokens * width)
        return out

    def add_norm(
        self, x_TW: torch.Tensor, delta_TW: torch.Tensor | None, weight_W: torch.Tensor, eps: float
    ) -> torch.Tensor:
        tokens, width = x_TW.shape
        out = self._empty(x_TW, tokens, width)
        delta = None if delta_TW is None else delta_TW.data_ptr()
        pointers = (x_TW.data_ptr(), delta, weight_W.data_ptr(), out.data_ptr())
        self._do(ADD_NORM, _is_bf16(x_TW), pointers, (tokens, width), eps, (x_TW, delta_TW, weight_W), tokens * width)
        return out

    def rope_store(
        self, qkv_TX: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], batch: Batch, cache: LayerCache, heads: int
    ) -> torch.Tensor:
        tokens, width = qkv_TX.shape
        kv_heads = cache.keys.shape[1]
        dim = width // (heads + 2 * kv_heads)
        q = self._empty(qkv_TX, tokens, heads, dim)
        cos, sin = rope
        pointers = (
            qkv_TX.data_ptr(), q.data_ptr(), cache.keys.data_ptr(), cache.values.data_ptr(), cos.data_ptr(),
            sin.data_ptr(), batch.positions.data_ptr(), batch.cells.data_ptr(),
        )  # fmt: skip
        sizes = (tokens, heads, kv_heads, dim)
        self._do(ROPE_STORE, _is_bf16(qkv_TX), pointers, sizes, 0.0, (qkv_TX, rope, batch, cache), tokens * width)
        return q

    def attention(self, q_THD: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
        tokens, heads, dim = q_THD.shape
        kv_heads = cache.keys.shape[1]
        if self._planned is None or self._planned[0] is not batch:
            self._planned = (batch, _plan(batch, heads, kv_heads, dim))
        plan = self._planned[1]
        out = self._empty(q_THD, tokens, heads * dim)
        pointers = (
            q_THD.data_ptr(), cache.keys.data_ptr(), cache.values.data_ptr(), out.data_ptr(),
            None if plan.states is None else plan.states.data_ptr(), batch.positions.data_ptr(),
            batch.offsets.data_ptr(), batch.tables.data_ptr(), batch.lines.data_ptr(),
            None if plan.shared is None else plan.shared.ctypes.data, plan.bite_rows.ctypes.data,
            plan.bite_tokens.ctypes.data, plan.runs.ctypes.data, plan.run_rows.ctypes.data, plan.level_runs.ctypes.data,
        )  # fmt: skip
        sizes = (
            batch.lines.shape[0], plan.bite, len(plan.bite_rows), batch.tables.shape[1], heads, kv_heads, dim,
            len(plan.level_runs) - 1,
        )  # fmt: skip
        held = (q_THD, batch, cache, plan)
        self._do(ATTENTION, _is_bf16(q_THD), pointers, sizes, dim**-0.5, held, _SERIAL_WORK + 1)
        return out

    def log_softmax_sample(
        self, logits_BV: torch.Tensor, temperatures_B: torch.Tensor, uniforms_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, vocab = logits_BV.shape
        ids = torch.empty(rows, dtype=torch.int64)
        logprobs, entropies = torch.empty(rows), torch.empty(rows)
        temperatures, uniforms = temperatures_B.float().contiguous(), uniforms_B.double().contiguous()
        spans = np.empty(rows * -(-vocab // 256), np.float64)
        self._sample(
            logits_BV.data_ptr(), temperatures.data_ptr(), uniforms.data_ptr(), spans.ctypes.data,
            ids.data_ptr(), logprobs.data_ptr(), entropies.data_ptr(), rows, vocab, _is_bf16(logits_BV),
        )  # fmt: skip
        return ids, logprobs, entropies


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
    bite = max(1, _BITE_QUERIES // (heads // kv_heads))
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
    return dim % 16 == 0 and dim <= 256 and heads % kv_heads == 0


@once
def load() -> NativeKernels | None:
    """The compiled kernels, or None when the extension was not built. Raises ServerError for one of another version."""
    spec = importlib.util.find_spec("rollout_server.kernels.cpu._kernels")
    return opened(spec.origin) if spec is not None and spec.origin else None


def opened(library: str) -> NativeKernels:
    try:
        return NativeKernels(ctypes.CDLL(library))
    except (OSError, AttributeError) as error:
        hint = "build them anew: pip install -e . in a checkout; else install lightning-rl again"
        raise ServerError(f"the compiled kernels do not fit this version: {error}", hint=hint) from error


def _is_bf16(tensor: torch.Tensor) -> int:
    if tensor.dtype not in (torch.bfloat16, torch.float32) or not tensor.is_contiguous():
        raise TypeError(f"native kernels take contiguous float32 or bfloat16, not {tensor.dtype}")
    return int(tensor.dtype is torch.bfloat16)
