"""Where a decode pass of the engine spends its time on a CPU, and when attending to shared prefixes together pays.

    python -m tests.bench.bench_passes [--rows 1 64] [--context 128] [--shared]

SmolLM2-135M in bfloat16, one process, nothing beside it. Medians in milliseconds. The first table runs the operations of a
recorded pass kind by kind, all layers of each; `whole` is the pass in one call. `--shared` prints all layers' attention for R
rows with a common prefix and 96 tokens of their own, alone and together. Run it under `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`
to have the huge pages that `lrl` gives its workers, and without to see what they are worth.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from lightning_rl.memory import keep_freed_memory
from rollout_server.kernels import native
from rollout_server.kernels.interface import Batch, SharedRun
from rollout_server.messages import SamplingParams
from rollout_server.models.catalog import resolve_model
from rollout_server.models.config import read_config
from rollout_server.worker.cpu_programs import DecodePrograms
from tests.harness import LocalEngine

KINDS = ["linear", "lora", "norm", "silu", "rope", "attention"]
OWN_PAGES = 6


def median_ms(work: Callable[[], object], rounds: int = 30) -> float:
    work()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def print_pass(rows: int, context: int) -> None:
    engine = LocalEngine(
        resolve_model("smollm2-135m"), "bfloat16", max_batch=rows, kv_tokens=(context + 64) * rows, max_step_tokens=1024
    )
    rng = random.Random(0)
    for i in range(rows):
        prompt = [rng.randrange(3, 49000) for _ in range(context)]
        engine.submit(str(i), prompt, SamplingParams(max_tokens=24, seed=i))
    engine.run()
    programs, decoder = engine.runner._graphs, engine.runner.decoder
    kernels = decoder.kernels
    assert isinstance(programs, DecodePrograms)
    assert isinstance(kernels, native.NativeKernels)
    program = next(program for key, program in programs._programs.items() if key[0] == rows)
    figures = {"whole": median_ms(program.tape.replay)}
    for kind, name in enumerate(KINDS):
        some = [operation for operation in program.tape._operations if operation.kind == kind]
        if some:
            array = (native.Operation * len(some))(*some)
            figures[name] = median_ms(lambda a=array: kernels._run_operations(ctypes.addressof(a), len(a), 1))  # type: ignore[misc]
    logits = decoder.logits(program.hidden)
    warm, uniforms = torch.ones(rows), torch.rand(rows, dtype=torch.float64)
    figures["head"] = median_ms(lambda: decoder.logits(program.hidden))
    figures["sample"] = median_ms(lambda: kernels.log_softmax_sample(logits, warm, uniforms))
    print(
        f"{rows:4d} rows at {context}+ tokens:",
        ", ".join(f"{name} {ms:.2f}" for name, ms in figures.items()),
        flush=True,
    )


def print_sharing() -> None:
    config, kernels = read_config(resolve_model("smollm2-135m")), native.load()
    assert kernels is not None
    cache = kernels.allocate(config, 4096, native.PAGE_SIZE, torch.bfloat16, torch.device("cpu"))
    for layer in cache:
        layer.keys.normal_()
        layer.values.normal_()
    for rows in (4, 16, 64, 256):
        for shared in (8, 16, 32, 64):
            tables = torch.zeros(rows, shared + OWN_PAGES, dtype=torch.int32)
            tables[:, :shared] = torch.arange(shared)
            tables[:, shared:] = (torch.randperm(4096 - shared)[: rows * OWN_PAGES] + shared).view(rows, OWN_PAGES)
            positions = torch.full((rows,), (shared + OWN_PAGES) * native.PAGE_SIZE - 9, dtype=torch.int32)
            alone = Batch(
                ids=torch.zeros(rows, dtype=torch.int64), positions=positions, cells=torch.zeros(rows, dtype=torch.int64),
                offsets=torch.arange(rows + 1, dtype=torch.int32), tables=tables,
                lines=torch.arange(rows, dtype=torch.int32), lengths=positions + 1, longest=int(positions[0]) + 1, most=1,
            )  # fmt: skip
            together = alone._replace(runs=[SharedRun(list(range(rows)), 0, shared)])
            q = torch.randn(rows, config.heads, config.head_dim).bfloat16()

            def attend(batch: Batch, q: torch.Tensor = q) -> None:
                for layer in cache:
                    kernels.attention(q, batch, layer)

            one, other = median_ms(lambda b=alone: attend(b), 7), median_ms(lambda b=together: attend(b), 7)  # type: ignore[misc]
            print(
                f"{rows:4d} rows share {shared * native.PAGE_SIZE:5d}: alone {one:.2f}, together {other:.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--shared", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    for rows in args.rows:
        print_pass(rows, args.context)
    if args.shared:
        print_sharing()


if __name__ == "__main__":
    main()
