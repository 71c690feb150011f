"""Many LoRA adapters over one base model, mixed in one batch (after S-LoRA, Sheng et al., 2024).

Adapters are kept by name; "" is the policy's own. They are applied unmerged, as the trainer applies them, so that both
sides round alike. An adapter is checked whole before anything changes, and a change touches no other adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from lightning_rl.errors import ModelError
from rollout_server.kernels.interface import AdapterSpan, Lora
from rollout_server.models.linear import Spans, Stacked
from rollout_server.models.parameter import Backend, TensorMap, map_packed
from rollout_server.models.weights import AdapterWeights, LiveTensors


class LayerSpans(NamedTuple):
    """Which tokens use which adapter, for each linear map of a layer."""

    qkv: Spans = ()
    out: Spans = ()
    gate_up: Spans = ()
    down: Spans = ()


class LayerLinears(NamedTuple):
    """The linear maps of a layer that adapters may change; None: the layer has experts instead."""

    qkv: Stacked
    out: Stacked
    gate_up: Stacked | None
    down: Stacked | None


class Share(NamedTuple):
    """What one adapter adds to one linear map."""

    lora: Lora
    modules: list[str]
    """Which of the modules stacked there it changes, in their order: each has `rank` columns of the adapter."""


class Adapter(NamedTuple):
    rank: int
    shares: list[Share | None]
    """Four a layer, in the order of `LayerLinears`."""
    loras: list[Lora | None]
    """Those of `shares`."""


class Adapters:
    def __init__(self, backend: Backend, layers: Sequence[LayerLinears], limit: int) -> None:
        self._backend, self._limit = backend, limit
        self._linears = [linear for linears in layers for linear in linears]
        self._loaded: dict[str, Adapter] = {}
        self._plain: Sequence[LayerSpans] = [LayerSpans()] * len(layers)
        self._wanted: Sequence[AdapterSpan] = []
        self._spans: Sequence[LayerSpans] = self._plain

    def __contains__(self, name: str) -> bool:
        return name in self._loaded

    def set(self, name: str, weights: AdapterWeights | None) -> None:
        """Load an adapter, replace the one of that name, or remove it (None; no error where there is none).

        Raises:
            ModelError: it fits the model's linear maps nowhere or only in part, or there are too many. Nothing has changed.
        """
        if weights is None:
            self._loaded.pop(name, None)
        else:
            if name not in self._loaded and len(self._loaded) >= self._limit:
                raise ModelError(
                    f"adapter {name!r}: {self._limit} adapters are loaded, which is the limit",
                    hint="unload one, or start the server with a higher max_adapters",
                )
            self._check(weights)
            self._loaded[name] = _adapter(weights.rank, [self._share(linear, weights) for linear in self._linears])
        self._wanted, self._spans = [], self._plain

    def spans(self, wanted: Sequence[AdapterSpan]) -> Sequence[LayerSpans]:
        """The spans of a pass, for each layer. Tokens of "" are plain while the policy has no adapter of its own.

        Raises ModelError for the name of an adapter that is not loaded.
        """
        if not wanted:
            return self._plain
        if wanted != self._wanted:  # passes that only decode want the same again and again
            self._spans = self._resolve(wanted)
            self._wanted = list(wanted)
        return self._spans

    def export(self, name: str) -> LiveTensors:
        """The live tensors of an adapter under PEFT's names. Raises ModelError when it is not loaded."""
        adapter = self._get(name)
        readers: dict[str, Callable[[], torch.Tensor]] = {}
        for share, linear in zip(adapter.shares, self._linears, strict=True):
            if share is None or linear is None:
                continue
            for at, module in enumerate(share.modules):
                columns = slice(at * adapter.rank, (at + 1) * adapter.rank)
                row = linear.rows(module)
                rows = slice(row, row + linear.modules[module])
                prefix = f"base_model.model.{module}"
                down, up, _ = share.lora
                readers[f"{prefix}.lora_A.weight"] = partial(self._read, down, (columns,))
                readers[f"{prefix}.lora_B.weight"] = partial(self._read, up, (rows, columns))
        return LiveTensors(readers)

    def map_tensors(self, fn: TensorMap) -> None:
        for name, adapter in self._loaded.items():
            shares = [None if share is None else _map_share(share, fn) for share in adapter.shares]
            self._loaded[name] = _adapter(adapter.rank, shares)
        self._wanted, self._spans = [], self._plain

    def _resolve(self, wanted: Sequence[AdapterSpan]) -> list[LayerSpans]:
        """At 64 spans of 120 linear maps this is Python that a pass waits for: columns of them are built at once."""
        found = [span for span in wanted if span.name or span.name in self._loaded]
        starts, ends = [span.start for span in found], [span.end for span in found]
        columns = zip(*(self._get(span.name).loras for span in found), strict=True)
        spans: list[Spans] = [
            [(start, end, lora) for start, end, lora in zip(starts, ends, column, strict=True) if lora is not None]
            if None in column
            else list(zip(starts, ends, column, strict=True))
            for column in columns
        ]
        return [LayerSpans(*spans[at : at + 4]) for at in range(0, len(self._linears), 4)]

    def _get(self, name: str) -> Adapter:
        if name not in self._loaded:
            raise ModelError(f"no adapter {name!r} is loaded", hint="load it before requests name it")
        return self._loaded[name]

    def _read(self, packed: object, part: tuple[slice, ...]) -> torch.Tensor:
        return self._backend.kernels.unpack(packed)[part]

    def _check(self, weights: AdapterWeights) -> None:
        known = {
            module: (linear, outputs)
            for linear in self._linears
            if linear is not None
            for module, outputs in linear.modules.items()
        }
        if not weights.modules:
            raise ModelError("the adapter has no tensors")
        for module, pair in weights.modules.items():
            if module not in known:
                experts = ".mlp.experts" in module or module.endswith(".mlp.gate")
                raise ModelError(
                    f"the adapter changes {module}, which "
                    + (
                        "belongs to experts or their router: LoRA there is not served"
                        if experts
                        else "is not in the model"
                    ),
                    hint="train adapters of q_proj, k_proj, v_proj, o_proj (and of dense gate_proj, up_proj, down_proj)",
                )
            if pair.keys() != {"A", "B"}:
                raise ModelError(f"the adapter has only lora_{'B' if 'B' in pair else 'A'} of {module}")
            linear, outputs = known[module]
            for side, shape in (("A", (weights.rank, linear.inputs)), ("B", (outputs, weights.rank))):
                if tuple(pair[side].shape) != shape:
                    raise ModelError(
                        f"lora_{side} of {module} has shape {tuple(pair[side].shape)}, it should be {shape}"
                    )

    def _share(self, linear: Stacked | None, weights: AdapterWeights) -> Share | None:
        """Adapters of stacked modules as one: A [ranks, X] stacked, B [N, ranks] block-diagonal."""
        if linear is None:
            return None
        modules = [module for module in linear.modules if module in weights.modules]
        if not modules:
            return None
        kernels, dtype, device, _ = self._backend
        down = torch.cat([weights.modules[module]["A"].to(device, dtype) for module in modules])
        up = torch.zeros(sum(linear.modules.values()), len(down), dtype=dtype, device=device)
        for at, module in enumerate(modules):
            row = linear.rows(module)
            up[row : row + linear.modules[module], at * weights.rank : (at + 1) * weights.rank] = weights.modules[
                module
            ]["B"]
        return Share(Lora(kernels.pack(down), kernels.pack(up), weights.scale), modules)


def _adapter(rank: int, shares: list[Share | None]) -> Adapter:
    return Adapter(rank, shares, [None if share is None else share.lora for share in shares])


def _map_share(share: Share, fn: TensorMap) -> Share:
    down, up, scale = share.lora
    return Share(Lora(map_packed(down, fn), map_packed(up, fn), scale), share.modules)
