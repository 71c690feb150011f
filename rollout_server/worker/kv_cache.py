"""The paged memory for keys and values of every layer on the worker's device, and its tier on the host.

The device tier is what `Kernels.allocate` gives; a page is whatever stands at one index of dimension 0, in the backend's
own layout, and moves as bytes: nothing is converted. The host tier keeps all layers of a page side by side, so that a
page is one stretch of memory or of a file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from lightning_rl.errors import ServerError
from rollout_server.kernels.interface import LayerCache

Pairs = Sequence[tuple[int, int]]

_MOVED_AT_ONCE = 64
"""Pages that pass through the staging memory together: 24 MB of SmolLM2-135M in bf16."""


class KVCache:
    """Pages 0 … pages-1 are the manager's; one more, `scratch`, takes what padding tokens write."""

    def __init__(
        self,
        allocate: Callable[[int], list[LayerCache]],
        pages: int,
        *,
        host_pages: int = 0,
        host_dir: Path | None = None,
    ) -> None:
        """`allocate` gives zeroed caches, one a layer, of so many pages. Raises ServerError when the host tier cannot
        be had."""
        self.pages, self.scratch = pages, pages
        self._allocate = allocate
        self.layers = allocate(pages + 1)
        self._tensors = [tensor for layer in self.layers for tensor in layer]
        self._widths = [tensor[0].numel() * tensor.element_size() for tensor in self._tensors]
        self.page_bytes = sum(self._widths)
        self.device = self._tensors[0].device
        self.host = _host_tier(host_pages, self.page_bytes, host_dir, pinned=self.device.type == "cuda")

    def offload(self, pairs: Pairs) -> None:
        """Copy (device page, host page) each to the host."""
        for sources, targets in _chunks(pairs):
            index = torch.tensor(sources, device=self.device)
            staging = torch.cat([_bytes(t.index_select(0, index)) for t in self._tensors], dim=1)
            for row, page in enumerate(targets):
                self.host[page].copy_(staging[row], non_blocking=True)

    def restore(self, pairs: Pairs) -> None:
        """Copy (host page, device page) each back."""
        for sources, targets in _chunks(pairs):
            staging = torch.empty(len(sources), self.page_bytes, dtype=torch.uint8, device=self.device)
            for row, page in enumerate(sources):
                staging[row].copy_(self.host[page], non_blocking=True)
            index = torch.tensor(targets, device=self.device)
            for tensor, part in zip(self._tensors, staging.split(self._widths, dim=1), strict=True):
                pages = part.contiguous().view(tensor.dtype).view(len(targets), *tensor.shape[1:])
                tensor.index_copy_(0, index, pages)

    def copy(self, pairs: Pairs) -> None:
        """Copy (from page, to page) each on the device; all are read before any is written."""
        if not pairs:
            return
        sources, targets = torch.tensor(pairs, device=self.device).unbind(1)
        for tensor in self._tensors:
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))

    def release(self) -> None:
        """Free the device's pages; what they held is lost. The host tier stays."""
        self.layers, self._tensors = [], []

    def reclaim(self) -> None:
        """Take zeroed pages again."""
        self.layers = self._allocate(self.pages + 1)
        self._tensors = [tensor for layer in self.layers for tensor in layer]


def _bytes(pages: torch.Tensor) -> torch.Tensor:
    return pages.flatten(1).view(torch.uint8)


def _chunks(pairs: Pairs) -> Iterator[tuple[list[int], list[int]]]:
    for start in range(0, len(pairs), _MOVED_AT_ONCE):
        sources, targets = zip(*pairs[start : start + _MOVED_AT_ONCE], strict=True)
        yield list(sources), list(targets)


def _host_tier(pages: int, page_bytes: int, directory: Path | None, *, pinned: bool) -> torch.Tensor:
    """uint8 [pages, page_bytes] in memory, or in a file that has no name: it is gone with the process, however that
    ends."""
    if directory is None or not pages:
        return torch.empty(pages, page_bytes, dtype=torch.uint8, pin_memory=pinned and pages > 0)
    size = pages * page_bytes
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix="kv-", dir=directory)
        try:
            os.posix_fallocate(handle, 0, size)
            mapped = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        finally:
            os.close(handle)
            Path(path).unlink()
    except OSError as error:
        raise ServerError(
            f"{directory}: no room for {size / 1e9:.1f} GB of keys and values: {error}",
            hint="choose another host_kv_dir or fewer host_kv_tokens",
        ) from error
    return mapped.view(pages, page_bytes)
