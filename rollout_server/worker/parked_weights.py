"""Weights away from the device while the engine sleeps: a GPU's in pinned host memory, a CPU's in a file.

The decoder holds tensors without memory meanwhile. What comes back is what went, bit for bit.
"""

from __future__ import annotations

import ctypes
import io
import sys
import tempfile
from pathlib import Path

import torch

from rollout_server.models.decoder import Decoder


class ParkedWeights:
    def __init__(self, decoder: Decoder, device: torch.device, directory: Path | None) -> None:
        """Take the decoder's tensors away. `directory` is where the file of a CPU's weights lies, without a name; None
        is the system's place for temporary files.

        Raises OSError or RuntimeError when there is no room for them; the decoder has them still."""
        self._decoder, self._device = decoder, device
        self._pinned: list[torch.Tensor] = []
        self._file: io.FileIO | None = None
        if device.type == "cpu":
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - closed by `restore`
        try:
            for tensor in decoder.tensors():
                self._copy(tensor)
        except BaseException:
            if self._file is not None:
                self._file.close()
            raise
        decoder.map_tensors(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))

    def restore(self) -> None:
        """Give the tensors back to the decoder, once."""
        if self._file is not None:
            self._file.seek(0)
        self._pinned.reverse()
        self._decoder.map_tensors(self._give)
        if self._file is not None:
            self._file.close()

    def _copy(self, tensor: torch.Tensor) -> None:
        if self._file is None:
            self._pinned.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor))
            return
        left = _bytes(tensor.contiguous())
        while left:
            left = left[self._file.write(left) :]

    def _give(self, empty: torch.Tensor) -> torch.Tensor:
        if self._file is None:
            return self._pinned.pop().to(self._device)
        tensor = torch.empty(empty.shape, dtype=empty.dtype)
        left = _bytes(tensor)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise OSError(f"the file of the parked weights ended before a tensor of {tensor.nbytes} bytes")
            left = left[count:]
        return tensor


def return_freed_memory(device: torch.device) -> None:
    """Give what this process has freed back to the device or the system, which allocators would keep (see
    `lightning_rl.memory`)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
