"""Linear maps: a packed weight, a bias, and the LoRA shares of the tokens that use adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from rollout_server.kernels.interface import Lora
from rollout_server.models.parameter import Backend, TensorMap, copy_packed, map_packed
from rollout_server.models.weights import Tensors

Spans = Sequence[tuple[int, int, Lora]]
"""(first token, last token + 1, adapter)."""


class Linear:
    """y = x W^T + b, plus each adapter's share for its tokens."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.packed: Any = None
        self.bias: torch.Tensor | None = None
        self._linear, self._add_lora = backend.kernels.linear, backend.kernels.add_lora
        self._block = backend.row_block

    def __call__(self, x_TX: torch.Tensor, spans: Spans = ()) -> torch.Tensor:
        if self._block is not None:
            return self._in_blocks(x_TX, spans, self._block)
        y = self._linear(x_TX, self.packed, self.bias)
        if spans:
            self._add_lora(y, x_TX, spans)
        return y

    def _in_blocks(self, x: torch.Tensor, spans: Spans, block: int) -> torch.Tensor:
        y = torch.cat([self._linear(part, self.packed, self.bias) for part in torch.split(_padded(x, block), block)])
        y = y[: x.shape[0]]
        for start, end, lora in spans:
            sums = _padded(y[start:end], block)
            for part, inputs in zip(
                torch.split(sums, block), torch.split(_padded(x[start:end], block), block), strict=True
            ):
                self._add_lora(part, inputs, [(0, block, lora)])
            y[start:end] = sums[: end - start]
        return y

    def set(self, weight_NX: torch.Tensor, bias_N: torch.Tensor | None = None) -> None:
        """Take over a weight that is on the device, in the dtype, and nobody else's: it may be kept as it is."""
        packed = self.backend.kernels.pack(weight_NX)
        self.packed = packed if self.packed is None else copy_packed(self.packed, packed)
        if bias_N is not None:
            self.bias = bias_N if self.bias is None else self.bias.copy_(bias_N)

    def weight(self) -> torch.Tensor:
        """[N, X], live."""
        return self.backend.kernels.unpack(self.packed)

    def map_tensors(self, fn: TensorMap) -> None:
        self.packed = map_packed(self.packed, fn)
        if self.bias is not None:
            self.bias = fn(self.bias)


class Stacked(Linear):
    """Modules of the checkpoint that have the same input, computed as one linear map. A `Holder`.

    `modules`: name (`model.layers.0.self_attn.q_proj`) and outputs, in order.
    """

    def __init__(self, backend: Backend, modules: Mapping[str, int], inputs: int, *, bias: bool = False) -> None:
        super().__init__(backend)
        self.modules, self.inputs = dict(modules), inputs
        self._biased = bias
        sides = ("weight", "bias") if bias else ("weight",)
        self.names = tuple(f"{module}.{side}" for side in sides for module in modules)

    def load(self, tensors: Tensors) -> None:
        self.set(self._cat(tensors, "weight"), self._cat(tensors, "bias") if self._biased else None)

    def _cat(self, tensors: Tensors, side: str) -> torch.Tensor:
        device, dtype = self.backend.device, self.backend.dtype
        return torch.cat([tensors[f"{module}.{side}"].to(device, dtype) for module in self.modules])

    def live(self, name: str) -> torch.Tensor:
        module, _, side = name.rpartition(".")
        whole = self.weight() if side == "weight" else self.bias
        assert whole is not None
        row = self.rows(module)
        return whole[row : row + self.modules[module]]

    def rows(self, module: str) -> int:
        """First output of a module."""
        names = list(self.modules)
        return sum(self.modules[before] for before in names[: names.index(module)])


def _padded(x_TX: torch.Tensor, block: int) -> torch.Tensor:
    """A copy with zero rows up to the next multiple of `block`."""
    return F.pad(x_TX, (0, 0, 0, -x_TX.shape[0] % block)) if x_TX.shape[0] % block else x_TX.clone()
