"""Handing a policy to a running server, and the proof that both hold the same one."""

import pytest
import torch

from lightning_rl.errors import PublishError
from rollout_server.launch import RolloutServer
from tests.integration.learning import LORA, random_ids, with_active_adapter
from trainers.policy import load_policy
from trainers.publish import DEFAULT_GAP, compare, publish

SEQUENCES = [random_ids(length, torch.Generator().manual_seed(length)) for length in (30, 75)]


@pytest.fixture(scope="module")
def server(tiny_llama, tmp_path_factory):
    logs = tmp_path_factory.mktemp("server")
    with RolloutServer(tiny_llama, "tiny-llama", "float32", log_dir=logs, kv_tokens=4096, threads=1) as running:
        yield running.admin()


def test_a_published_policy_is_the_one_that_the_server_computes_with(server, tiny_llama, tmp_path):
    policy = with_active_adapter(load_policy(tiny_llama, "float32", LORA, seed=0))
    with pytest.raises(PublishError):  # before the publish the server still holds the base model
        compare(policy, server, SEQUENCES, DEFAULT_GAP["float32"])
    publish(policy, server, tmp_path / "v00001", 1, tiny_llama)
    gap = compare(policy, server, SEQUENCES, DEFAULT_GAP["float32"])
    assert gap.tokens == sum(len(ids) - 1 for ids in SEQUENCES)
    assert gap.mean <= gap.largest < 1e-4


def test_two_that_part_are_named_with_the_tokens_where_they_do(server, tiny_llama, tmp_path):
    policy = with_active_adapter(load_policy(tiny_llama, "float32", LORA, seed=0))
    publish(policy, server, tmp_path / "v00002", 2, tiny_llama)
    with torch.no_grad():
        next(p for name, p in policy.named_parameters() if "lora_B" in name).add_(0.3)
    with pytest.raises(PublishError, match="differ by") as caught:
        compare(policy, server, SEQUENCES, DEFAULT_GAP["float32"])
    head, *rows = str(caught.value).splitlines()[1:]
    assert head.split() == ["sequence", "token", "id", "trainer", "server", "difference"]
    differences = [float(row.split()[-1]) for row in rows]
    assert differences == sorted(differences, reverse=True)
    number, position, token = (int(word) for word in rows[0].split()[:3])
    assert SEQUENCES[number][position] == token


def test_other_bits_on_the_server_are_an_error(server, tiny_llama, tmp_path):
    """A bf16 policy for an fp32 server: what it computes with is not what the trainer computes with."""
    policy = with_active_adapter(load_policy(tiny_llama, "bfloat16", LORA, seed=0))
    with pytest.raises(PublishError, match="checksum"):
        publish(policy, server, tmp_path / "v00003", 3, tiny_llama)


def test_full_weights_are_published_too(server, tiny_llama, tmp_path):
    policy = load_policy(tiny_llama, "float32", None, seed=0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.02)
    publish(policy, server, tmp_path / "v00004", 4, tiny_llama)
    assert compare(policy, server, SEQUENCES, DEFAULT_GAP["float32"]).largest < 1e-4
