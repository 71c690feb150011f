"""How a server's resources are shared out among its replicas, and what of a request is refused before the engine."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from lightning_rl.errors import ServerError
from rollout_server import cli
from rollout_server.launch import RolloutServer, replica_devices, threads_of_each


def test_threads_are_shared_out() -> None:
    assert threads_of_each(None, 1) is None
    assert threads_of_each(8, 1) == 8
    assert threads_of_each(8, 3) == 2
    assert threads_of_each(1, 4) == 1
    assert (threads_of_each(None, 2) or 0) >= 1


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert replica_devices("cuda:3", 1) == ["cuda:3"]
    assert replica_devices("cpu", 2) == ["cpu", "cpu"]
    for gpus, device, expected in ((0, "auto", ["cpu"] * 2), (2, "auto", ["cuda:0", "cuda:1"]), (4, "cuda", None)):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert replica_devices(device, 2) == (expected or ["cuda:0", "cuda:1"])
    for gpus, device, dp, what in ((1, "auto", 2, "has 1"), (0, "cuda", 2, "has 0"), (4, "cuda:1", 2, "one device")):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        with pytest.raises(ServerError, match=what):
            replica_devices(device, dp)
    with pytest.raises(ServerError, match="0 replicas"):
        replica_devices("cpu", 0)


def test_each_replica_has_a_directory_and_settings_of_its_own(tmp_path: Path) -> None:
    server = RolloutServer(
        tmp_path, "m", "float32", log_dir=tmp_path, device="cpu", dp=2, threads=4, host_kv_dir=tmp_path / "kv"
    )
    one, two = server._engines
    assert one.ipc_dir != two.ipc_dir
    assert one.host_kv_dir != two.host_kv_dir
    assert one.threads == two.threads == 2
    server.close()
    assert not Path(one.ipc_dir).parent.exists()


def test_adapters_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    cli.COMMANDS["serve"][1](parser)
    parsed = parser.parse_args(["--model", "m", "--adapter", "a=/x", "--adapter", "b=/y=z", "--dp", "2"])
    assert (parsed.adapter, parsed.dp) == ([("a", Path("/x")), ("b", Path("/y=z"))], 2)
    for wrong in ("a", "=x", "a="):
        with pytest.raises(SystemExit):
            parser.parse_args(["--model", "m", "--adapter", wrong])
        assert "NAME=PATH" in capsys.readouterr().err
