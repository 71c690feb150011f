"""Every Triton kernel compiles for the GPUs that it is meant for, at real models' shapes, with their tiles in registers: on
any machine, since Triton brings its own assembler. Launches are recorded on tensors without memory and compiled from there.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int32: "i32", torch.int64: "i64"}
_OPTIONS = ("num_warps", "num_stages")
_SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program may have, by compute capability."""


class Recorder:
    """Stands in for `JITFunction.run`: keeps each launch's kernel, arguments and grid."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[object, ...], dict[str, Any], tuple[int, ...]]] = []

    def run(self, kernel: Any, *args: object, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        self.launches.append((kernel, args, options, grid))


def _is_one(kernel: Any, name: str, value: object) -> bool:
    return type(value) is int and value == 1 and name not in kernel.do_not_specialize


def compile_launch(kernel: Any, args: tuple[object, ...], options: dict[str, Any], capability: int) -> Any:
    """As the launcher would: types and divisibility from the arguments, ones and None as constants."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    values = [*args, *(options[name] for name in kernel.arg_names[len(args) :])]
    for index, (name, value) in enumerate(zip(kernel.arg_names, values, strict=True)):
        divisible = False
        if kernel.params[index].is_constexpr or value is None or (_is_one(kernel, name, value)):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], divisible = f"*{_TYPES[value.dtype]}", True
        elif isinstance(value, int):
            signature[name], divisible = (
                ("i32" if -(2**31) <= value < 2**31 else "i64"),
                value % 16 == 0 and name not in kernel.do_not_specialize,
            )
        else:
            signature[name] = "fp32"
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    chosen = {name: options[name] for name in _OPTIONS if name in options}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=chosen)


def spilled_bytes(compiled: Any, capability: int) -> int:
    """Bytes that the assembler moved from registers to memory, out of its report."""
    from triton.backends.nvidia.compiler import get_ptxas

    name = "sm_90a" if capability == 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        done = subprocess.run(
            [get_ptxas(capability).path, "-v", f"--gpu-name={name}", source, "-o", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        )
    return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)))


SPILLED = 256
"""A few registers around a loop cost nothing; a tile that does not fit costs kilobytes."""


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        pytest.skip("Triton was imported to interpret")
    recorder = Recorder()
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: recorder.run(self, *args, **options))
    return recorder


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int32)


