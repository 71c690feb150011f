"""Weights arrive bit for bit from each source, in a process of their own, and what is wrong with one is said."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightning_rl.errors import ModelError, PublishError
from rollout_server import messages as m
from rollout_server.models.checksum import checksum
from rollout_server.weight_sources import open_source, publish_broadcast, publish_shared_memory

ROOT = Path(__file__).resolve().parents[2]
ADAPTER: dict[str, object] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
RECEIVER = """
import sys, msgspec
from rollout_server import messages as m
from rollout_server.models.checksum import checksum
from rollout_server.weight_sources import open_source
source = msgspec.json.decode(sys.stdin.read(), type=m.WeightSource)
try:
    loaded = open_source(source)
    print(checksum(loaded.tensors), loaded.adapter_config)
except Exception as error:
    print(type(error).__name__, error)
"""


def receiving(source: m.WeightSource) -> subprocess.Popen[str]:
    """A second process that opens the source and says what it got."""
    process = subprocess.Popen(
        [sys.executable, "-c", RECEIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(source).decode())
    process.stdin.close()
    process.stdin = None
    return process


def said(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert "resource_tracker" not in err, err
    return out.strip()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Odd sizes, all dtypes, no tensor contiguous with the next; every bit pattern of bf16, NaNs included."""
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    return {
        "model.embed": every,
        "model.a.weight": torch.randn(7, 5, generator=generator),
        "model.b.weight": torch.randn(5, 3, generator=generator).to(torch.bfloat16).T,
        "model.c.bias": torch.randn(1, generator=generator).to(torch.float16),
        "model.scalar": torch.tensor(3.5),
        "model.none": torch.empty(0, 4),
    }


@pytest.mark.parametrize("config", [None, ADAPTER])
def test_a_directory(tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, object] | None) -> None:
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, tmp_path / ("model.safetensors" if config is None else "adapter_model.safetensors"))
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = open_source(m.Directory(path=str(tmp_path)))
    assert checksum(loaded.tensors) == checksum(tensors)
    assert loaded.adapter_config == config


@pytest.mark.parametrize("config", [None, ADAPTER])
def test_shared_memory(tensors: dict[str, torch.Tensor], config: dict[str, object] | None) -> None:
    with publish_shared_memory(tensors, config) as source:
        for _ in range(2):  # a receiver that ends does not take the block with it
            assert said(receiving(source)) == f"{checksum(tensors)} {config}"
    with pytest.raises(ModelError, match="cannot be opened"):
        open_source(source)


def test_what_arrived_is_the_receivers_own(tensors: dict[str, torch.Tensor]) -> None:
    expected = checksum(tensors)
    with publish_shared_memory(tensors) as source:
        loaded = open_source(source)
        for tensor in tensors.values():
            tensor.zero_()
    assert checksum(loaded.tensors) == expected


