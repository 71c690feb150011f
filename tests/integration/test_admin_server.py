"""Weights in place, adapters, pauses, sleep and replicas on the real server with the tiny model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_rl.errors import PublishError, ServerError
from rollout_server import messages as m
from rollout_server.launch import RolloutServer
from rollout_server.models.checksum import checksum
from rollout_server.weight_sources import publish_broadcast, publish_shared_memory

IDS = list(range(20, 90))
TARGETS = ("q_proj", "v_proj")
ADAPTER: dict[str, object] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "target_modules": list(TARGETS),
}
Publish = Callable[..., AbstractContextManager[m.WeightSource]]


@pytest.fixture(scope="module", params=[1, 2])
def server(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One replica, and two."""
    with RolloutServer(
        tiny_llama,
        "tiny-llama",
        "float32",
        log_dir=tmp_path_factory.mktemp("server"),
        kv_tokens=4096,
        threads=1,
        device="cpu",
        dp=request.param,
    ) as running:
        yield running
        running.admin().stats(check=True)


@pytest.fixture(autouse=True)
def base_again(server: RolloutServer, tiny_llama: Path) -> Iterator[None]:
    yield
    server.admin().update_weights(tiny_llama, 0)


def base(tiny_llama: Path, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(tiny_llama / "model.safetensors")
    return {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}


def adapter(tiny_llama: Path, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, weight in load_file(tiny_llama / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in TARGETS:
            rows, columns = weight.shape
            made[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.2
            made[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
    return made


def write_adapter(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER))
    return directory


def client(server: RolloutServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="x", max_retries=0, timeout=60)


def sample(server: RolloutServer, *, model: str = "tiny-llama", n: int = 1, **settings: Any) -> list[Any]:
    made = client(server).completions.create(
        model=model,
        prompt=IDS,
        n=n,
        extra_body={"return_token_ids": True, "ignore_eos": True},
        **{"max_tokens": 8, "seed": 1, "logprobs": 0, **settings},
    )
    return [choice.model_extra | {"logprobs": choice.logprobs.token_logprobs} for choice in made.choices]  # type: ignore[operator,union-attr]


def receivers(server: RolloutServer) -> int:
    return sum(name.startswith("worker") for name in server.pids)


@pytest.mark.parametrize("how", ["shared memory", "broadcast"])
@pytest.mark.parametrize("config", [None, ADAPTER])
def test_weights_travel_without_files(
    server: RolloutServer, tiny_llama: Path, tmp_path: Path, how: str, config: dict[str, object] | None
) -> None:
    """Bit for bit, and the server computes what it computes with the same weights from a directory."""
    tensors = base(tiny_llama, 1) if config is None else adapter(tiny_llama, 1)
    admin = server.admin()
    (before,) = admin.score([IDS])
    published: AbstractContextManager[m.WeightSource]
    if how == "broadcast":
        published = publish_broadcast(tensors, config, receivers=receivers(server), timeout_s=60)
    else:
        published = publish_shared_memory(tensors, config)
    with published as source:
        assert admin.update_weights(source, 1, expected_checksum=checksum(tensors)) == checksum(tensors)
    (after,) = admin.score([IDS])
    if config is None:
        save_file(tensors, tmp_path / "model.safetensors")
        directory = tmp_path
    else:
        directory = write_adapter(tmp_path / "adapter", tensors)
    assert admin.update_weights(directory, 2) == checksum(tensors)
    assert admin.score([IDS])[0] == after
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1e-2


def test_what_is_rejected_changes_nothing(server: RolloutServer, tiny_llama: Path) -> None:
    admin = server.admin()
    (before,) = admin.score([IDS])
    damaged = dict(list(base(tiny_llama, 2).items())[1:])
    with pytest.raises(ServerError), publish_shared_memory(damaged) as source:
        admin.update_weights(source, 5)
    with pytest.raises(ServerError, match="broadcast"):
        admin.update_weights(
            m.Broadcast(init_method="tcp://127.0.0.1:9", world_size=9, rank=1, backend="gloo", tensors=[]), 5
        )
    assert admin.score([IDS])[0] == before
    with pytest.raises(PublishError, match="expected was nonsense"):
        admin.update_weights(tiny_llama, 0, expected_checksum="nonsense")


def test_adapters_are_served_by_name(server: RolloutServer, tiny_llama: Path, tmp_path: Path) -> None:
    """Two adapters and the policy side by side; each call's log-probs are its own model's."""
    admin = server.admin()
    admin.load_adapter("one", write_adapter(tmp_path / "one", adapter(tiny_llama, 3)))
    admin.load_adapter("two", write_adapter(tmp_path / "two", adapter(tiny_llama, 4)), version=9)
    scores = {}
    for name in ("tiny-llama", "one", "two"):
        for choice in sample(server, model=name, n=3):
            ids = choice["token_ids"]
            (scored,) = admin.score([IDS + ids], adapter="" if name == "tiny-llama" else name)
            assert choice["logprobs"] == pytest.approx(scored[len(IDS) - 1 :], abs=1e-4)
            version = {"tiny-llama": 0, "one": 1, "two": 9}[name]
            assert choice["weight_versions"] == [{"version": version, "start": 0, "end": 8}]
        (scores[name],) = admin.score([IDS], adapter="" if name == "tiny-llama" else name)
    assert scores["one"] != scores["two"] != scores["tiny-llama"] != scores["one"]
    admin.load_adapter("one", tmp_path / "two")
    assert admin.score([IDS], adapter="one")[0] == scores["two"]
    for name in ("one", "two"):
        admin.unload_adapter(name)
    with pytest.raises(openai.NotFoundError):
        sample(server, model="one")
    with pytest.raises(ServerError):
        admin.score([IDS], adapter="one")
    assert admin.score([IDS])[0] == scores["tiny-llama"]


def test_choices_of_one_request_differ_and_repeat(server: RolloutServer) -> None:
    first, second = sample(server, n=8), sample(server, n=8)
    assert [choice["token_ids"] for choice in first] == [choice["token_ids"] for choice in second]
    assert len({tuple(choice["token_ids"]) for choice in first}) > 1
    assert first[0]["token_ids"] == sample(server)[0]["token_ids"]
    assert [c["token_ids"] for c in sample(server, n=4)] == [c["token_ids"] for c in first[:4]]


def test_penalties_and_bias_reach_the_sampler(server: RolloutServer) -> None:
    (plain,) = sample(server, temperature=0, max_tokens=40)
    assert len(set(plain["token_ids"])) < 40
    (varied,) = sample(server, temperature=0, max_tokens=40, presence_penalty=2, frequency_penalty=2)
    assert len(set(varied["token_ids"])) > len(set(plain["token_ids"]))
    (forced,) = sample(server, temperature=0, logit_bias={"77": 100})
    assert forced["token_ids"] == [77] * 8


def test_a_pause_holds_what_runs_and_what_comes(server: RolloutServer) -> None:
    admin = server.admin()
    (expected,) = sample(server, max_tokens=200)
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.extend(sample(server, max_tokens=200))) for _ in range(2)]
    threads[0].start()
    time.sleep(0.1)
    admin.pause("reprefill")
    threads[1].start()
    time.sleep(0.3)
    steps = admin.stats()["steps"]
    time.sleep(0.3)
    assert admin.stats()["steps"] == steps
    admin.resume()
    for thread in threads:
        thread.join(60)
    assert [answer["token_ids"] for answer in answers] == [expected["token_ids"]] * 2


def test_an_update_aborts_what_runs_if_asked(server: RolloutServer, tiny_llama: Path) -> None:
    failures: list[openai.APIStatusError] = []

    def ask() -> None:
        try:
            sample(server, max_tokens=1900)
        except openai.APIStatusError as error:
            failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while server.admin().stats()["running"] == 0:
        time.sleep(0.01)
    server.admin().update_weights(tiny_llama, 3, running="abort")
    thread.join(60)
    assert [(error.status_code, error.code) for error in failures] == [(503, "aborted")]


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake(server: RolloutServer, level: int) -> None:
    admin = server.admin()
    (before,) = admin.score([IDS])
    (expected,) = sample(server)
    admin.sleep(level)
    admin.wake_up()
    assert admin.score([IDS])[0] == before
    assert sample(server)[0]["token_ids"] == expected["token_ids"]


def test_adapters_of_the_command_line(tiny_llama: Path, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "one", adapter(tiny_llama, 3))
    arguments: dict[str, Any] = {"log_dir": tmp_path, "kv_tokens": 1024, "threads": 1, "device": "cpu"}
    with RolloutServer(tiny_llama, "tiny-llama", "float32", **arguments, adapters={"one": directory}) as server:
        assert [entry.id for entry in client(server).models.list()] == ["tiny-llama", "one"]
    broken = RolloutServer(tiny_llama, "tiny-llama", "float32", **arguments, adapters={"one": tmp_path / "nowhere"})
    with pytest.raises(ServerError, match="nowhere"):
        broken.start()
    assert broken.pids == {}
