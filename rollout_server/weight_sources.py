"""Weights on their way to a worker: from a directory, a shared memory block, or a broadcast; the publisher's ends too.

`open_source` is the worker's side. `publish_shared_memory` and `publish_broadcast` are the publisher's, used alike:

    with publish_broadcast(tensors, adapter_config) as source:
        server.update_weights(source, version, expected_checksum=checksum(tensors))

Every tensor arrives bit for bit, in memory of the worker's own: when `open_source` has returned, the publisher may
change or free its copy. A broadcast has a process group of its own, built directly on a store of its own: the default
group of the trainer is never touched.
"""

from __future__ import annotations

import _posixshmem  # type: ignore[import-not-found]
import contextlib
import json
import math
import mmap
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_rl.errors import ModelError, PublishError
from rollout_server import messages as m
from rollout_server.models.weights import read_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

CONNECT_TIMEOUT_S = 10.0
TRANSFER_TIMEOUT_S = 300.0
"""For all receivers to join, and again for each tensor."""

_ALIGNMENT = 64
_POLL_S = 0.01
_START = "start"

Tensors = Mapping[str, torch.Tensor]


class LoadedWeights(NamedTuple):
    tensors: dict[str, torch.Tensor]
    """Under Hugging Face's or PEFT's names: on the CPU, or on the worker's device after an `nccl` broadcast."""
    adapter_config: dict[str, object] | None
    """PEFT's `adapter_config.json`; None: the tensors are base weights."""


def open_source(source: m.WeightSource, device: torch.device | str = "cpu") -> LoadedWeights:
    """Fetch weights. `device` is where an `nccl` broadcast is received.

    Raises:
        ModelError: the source is missing, damaged, or other than it says; or the publisher does not answer.
    """
    match source:
        case m.Directory(path=path):
            return _read_directory(Path(path))
        case m.SharedMemory():
            return LoadedWeights(_read_block(source), source.adapter_config)
        case m.Broadcast():
            return LoadedWeights(_receive(source, torch.device(device)), source.adapter_config)


def tensor_specs(tensors: Tensors) -> list[m.TensorSpec]:
    """What a publisher says of its tensors; offsets are those of a shared memory block.

    Raises:
        PublishError: a dtype that does not travel.
    """
    specs, offset = [], 0
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise PublishError(f"{name} has dtype {dtype}; weights travel as {', '.join(DTYPES)}")
        specs.append(m.TensorSpec(name=name, dtype=dtype, shape=list(tensor.shape), offset=offset))
        offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return specs


# directory -----------------------------------------------------------------------------------------------------------


def _read_directory(directory: Path) -> LoadedWeights:
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such directory")
    config = directory / "adapter_config.json"
    if not config.is_file():
        return LoadedWeights(read_tensors(directory), None)
    try:
        adapter_config = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory}: adapter_config.json cannot be read: {error}") from error
    if not isinstance(adapter_config, dict):
        raise ModelError(f"{directory}: adapter_config.json holds no object")
    return LoadedWeights(read_tensors(directory, "adapter_model"), adapter_config)


# shared memory -------------------------------------------------------------------------------------------------------
# On `_posixshmem` and not on `multiprocessing.shared_memory`: up to Python 3.12 that registers a block with the resource
# tracker also where it is only attached, and so unlinks it under its owner (bpo-38119); and it gives no file descriptor
# to reserve the memory with.


@contextlib.contextmanager
def publish_shared_memory(
    tensors: Tensors, adapter_config: Mapping[str, object] | None = None
) -> Iterator[m.SharedMemory]:
    """A block that holds copies of `tensors`, gone when the context ends, however this process ends.

    Raises:
        PublishError: the host's shared memory has no room.
    """
    specs = tensor_specs(tensors)
    name = f"/lrl-{secrets.token_hex(8)}"
    size = max((spec.offset + tensors[spec.name].nbytes for spec in specs), default=0) or 1
    try:
        descriptor = _posixshmem.shm_open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode=0o600)
    except OSError as error:
        raise PublishError(
            f"this host gives no shared memory: {error.strerror}", hint="publish through a directory"
        ) from error
    resource_tracker.register(name, "shared_memory")
    try:
        with _mapped(descriptor, size) as block:
            for spec in specs:
                _view(block, spec).copy_(tensors[spec.name].detach())
        yield m.SharedMemory(
            block=name, tensors=specs, adapter_config=None if adapter_config is None else dict(adapter_config)
        )
    finally:
        _posixshmem.shm_unlink(name)
        resource_tracker.unregister(name, "shared_memory")