def attention(dtype: torch.dtype, heads: int, kv_heads: int, tokens: int, most: int, splits: int) -> None:
    from rollout_server.kernels.interface import Batch, LayerCache
    from rollout_server.kernels.triton.attention import Tiling, attend, prefill_tile

    rows = 256
    batch = Batch(
        ids=empty(tokens, dtype=torch.int64),
        positions=ints(tokens),
        cells=empty(tokens, dtype=torch.int64),
        offsets=ints(rows + 1),
        tables=ints(257, 512),
        lines=ints(rows),
        lengths=ints(rows),
        longest=8192,
        most=most,
    )
    cache = LayerCache(*(empty(100_000, kv_heads, 16, 128, dtype=dtype) for _ in range(2)))
    tile = 16 if most == 1 else prefill_tile(heads // kv_heads, dtype)
    attend(empty(tokens, heads, 128, dtype=dtype), batch, cache, Tiling(most == 1, tile, splits, 64, 1))


def shared_runs() -> None:
    from rollout_server.kernels.triton.attention_merge import merge_parts
    from rollout_server.kernels.triton.attention_runs import attend_runs

    cache, parts = empty(100_000, 8, 16, 128), empty(256, 32, 8, 128, dtype=torch.float32)
    weights, table = empty(256, 32, 8, dtype=torch.float32), ints(257, 512)
    numbers = (512, 16 * 8 * 128, 16 * 128, 0.1, 8, 4, 9)
    plan = (ints(64), ints(20), ints(300), ints(301))
    attend_runs[(32, 8, 4)](
        *(empty(256, 32, 128), parts, weights, cache, cache, ints(257), table, ints(256), *plan, *numbers),
        **{"HEADS": 32, "GROUP": 4, "D": 128, "PAGE": 16},
        **{"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 128, "num_warps": 4, "num_stages": 2},
    )
    merge_parts[(256, 32)](parts, weights, empty(256, 32, 128), 8, D=128, BLOCK_SLOTS=8, BLOCK_D=128, num_warps=1)


def operations() -> None:
    from rollout_server.kernels.interface import Batch, LayerCache
    from rollout_server.kernels.triton import invariant as kernels

    x, positions = empty(256, 4096), ints(256)
    cells = empty(256, dtype=torch.int64)
    batch = Batch(cells, positions, cells, ints(257), ints(257, 512), ints(256), ints(256), 8192, 1)
    cache = LayerCache(empty(1000, 8, 16, 128), empty(1000, 8, 16, 128))
    rope = (empty(8192, 64, dtype=torch.float32), empty(8192, 64, dtype=torch.float32))
    kernels.rope_store(empty(256, 6144), rope, batch, cache, 32)
    kernels.add_norm(x, empty(256, 4096), empty(4096), 1e-5)
    kernels.add_norm(empty(256 * 32, 128), None, empty(128), 1e-5)
    kernels.silu_mul(empty(256, 28672))
    kernels.linear(x, empty(6144, 4096), empty(6144))
    kernels.linear(x, empty(28672, 4096))
    kernels.linear(empty(256, 4096, dtype=torch.float32), empty(6144, 4096, dtype=torch.float32))
    kernels.log_softmax_sample(
        empty(256, 151_936, dtype=torch.float32),
        empty(256, dtype=torch.float32),
        empty(256, dtype=torch.float64),
    )


def lora() -> None:
    from rollout_server.kernels.triton.lora import _down, _up

    table, scales = empty(32, 5, dtype=torch.int64), empty(32, dtype=torch.float32)
    for lanes, inputs_each, outputs_each in ((16, 64, 128), (64, 64, 128), (256, 16, 32)):
        parts = empty(4, 256, lanes, dtype=torch.float32)
        _down[(32, 4)](
            *(empty(256, 4096), parts, table, 256, 4096, 4096),
            **{"PART": 1024, "BLOCK_T": 16, "BLOCK_X": inputs_each, "BLOCK_R": lanes},
        )
        _up[(32, 48)](
            *(empty(256, 6144), parts, table, scales, 256, 4, 6144, 6144),
            **{"BLOCK_T": 16, "BLOCK_N": outputs_each, "BLOCK_R": lanes},
        )


CASES: dict[str, Callable[[], None]] = {
    "decode": lambda: attention(torch.bfloat16, 32, 8, 256, 1, 1),
    "decode split": lambda: attention(torch.bfloat16, 32, 8, 256, 1, 8),
    "decode odd group": lambda: attention(torch.bfloat16, 28, 4, 256, 1, 1),
    "prefill": lambda: attention(torch.bfloat16, 32, 8, 2048, 512, 1),
    "prefill fp32": lambda: attention(torch.float32, 32, 8, 2048, 512, 1),
    "shared runs": shared_runs,
    "operations": operations,
    "lora": lora,
}


@pytest.mark.parametrize(
    ("case", "capability"),
    [*((case, 90) for case in CASES), ("decode split", 80), ("prefill", 80), ("shared runs", 80)],
)
def test_compiles(recorder: Recorder, case: str, capability: int) -> None:
    CASES[case]()
    assert recorder.launches
    for kernel, args, options, grid in recorder.launches:
        assert all(0 < n < 65536 for n in grid[1:]), f"{kernel.__name__}: grid {grid} is too large in y or z"
        compiled = compile_launch(kernel, args, options, capability)
        assert compiled.metadata.shared <= _SHARED[capability], kernel.__name__
        assert spilled_bytes(compiled, capability) <= SPILLED, f"{kernel.__name__} spills registers"
