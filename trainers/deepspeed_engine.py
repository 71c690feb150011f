"""The optimiser step, owned by DeepSpeed: precision, sharding, clipping, gradient reduction.

Losses arrive pre-scaled (`algorithms.aggregation`), so that a step is the plain sum of its rows' gradients over all ranks.
DeepSpeed averages over ranks; multiplying by their number undoes that. World size 1 is no special case.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from msgspec import Struct
from torch import Tensor, nn

RowLoss = Callable[[nn.Module, Any], tuple[Tensor, dict[str, float]]]
"""(module, row) -> (loss, sums to be added up over rows and ranks)."""

WAIT_FOR_ROLLOUTS = timedelta(hours=24)
"""Ranks without a console wait for rank 0, which waits for agents."""
COLLECTIVE_TIMEOUT = timedelta(minutes=15)


class OptimiserConfig(Struct, frozen=True, kw_only=True):
    weight_decay: float
    gradient_clipping: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8


class TrainEngine:
    """One policy under DeepSpeed. Create after `init_distributed`; `close` before the process ends."""

    def __init__(self, module: nn.Module, dtype: str, config: OptimiserConfig) -> None:
        deepspeed = _import_deepspeed()
        self.module = module
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            model_parameters=parameters,
            optimizer=optimizer,
            dist_init_required=False,
            config=_config(dtype, config),
        )

    def step(self, rows: Sequence[Any], loss_of: RowLoss, learning_rate: float) -> dict[str, float]:
        """One update from this rank's rows; every rank must bring equally many. Returns sums over all rows and ranks,
        with `gradient_norm` before clipping. Without any rows there is no update: moments and weights stay."""
        if not rows:
            return {"gradient_norm": 0.0}
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.train()
        sums: dict[str, float] = {}
        world = dist.get_world_size()
        for row in rows:
            loss, parts = loss_of(self.engine, row)
            self.engine.backward(loss * world)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return {**all_sum(sums), "gradient_norm": float(norm) if norm is not None else float("nan")}

    def close(self) -> None:
        self.engine.destroy()


def all_sum(sums: dict[str, float]) -> dict[str, float]:
    """Added up over ranks, name by name; ranks may know different names."""
    if dist.get_world_size() == 1:
        return sums
    everyone: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, sums)
    names = dict.fromkeys(name for part in everyone for name in part)
    return {name: sum(part.get(name, 0.0) for part in everyone) for name in names}


def init_distributed() -> None:
    """Join the process group that RANK, WORLD_SIZE and MASTER_* describe, or make one of a single process."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    _import_deepspeed().init_distributed(dist_backend="gloo", timeout=COLLECTIVE_TIMEOUT, verbose=False)


def leave_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _config(dtype: str, config: OptimiserConfig) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.gradient_clipping,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        # Rows are added up in fp32, here and between ranks. Stage 1 would add them in bf16, whatever is asked for.
        "zero_optimization": {"stage": 2},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
    }


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without its shared-memory all-reduce: that one would be compiled for half a minute at start."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed
        import deepspeed.ops
        from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
