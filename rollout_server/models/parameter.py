"""Where weights live: the parts that hold checkpoint tensors, each in a layout of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from rollout_server.kernels.interface import Kernels
from rollout_server.models.weights import Tensors

TensorMap = Callable[[torch.Tensor], torch.Tensor]


class Backend(NamedTuple):
    """What every part of a decoder is computed with."""

    kernels: Kernels
    dtype: torch.dtype
    device: torch.device
    row_block: int | None
    """Compute matrix products this many rows at a time, whatever the batch: equal shapes give equal bits."""


class Holder(Protocol):
    """A part that holds tensors of the checkpoint."""

    @property
    def names(self) -> Sequence[str]:
        """Of the tensors, as `weights.tensor_shapes` has them."""

    def load(self, tensors: Tensors) -> None:
        """Take over the values of `names`, in place where there are old ones. Copies; shapes were checked."""

    def live(self, name: str) -> torch.Tensor:
        """What is computed with, in the checkpoint's layout."""

    def map_tensors(self, fn: TensorMap) -> None:
        """Put fn(tensor) in the place of each tensor held."""


class Parameter:
    """One tensor as the checkpoint has it."""

    value: torch.Tensor

    def __init__(self, backend: Backend, name: str) -> None:
        self.names: tuple[str, ...] = (name,)
        self._backend = backend

    def load(self, tensors: Tensors) -> None:
        (name,) = self.names
        if hasattr(self, "value"):
            self.value.copy_(tensors[name])
        else:
            self.value = tensors[name].to(self._backend.device, self._backend.dtype, copy=True).contiguous()

    def live(self, name: str) -> torch.Tensor:
        return self.value

    def map_tensors(self, fn: TensorMap) -> None:
        self.value = fn(self.value)


def map_packed(packed: Any, fn: TensorMap) -> Any:
    """fn over the tensors of what `Kernels.pack` made: a tensor, or a NamedTuple with tensors in it."""
    if isinstance(packed, torch.Tensor):
        return fn(packed)
    if isinstance(packed, tuple):
        return type(packed)(*(map_packed(part, fn) for part in packed))
    return packed


def copy_packed(into: Any, new: Any) -> Any:
    """Overwrite one packed weight by another of the same shape and return it."""
    if into is new:
        return into
    if isinstance(into, torch.Tensor):
        return into.copy_(new)
    if isinstance(into, tuple):
        return type(into)(*(copy_packed(a, b) for a, b in zip(into, new, strict=True)))
    return new