@contextlib.contextmanager
def _mapped(descriptor: int, size: int) -> Iterator[mmap.mmap]:
    """A new block of `size` bytes, writable. Memory is reserved first: where it lacks, a write would be a SIGBUS."""
    try:
        try:
            os.ftruncate(descriptor, size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
            block = mmap.mmap(descriptor, size)
        except OSError as error:
            raise PublishError(
                f"the host's shared memory has no room for {size} bytes of weights: {error.strerror}",
                hint="make /dev/shm larger (docker run --shm-size), or publish through a directory",
            ) from error
    finally:
        os.close(descriptor)
    with block:
        yield block


def _read_block(source: m.SharedMemory) -> dict[str, torch.Tensor]:
    try:
        descriptor = _posixshmem.shm_open(source.block, os.O_RDONLY, mode=0o600)
    except (OSError, ValueError) as error:
        raise ModelError(f"shared memory {source.block!r} cannot be opened: {error}") from error
    try:
        size = os.fstat(descriptor).st_size
        needed = max((spec.offset + _nbytes(spec) for spec in _checked(source.tensors)), default=0)
        if size < needed:
            raise ModelError(f"shared memory {source.block!r} has {size} bytes, its tensors need {needed}")
        with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) as block:
            return {spec.name: _view(block, spec).clone() for spec in source.tensors}
    except OSError as error:
        raise ModelError(f"shared memory {source.block!r} cannot be mapped: {error}") from error
    finally:
        os.close(descriptor)


def _view(block: mmap.mmap, spec: m.TensorSpec) -> torch.Tensor:
    """The tensor in place. It must be gone before the mapping is closed."""
    dtype = DTYPES[spec.dtype]
    count = math.prod(spec.shape)
    if count == 0:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(block, dtype=dtype, count=count, offset=spec.offset).view(spec.shape)


# broadcast -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def publish_broadcast(
    tensors: Tensors,
    adapter_config: Mapping[str, object] | None = None,
    *,
    receivers: int = 1,
    host: str = "127.0.0.1",
    backend: str = "gloo",
    timeout_s: float = TRANSFER_TIMEOUT_S,
) -> Iterator[m.Broadcast]:
    """Listen on `host`, and send in the background as soon as all `receivers` (a server has one a replica) have joined.

    The source is for the first receiver, rank 1. With `nccl` the tensors are on this process's GPU.

    Raises:
        PublishError: at the end, when the receivers did not get everything.
    """
    specs = tensor_specs(tensors)
    _group_class(backend, PublishError)
    wait = timedelta(seconds=timeout_s)
    with socket.create_server((host, 0), family=_family(host)) as listener:
        port = listener.getsockname()[1]
        store = TCPStore(
            host, port, None, True, wait, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno())
        )
    source = m.Broadcast(
        init_method=f"tcp://{f'[{host}]' if ':' in host else host}:{port}",
        world_size=1 + receivers,
        rank=1,
        backend=backend,
        tensors=specs,
        adapter_config=None if adapter_config is None else dict(adapter_config),
    )
    sender = _Sender(store, source, tensors, host, timeout_s)
    sender.start()
    try:
        yield source
    except BaseException:
        sender.given_up.set()
        sender.join(1.0)
        raise
    sender.join()
    if sender.failure is not None:
        raise PublishError(f"the broadcast to {receivers} receivers failed: {sender.failure}") from sender.failure


class _Sender(threading.Thread):
    def __init__(self, store: Any, source: m.Broadcast, tensors: Tensors, host: str, timeout_s: float) -> None:
        super().__init__(name="broadcast", daemon=True)
        self._store: Any = store
        self._source = source
        self._tensors = tensors
        self._host = host
        self._timeout_s = timeout_s
        self.given_up = threading.Event()
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            self._wait_for("joined")
            self._store.set(_START, "1")
            group = _group(self._store, 0, self._source, self._host, self._timeout_s)
            for spec in self._source.tensors:
                _broadcast(group, _bytes(self._tensors[spec.name], self._source.backend))
            self._wait_for("done")
        except (TimeoutError, RuntimeError) as failure:  # RuntimeError is torch.distributed's
            self.failure = failure
        finally:
            self._store = None  # receivers that still wait see the line break

    def _wait_for(self, what: str) -> None:
        keys = [f"{what}/{rank}" for rank in range(1, self._source.world_size)]
        deadline = time.monotonic() + self._timeout_s
        while not self._store.check(keys):
            if self.given_up.wait(_POLL_S):
                raise TimeoutError("the publisher gave up")
            if time.monotonic() > deadline:
                missing = [key for key in keys if not self._store.check([key])]
                raise TimeoutError(f"after {self._timeout_s:.0f} s these are missing: {', '.join(missing)}")


