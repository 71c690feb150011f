"""Measures what the machine does at best: bytes read from memory and products at a model's own shapes.

The rate of reading is that of a sum and of a matrix-vector product over more than the caches hold, the better of the two;
the rate of products is that of torch's `linear` and `mm` and of our own C kernel, the best for each layer, with the weight
in cache. A few seconds; run it while nothing else does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from rollout_server.bench.limits import Gemm, Limits, Shape
from rollout_server.kernels import native

STREAM_BYTES = 512 * 2**20
PREFILL_ROWS = 512
_BUDGET_S = 0.1
"""For each operation: its best time of the repetitions that fit, at least three."""


def probe(shape: Shape, rows: Iterable[int], threads: int) -> Limits:
    """`rows`: the numbers of sequences that decode together."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            dtype = torch.bfloat16 if shape.element_bytes == 2 else torch.float32
            return Limits(
                read_bytes_s=read_rate(dtype),
                gemm_flop_s={count: gemm_rate((*shape.body, shape.head), count, dtype) for count in sorted(rows)},
                prefill_flop_s=gemm_rate(shape.body, PREFILL_ROWS, dtype),
            )
    finally:
        torch.set_num_threads(before)


def read_rate(dtype: torch.dtype) -> float:
    """Bytes a second, all threads."""
    block = torch.arange(STREAM_BYTES // 4, dtype=torch.float32)  # no two pages alike
    by_sum = STREAM_BYTES / _best_s(block.sum)
    weight = block.view(torch.int16).view(dtype) if dtype == torch.bfloat16 else block
    weight = weight.view(-1, 2048)
    vector = torch.zeros(1, 2048, dtype=dtype)
    by_product = STREAM_BYTES / _best_s(lambda: torch.nn.functional.linear(vector, weight))
    return max(by_sum, by_product)


def gemm_rate(layers: Iterable[Gemm], rows: int, dtype: torch.dtype) -> float:
    """FLOP a second over all `layers`, each weighted by how often it runs."""
    operations, seconds = 0.0, 0.0
    for layer in layers:
        operations += 2 * rows * layer.parameters
        seconds += layer.times * _gemm_s(layer, rows, dtype)
    return operations / seconds


def _gemm_s(layer: Gemm, rows: int, dtype: torch.dtype) -> float:
    x = torch.randn(rows, layer.k).to(dtype)
    weight = torch.randn(layer.n, layer.k).to(dtype)
    transposed = weight.t().contiguous()
    ways: list[Callable[[], object]] = [
        lambda: torch.nn.functional.linear(x, weight),
        lambda: torch.mm(x, transposed),
    ]
    if (kernels := native.load()) is not None:
        packed = kernels.pack(weight)
        ways.append(lambda: kernels.linear(x, packed))
    return min(map(_best_s, ways))


def _best_s(operation: Callable[[], object]) -> float:
    times: list[float] = []
    end = time.perf_counter() + _BUDGET_S
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        operation()
        times.append(time.perf_counter() - start)
    return min(times)
