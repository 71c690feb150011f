"""Random passes for the Triton kernels, and how near two results must be. Used under the interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rollout_server.kernels.interface import Batch, LayerCache, SharedRun

PAGE = 16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def round_as_hardware_does() -> None:
    """Triton's interpreter cuts fp32 down to bf16 where hardware rounds to nearest even: mend it, so that kernels can
    be compared with torch bit by bit. Does nothing where kernels are compiled."""
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if not triton.knobs.runtime.interpret:
        return
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: InterpreterBuilder, source: TensorHandle, kind: tl.dtype) -> TensorHandle:
        narrow = source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16
        wide = source.dtype.scalar == tl.bfloat16 and kind.scalar == tl.float32
        if narrow:
            data = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16).numpy()
        elif wide:
            data = (np.asarray(source.data, dtype=np.uint32) << 16).view(np.float32)
        return TensorHandle(data, kind.scalar) if narrow or wide else cast(self, source, kind)

    InterpreterBuilder.cast_impl = cast_impl


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def random_batch(
    rows: Sequence[tuple[int, int]],
    *,
    shared: Sequence[tuple[Sequence[int], int, int]] = (),
    seed: int = 0,
    page: int = PAGE,
    device: str = "cpu",
) -> Batch:
    """`rows`: (new tokens, length with them). `shared`: (rows, first page, last page) that are the same pages; they
    become the batch's runs. Pages are scattered, lines are permuted, what stands beyond a row's length is nonsense."""
    generator = torch.Generator().manual_seed(seed)
    count = len(rows)
    needed = [-(-length // page) for _, length in rows]
    pool = torch.randperm(sum(needed) + 1, generator=generator).tolist()
    tables = torch.full((count + 2, max(needed) + 3), 2**30, dtype=torch.int32)
    lines = torch.randperm(count + 2, generator=generator)[:count]
    pages = [[pool.pop() for _ in range(n)] for n in needed]
    for members, first, last in shared:
        for row in members:
            pages[row][first:last] = pages[members[0]][first:last]
    for row, line in enumerate(lines.tolist()):
        tables[line, : needed[row]] = torch.tensor(pages[row], dtype=torch.int32)
    positions: list[int] = []
    cells: list[int] = []
    for row, (new, length) in enumerate(rows):
        here = range(length - new, length)
        positions += here
        cells += [pages[row][p // page] * page + p % page for p in here]
    offsets = [0]
    for new, _ in rows:
        offsets.append(offsets[-1] + new)

    def ints(values: Sequence[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Batch(
        ids=torch.zeros(len(positions), dtype=torch.int64, device=device),
        positions=ints(positions),
        cells=ints(cells, torch.int64),
        offsets=ints(offsets),
        tables=tables.to(device),
        lines=lines.to(device, torch.int32),
        lengths=ints([length for _, length in rows]),
        longest=max(length for _, length in rows),
        most=max(new for new, _ in rows),
        runs=[SharedRun(list(members), first, last) for members, first, last in shared],
    )


def random_cache(batch: Batch, kv_heads: int, dim: int, dtype: torch.dtype, *, seed: int = 1) -> LayerCache:
    """A full cache [P, K, S, D]; pages that no row has hold NaN, so that reading one shows."""
    generator = torch.Generator().manual_seed(seed)
    used = sorted(
        {
            page
            for line, length in zip(batch.lines.tolist(), batch.lengths.tolist(), strict=True)
            for page in batch.tables[line, : -(-length // PAGE)].tolist()
        }
    )
    shape = (max(used) + 2, kv_heads, PAGE, dim)
    device = batch.ids.device
    keys, values = (torch.full(shape, torch.nan) for _ in range(2))
    for part in (keys, values):
        part[used] = torch.randn((len(used), *shape[1:]), generator=generator)
    return LayerCache(keys.to(device, dtype), values.to(device, dtype))


def random_tensor(*shape: int, dtype: torch.dtype, seed: int = 2, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