def _receive(source: m.Broadcast, device: torch.device) -> dict[str, torch.Tensor]:
    specs = _checked(source.tensors)
    if not 1 <= source.rank < source.world_size:
        raise ModelError(
            f"rank {source.rank} cannot receive in a group of {source.world_size}: the publisher is rank 0"
        )
    _group_class(source.backend, ModelError)
    place = device if source.backend == "nccl" else torch.device("cpu")
    address = urlsplit(source.init_method)
    if address.scheme != "tcp" or not address.hostname or not address.port:
        raise ModelError(f"init_method {source.init_method!r} is not of the form tcp://HOST:PORT")
    try:
        with socket.create_connection((address.hostname, address.port), CONNECT_TIMEOUT_S) as line:
            own = line.getsockname()[0]
        wait = timedelta(seconds=TRANSFER_TIMEOUT_S)
        store = TCPStore(address.hostname, address.port, None, False, wait, wait_for_workers=False)
        store.set(f"joined/{source.rank}", "1")
        store.wait([_START], wait)
        group = _group(store, source.rank, source, own, TRANSFER_TIMEOUT_S)
        tensors = {spec.name: torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=place) for spec in specs}
        for tensor in tensors.values():
            _broadcast(group, _bytes(tensor, source.backend))
        store.set(f"done/{source.rank}", "1")
    except (OSError, RuntimeError) as error:  # RuntimeError is torch.distributed's
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"the broadcast from {source.init_method} failed: {reason}") from error
    return tensors


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _group_class(backend: str, kind: type[ModelError] | type[PublishError]) -> Any:
    classes = {"gloo": "ProcessGroupGloo", "nccl": "ProcessGroupNCCL"}
    if backend not in classes:
        raise kind(f"a broadcast's backend is one of {', '.join(classes)}, not {backend!r}")
    found = getattr(dist, classes[backend], None)
    if found is None:
        raise kind(f"this build of torch has no {backend}", hint="use gloo, or a build of torch that has it")
    return found


def _group(store: Any, rank: int, source: m.Broadcast, own_address: str, timeout_s: float) -> Any:
    """A process group outside torch's registry; it is destroyed with its last reference."""
    kind = _group_class(source.backend, ModelError)
    options = kind.Options() if source.backend == "nccl" else kind._Options()
    options._timeout = timedelta(seconds=timeout_s)
    if source.backend == "gloo":
        options._devices = [kind.create_device(hostname=own_address)]
    return kind(store, rank, source.world_size, options)


def _broadcast(group: Any, data: torch.Tensor) -> None:
    if data.numel() == 0:
        return
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([data], options).wait()
    if data.is_cuda:
        torch.cuda.synchronize(data.device)


def _bytes(tensor: torch.Tensor, backend: str) -> torch.Tensor:
    """The tensor's bytes, uint8 [n], where the backend takes them: bits travel, numbers are not looked at."""
    tensor = tensor.detach() if backend == "nccl" else tensor.detach().cpu()
    return tensor.contiguous().view(-1).view(torch.uint8)


# what specs promise --------------------------------------------------------------------------------------------------


def _nbytes(spec: m.TensorSpec) -> int:
    return math.prod(spec.shape) * DTYPES[spec.dtype].itemsize


def _checked(specs: Sequence[m.TensorSpec]) -> Sequence[m.TensorSpec]:
    """Raises ModelError unless the specs describe tensors."""
    for spec in specs:
        if spec.dtype not in DTYPES:
            raise ModelError(f"{spec.name}: weights travel as {', '.join(DTYPES)}, not as {spec.dtype!r}")
        if spec.offset < 0 or any(side < 0 for side in spec.shape):
            raise ModelError(f"{spec.name}: shape {spec.shape} at offset {spec.offset} is no tensor's")
        if spec.offset % DTYPES[spec.dtype].itemsize:
            raise ModelError(f"{spec.name}: offset {spec.offset} is not aligned to {spec.dtype}")
    if len({spec.name for spec in specs}) < len(specs):
        raise ModelError("two tensors have the same name")
    return specs
