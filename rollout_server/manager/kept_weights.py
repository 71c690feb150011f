"""What a new worker must load to hold the weights that the last one held.

Files are linked into a private directory as soon as the worker has loaded them (copied where they cannot be linked), and the
bytes of an adapter from shared memory are written there, so that a publisher may delete its own. Base weights out of shared
memory, and whatever was broadcast, are not kept: after a restart they are lost, and so is what comes back with another
checksum. Only files and checksums here, no tensors and no torch.
"""

from __future__ import annotations

import _posixshmem  # type: ignore[import-not-found]
import json
import logging
import mmap
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rollout_server import messages as m
from rollout_server.manager.control import is_base

log = logging.getLogger("lrl.manager")

COPIED_BYTES = 2**30
"""More than this is not copied, which would take the manager seconds: it is read from the publisher's own files again."""

Name = str | None
"""An adapter (`""` is the policy's own), or None for the base."""

_FORMAT_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Kept(NamedTuple):
    source: m.WeightSource | None
    """Where to load it from again; None: it cannot be."""
    version: int
    checksum: str
    directory: Path | None
    """Ours, to be removed with it."""


class KeptWeights:
    def __init__(self, directory: Path, base_checksum: str) -> None:
        """`base_checksum` is that of the base weights that every worker starts with."""
        self._directory, self._base_checksum = directory, base_checksum
        self._kept: dict[Name, Kept] = {}
        self._serial = 0
        self.lost: set[Name] = set()
        """What the worker should hold and does not."""

    def loaded(self, source: m.WeightSource, adapter: str, version: int, checksum: str) -> None:
        """The worker has loaded it: remember how to do that again, and forget what it replaces."""
        name = None if is_base(source) else adapter
        source_again, directory = self._keep(source)
        if name is None:
            self._forget("")
        self._forget(name)
        self._kept[name] = Kept(source_again, version, checksum, directory)

    def unloaded(self, adapter: str) -> None:
        self._forget(adapter)

    def is_lost(self, adapter: str) -> bool:
        """Whether requests to this adapter would be answered with other weights than they ask for."""
        return bool(self.lost) and (None in self.lost or adapter in self.lost)

    def checksums(self) -> dict[str, str]:
        """As `messages.Stats` has them."""
        held = {None: self._base_checksum} | {name: kept.checksum for name, kept in self._kept.items()}
        return {
            "base" if name is None else f"adapter/{name}": checksum
            for name, checksum in held.items()
            if name not in self.lost
        }

    def begin(self, base_checksum: str) -> list[tuple[Name, m.Load]]:
        """A new worker is there, with base weights of this checksum: what it must load, in this order."""
        self.lost = {name for name, kept in self._kept.items() if kept.source is None}
        if None not in self._kept and base_checksum != self._base_checksum:
            log.error("the checkpoint on disk is no longer the one that was served")
            self.lost.add(None)
        names = sorted(self._kept, key=lambda name: name is not None)
        return [
            (name, m.Load(source=kept.source, version=kept.version, adapter=name or ""))
            for name in names
            if (kept := self._kept[name]).source is not None
        ]

    def repeated(self, name: Name, result: m.Loaded) -> None:
        """One of `begin`'s has been loaded, or refused."""
        if result.error is None and result.checksum == self._kept[name].checksum:
            return
        what = "the base weights" if name is None else f"adapter {name!r}"
        log.error("%s cannot be loaded again: %s", what, result.error or "the files have changed")
        self.lost.add(name)

    def _forget(self, name: Name) -> None:
        self.lost.discard(name)
        kept = self._kept.pop(name, None)
        if kept is not None and kept.directory is not None:
            shutil.rmtree(kept.directory, ignore_errors=True)

    def _keep(self, source: m.WeightSource) -> tuple[m.WeightSource | None, Path | None]:
        if isinstance(source, m.Broadcast) or (isinstance(source, m.SharedMemory) and source.adapter_config is None):
            return None, None
        self._serial += 1
        own = self._directory / str(self._serial)
        try:
            own.mkdir(mode=0o700, parents=True)
            if isinstance(source, m.SharedMemory):
                assert source.adapter_config is not None
                write_block(source, source.adapter_config, own)
            else:
                link_weights(Path(source.path), own)
        except (OSError, ValueError) as error:
            shutil.rmtree(own, ignore_errors=True)
            log.warning("the weights cannot be kept for a restart, which depends on the publisher's own: %s", error)
            return (source if isinstance(source, m.Directory) else None), None
        return m.Directory(path=str(own)), own


def link_weights(source: Path, target: Path) -> None:
    """The weights' files of a directory under a second name. Raises OSError where they can be neither linked nor copied."""
    weights = {file.name: file.resolve() for file in source.glob("*.safetensors")}
    for name, file in weights.items():
        try:
            os.link(file, target / name)
        except OSError:
            if sum(other.stat().st_size for other in weights.values()) > COPIED_BYTES:
                raise
            shutil.copyfile(file, target / name)
    for file in [source / "adapter_config.json", *source.glob("*.safetensors.index.json")]:
        if file.is_file():
            shutil.copyfile(file, target / file.name)


def write_block(source: m.SharedMemory, adapter_config: Mapping[str, object], target: Path) -> None:
    """A shared memory block's adapter as PEFT would have saved it. Raises OSError."""
    header: dict[str, object] = {}
    end = 0
    for spec in source.tensors:
        size = _size(spec)
        header[spec.name] = {
            "dtype": _FORMAT_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [end, end + size],
        }
        end += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    descriptor = _posixshmem.shm_open(source.block, os.O_RDONLY, mode=0o600)
    try:
        with (
            mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as block,
            (target / "adapter_model.safetensors").open("wb") as file,
        ):
            file.write(len(head).to_bytes(8, "little") + head)
            for spec in source.tensors:
                file.write(block[spec.offset : spec.offset + _size(spec)])
    finally:
        os.close(descriptor)
    (target / "adapter_config.json").write_text(json.dumps(adapter_config))


def _size(spec: m.TensorSpec) -> int:
    size = _ITEM_BYTES[spec.dtype]
    for length in spec.shape:
        size *= length
    return size
