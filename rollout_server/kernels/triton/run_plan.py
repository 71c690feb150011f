"""What `attend_runs` needs to know of a pass's shared runs: made once a pass, used by every layer."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch

from rollout_server.kernels.interface import Batch


class RunPlan(NamedTuple):
    """See `attend_runs` for the tensors' shapes. All int32, on the batch's device."""

    tiles: torch.Tensor
    runs: torch.Tensor
    members: torch.Tensor
    reach: torch.Tensor
    covered: torch.Tensor
    """[R]: the first position of each row that no run has."""
    depth: int
    """Runs of the row that is in most."""
    longest: int
    """Positions of the longest run."""
    steps: int


def plan_runs(batch: Batch, page: int, tile_tokens: int) -> RunPlan:
    """`tile_tokens`: tokens of one program. Nothing is read from the device: a run's tokens are bounded on the host and
    counted there."""
    rows, tokens = batch.lines.shape[0], batch.ids.shape[0]
    covered, depths = [0] * rows, [0] * rows
    tiles: list[int] = []
    described: list[int] = []
    bounds = [0, *accumulate(len(run.rows) for run in batch.runs)]
    for index, run in enumerate(batch.runs):
        depth = max(depths[row] for row in run.rows)
        described += [bounds[index], bounds[index + 1], run.first * page, run.last * page, depth]
        for row in run.rows:
            depths[row] = depth + 1
            covered[row] = max(covered[row], run.last * page)
        for start in range(0, min(tokens, len(run.rows) * batch.most), tile_tokens):
            tiles += [index, start]
    members = [row for run in batch.runs for row in run.rows]

    device = batch.offsets.device
    packed = torch.tensor(tiles + described + members + covered, dtype=torch.int32)
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    on_device = packed.split([len(tiles), len(described), len(members), len(covered)])
    counts = torch.diff(batch.offsets)[on_device[2].long()]
    reach = torch.zeros(len(members) + 1, dtype=torch.int32, device=device)
    reach[1:] = counts.cumsum(0)
    return RunPlan(
        tiles=on_device[0],
        runs=on_device[1],
        members=on_device[2],
        reach=reach,
        covered=on_device[3],
        depth=max(depths),
        longest=max((run.last - run.first) * page for run in batch.runs),
        steps=max(len(run.rows) for run in batch.runs).bit_length(),
    )


class LastPlan:
    """Remembers the plan of the batch that was asked for last: layers of a pass ask one after the other."""

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._plan: RunPlan | None = None

    def of(self, batch: Batch, page: int, tile_tokens: int) -> RunPlan:
        if self._plan is None or self._batch is not batch:
            self._batch, self._plan = batch, plan_runs(batch, page, tile_tokens)
        return self._plan
