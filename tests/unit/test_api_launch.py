"""How a server's resources are shared out among its replicas, and what of a request is refused before the engine."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import msgspec
import pytest

from lightning_rl.errors import ServerError
from rollout_server import cli
from rollout_server.api.config import WebConfig
from rollout_server.api.front.limits import Limits
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


def test_what_is_said_on_the_command_line_is_what_the_web_process_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits, origins, parsers and the time to drain; what is not said keeps its default."""
    made: list[RolloutServer] = []

    def remember(server: RolloutServer) -> None:
        made.append(server)
        raise KeyboardInterrupt

    monkeypatch.setattr(RolloutServer, "start", remember)
    parser = argparse.ArgumentParser()
    cli.COMMANDS["serve"][1](parser)
    said = [
        "--model",
        "tiny-llama",
        "--device",
        "cpu",
        "--log-dir",
        str(tmp_path),
        "--drain-s",
        "7",
        "--max-queue",
        "9",
    ]
    said += ["--cors-origin", "https://a", "--tool-parser", "hermes", "--request-timeout", "2.5"]
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert cli.COMMANDS["serve"][2](parser.parse_args(said)) == 130
        (server,) = made
        server.close()
        common = {"ipc_dirs": [], "model_dir": "", "parent_pid": 1, "kv_tokens": 1, "listen_fd": 0}
        config = msgspec.convert(server._web_settings | common, WebConfig)
        assert (config.drain_s, config.cors_origins, config.tool_parser) == (7, ["https://a"], "hermes")
        assert config.reasoning_parser is None
        assert config.limits == Limits(queued_requests=9, request_timeout_s=2.5)
        with pytest.raises(ServerError, match="no limit"):
            cli.COMMANDS["serve"][2](parser.parse_args([*said, "--max-queue", "0"]))
    finally:
        signal.signal(signal.SIGTERM, before)