def test_a_killed_publisher_leaves_no_block() -> None:
    code = (
        "import time, torch\nfrom rollout_server.weight_sources import publish_shared_memory\n"
        "with publish_shared_memory({'w': torch.ones(9)}) as source:\n print(source.block, flush=True)\n time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    source = m.SharedMemory(block=process.stdout.readline().strip(), tensors=[])
    open_source(source)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    process.stdout.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            open_source(source)
        except ModelError:
            return
        time.sleep(0.05)
    pytest.fail("the block is still there")


@pytest.mark.parametrize("receivers", [1, 2])
def test_broadcast(tensors: dict[str, torch.Tensor], receivers: int) -> None:
    """The publisher's default process group, the trainer's, is what it was before."""
    made_here = not dist.is_initialized()  # other tests of this process may have left one: it will do as well
    if made_here:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        before = dist.group.WORLD
        with publish_broadcast(tensors, ADAPTER, receivers=receivers, timeout_s=60) as source:
            ranks = [msgspec.structs.replace(source, rank=1 + number) for number in range(receivers)]
            answers = [said(process) for process in [receiving(rank) for rank in ranks]]
        assert answers == [f"{checksum(tensors)} {ADAPTER}"] * receivers
        assert dist.group.WORLD is before
        ours = torch.ones(2)
        dist.all_reduce(ours)
        assert ours.tolist() == [1.0, 1.0]
    finally:
        if made_here:
            dist.destroy_process_group()


def test_broadcasts_follow_each_other_in_one_process(tensors: dict[str, torch.Tensor]) -> None:
    for shift in range(3):
        sent = {name: tensor + shift for name, tensor in tensors.items()}
        with publish_broadcast(sent, timeout_s=60) as source:
            assert checksum(open_source(source).tensors) == checksum(sent)


def test_a_publisher_that_gives_up_frees_those_who_wait(tensors: dict[str, torch.Tensor]) -> None:
    started = time.monotonic()
    failures: list[ModelError] = []

    def receive(source: m.Broadcast) -> None:
        with pytest.raises(ModelError) as caught:
            open_source(source)
        failures.append(caught.value)

    with contextlib.suppress(ZeroDivisionError), publish_broadcast(tensors, receivers=2) as source:
        thread = threading.Thread(target=receive, args=(source,))
        thread.start()
        time.sleep(0.5)
        raise ZeroDivisionError
    thread.join(60)
    assert len(failures) == 1
    assert "broadcast" in str(failures[0])
    assert time.monotonic() - started < 60


def test_receivers_that_never_come_are_named(tensors: dict[str, torch.Tensor]) -> None:
    with (
        pytest.raises(PublishError, match="joined/1, joined/2"),
        publish_broadcast(tensors, receivers=2, timeout_s=0.2),
    ):
        pass


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    source = m.Broadcast(init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=1, backend="gloo", tensors=[])
    with pytest.raises(ModelError, match="refused"):
        open_source(source)


def spec(**changes: object) -> m.TensorSpec:
    return msgspec.structs.replace(m.TensorSpec(name="w", dtype="float32", shape=[2]), **changes)


def broadcast(**changes: object) -> m.Broadcast:
    source = m.Broadcast(init_method="tcp://127.0.0.1:1", world_size=2, rank=1, backend="gloo", tensors=[spec()])
    return msgspec.structs.replace(source, **changes)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (m.Directory(path="/nowhere/at/all"), "no such directory"),
        (m.SharedMemory(block="/lrl-nowhere", tensors=[]), "cannot be opened"),
        (broadcast(rank=0), "rank 0"),
        (broadcast(rank=2), "rank 2"),
        (broadcast(backend="smoke"), "gloo, nccl"),
        (broadcast(init_method="file:///x"), "tcp://HOST:PORT"),
        (broadcast(tensors=[spec(dtype="int8")]), "int8"),
        (broadcast(tensors=[spec(shape=[-1])]), "no tensor"),
        (broadcast(tensors=[spec(), spec()]), "same name"),
    ],
)
def test_what_is_wrong_is_said(source: m.WeightSource, what: str) -> None:
    with pytest.raises(ModelError, match=what):
        open_source(source)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_adapter_directory(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        open_source(m.Directory(path=str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="cannot be read"):
        open_source(m.Directory(path=str(tmp_path)))


@pytest.mark.parametrize("bad", [spec(shape=[1000]), spec(offset=64), spec(offset=-4), spec(offset=2)])
def test_a_block_other_than_it_says(bad: m.TensorSpec) -> None:
    with publish_shared_memory({"w": torch.ones(2)}) as source, pytest.raises(ModelError):
        open_source(msgspec.structs.replace(source, tensors=[bad]))


def test_dtypes_that_do_not_travel() -> None:
    with pytest.raises(PublishError, match="int64"), publish_shared_memory({"w": torch.ones(2, dtype=torch.int64)}):
        pass


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), min_size=6, max_size=6),
    seed=st.integers(0, 100),
)
def test_any_shapes_through_shared_memory(shapes: Sequence[list[int]], dtypes: list[torch.dtype], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sent = {
        f"w{at}": torch.randn(shape, generator=generator).to(dtype)
        for at, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    with publish_shared_memory(sent) as source:
        got = open_source(source).tensors
    assert list(got) == list(sent)
    assert checksum(got) == checksum(sent)
