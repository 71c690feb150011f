"""The trainings of the study, some at a time; those whose result is there are not run again."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.studies.credit.model import make_model

TASKS = ("early_key", "long_tail", "two_agents")
RULES = (
    "equal", "step_rewards", "per_agent", "mt_grpo", "tree", "gigpo", "return_to_go", "turn_gae", "token_gae", "final",
)  # fmt: skip
FIRST_SEED = 10
"""Seeds below were used to find sizes at which a training takes seconds."""


def run(out: Path, tasks: Sequence[str], rules: Sequence[str], seeds: int, jobs: int) -> int:
    """Leaves `out/results/TASK.RULE.SEED.json` for each training. Returns how many were not finished."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    (out / "results").mkdir(parents=True, exist_ok=True)
    if not (out / "model" / "tokenizer.json").exists():
        make_model(out / "model")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for rule, task in itertools.product(rules, tasks):
        queue.put((task, rule, seeds))
    for _ in range(jobs):
        queue.put(None)
    workers = [context.Process(target=_work, args=(out, queue), name=f"credit-{number}") for number in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    wanted = itertools.product(tasks, rules, range(FIRST_SEED, FIRST_SEED + seeds))
    return sum(not _result(out, *training).exists() for training in wanted)


def _result(out: Path, task: str, rule: str, seed: int) -> Path:
    return out / "results" / f"{task}.{rule}.{seed}.json"


def _work(out: Path, queue: Any) -> None:
    import torch

    from recipes.studies.credit.training import Bench, Training
    from trainers.deepspeed_engine import init_distributed, leave_distributed

    torch.set_num_threads(1)
    init_distributed()
    while (chosen := queue.get()) is not None:
        task, rule, count = chosen
        seeds = [s for s in range(FIRST_SEED, FIRST_SEED + count) if not _result(out, task, rule, s).exists()]
        if not seeds:
            continue
        with Bench(out / "model", out / f"bench-{os.getpid()}") as bench:
            for seed in seeds:
                started = time.monotonic()
                curve = bench.train(Training(task=task, rule=rule, seed=seed))
                seconds = round(time.monotonic() - started, 1)
                _write(_result(out, task, rule, seed), {"curve": curve, "seconds": seconds})
                print(f"{task} {rule} {seed}: {len(curve)} steps, {seconds} s", flush=True)
    leave_distributed()


def _write(path: Path, value: dict[str, Any]) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(value))
    scratch.rename(path)
