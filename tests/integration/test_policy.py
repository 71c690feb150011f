"""The trainer's forward and backward pass over packed rows, against plain transformers over one call at a time."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rollout_server.models.checksum import checksum
from rollout_server.models.weights import read_tensors
from tests.integration.learning import LORA, group_of_calls, packed_group, random_ids, with_active_adapter
from trainers.packing import PADDING
from trainers.policy import load_policy, row_tensors, score_sequence
from trainers.publish import policy_tensors, write_policy
from trainers.token_scores import token_scores
from trainers.tree_attention import tree_blocks


def gradients(policy):
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("lora", "temperature"), [(LORA, 1.0), (LORA, 0.7), (None, 0.7)])
def test_a_packed_row_equals_its_calls_one_by_one(tiny_llama, lora, temperature):
    """Same log-probs, entropies and gradient as transformers' own attention and log_softmax, call by call."""
    episodes = group_of_calls(temperature)
    packed = packed_group(episodes, limit=300)
    assert len(packed.rows) > 1  # the group is split, too
    policy = with_active_adapter(load_policy(tiny_llama, "float32", lora, seed=0))
    plain = with_active_adapter(load_policy(tiny_llama, "float32", lora, seed=0, attention="eager"))
    ours = {}
    for row in packed.rows:
        scores = policy(**row_tensors(row))
        (scores.logprobs * torch.tensor(row.advantages) * torch.tensor(row.weights)).sum().backward()
        for target, advantage, logprob, entropy in zip(
            row.targets, row.advantages, scores.logprobs.tolist(), scores.entropies.tolist(), strict=True
        ):
            ours.setdefault((target, advantage), []).append((logprob, entropy))
    theirs = {}
    for e, episode in enumerate(episodes):
        advantage = float(e % 3) - 0.75
        for call in episode.calls:
            ids = torch.tensor([call.prompt_ids + call.sampled_ids])
            logits = plain.causal_lm(ids).logits[0, len(call.prompt_ids) - 1 : -1] / temperature
            log_softmax = logits.log_softmax(-1)
            logprobs = log_softmax.gather(1, torch.tensor(call.sampled_ids)[:, None])[:, 0]
            entropies = -(log_softmax.exp() * log_softmax).sum(-1)
            total = sum(len(c.sampled_ids) for other in episodes for c in other.calls)
            (logprobs.sum() * advantage / total).backward()
            for target, logprob, entropy in zip(call.sampled_ids, logprobs.tolist(), entropies.tolist(), strict=True):
                theirs.setdefault((target, advantage), []).append((logprob, entropy))
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        torch.testing.assert_close(
            torch.tensor(sorted(ours[key])), torch.tensor(sorted(expected)), atol=1e-4, rtol=1e-4
        )
    expected = gradients(plain)
    actual = gradients(policy)
    assert actual.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, atol=1e-4 * largest, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_blocks_of_a_tree_cover_exactly_what_the_mask_allows():
    row = packed_group(group_of_calls()).rows[0]
    n = len(row.ids)
    seen = torch.zeros(n, n, dtype=torch.bool)
    for block in tree_blocks(row.ends):
        for number, query in enumerate(range(block.start, block.end)):
            seen[query, block.keys[block.visible[number]]] = True
    k = torch.arange(n)
    assert torch.equal(seen, (k[None] <= k[:, None]) & (k[:, None] < torch.tensor(row.ends)[None]))


def test_padding_has_a_gradient_of_zero(tiny_llama):
    policy = load_policy(tiny_llama, "float32", LORA, seed=0)
    policy(**row_tensors(PADDING)).logprobs.sum().backward()
    found = gradients(policy)
    assert len(found) == 4 * 7 * 2
    assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("loss_of", ["logprobs", "entropies", "both"])
@pytest.mark.parametrize("trains_head", [True, False])
def test_token_scores_against_log_softmax(loss_of, trains_head):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 16, generator=generator, dtype=torch.float32, requires_grad=True)
    head = torch.randn(500, 16, generator=generator, requires_grad=trains_head)
    targets = torch.randint(0, 500, (300,), generator=generator)
    temperatures = torch.rand(300, generator=generator) + 0.5
    upstream = torch.randn(2, 300, generator=generator)

    def loss(logprobs, entropies):
        parts = {"logprobs": (logprobs * upstream[0]).sum(), "entropies": (entropies * upstream[1]).sum()}
        return sum(parts.values()) if loss_of == "both" else parts[loss_of]

    logprobs, entropies = token_scores(hidden, head, targets, temperatures)
    loss(logprobs, entropies).backward()
    actual = hidden.grad.clone(), head.grad.clone() if trains_head else None
    hidden.grad = head.grad = None
    whole = ((hidden @ head.T) / temperatures[:, None]).log_softmax(-1)
    expected = whole.gather(1, targets[:, None])[:, 0], -(whole.exp() * whole).sum(-1)
    loss(*expected).backward()
    torch.testing.assert_close(logprobs, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, expected[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual[0], hidden.grad, atol=1e-4, rtol=1e-4)
    if trains_head:
        torch.testing.assert_close(actual[1], head.grad, atol=1e-4, rtol=1e-4)


def test_a_sequence_scores_as_transformers_scores_it(tiny_llama):
    policy = load_policy(tiny_llama, "float32", None, seed=0)
    ids = random_ids(200, torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)(torch.tensor([ids])).logits
    expected = logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(score_sequence(policy, ids)), expected, atol=1e-4, rtol=1e-4)


def test_a_fresh_adapter_depends_on_the_seed_alone(tiny_llama):
    first = checksum(policy_tensors(load_policy(tiny_llama, "float32", LORA, seed=1)))
    torch.rand(3)
    assert checksum(policy_tensors(load_policy(tiny_llama, "float32", LORA, seed=1))) == first
    assert checksum(policy_tensors(load_policy(tiny_llama, "float32", LORA, seed=2))) != first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_what_is_written_is_what_the_trainer_computes_with(tiny_llama, tmp_path, lora, dtype):
    """PEFT and transformers read it, and the trainer starts from it, bit for bit."""
    policy = with_active_adapter(load_policy(tiny_llama, dtype, lora, seed=0))
    out = tmp_path / "policy"
    write_policy(policy, out, tiny_llama)
    stem = "adapter_model" if lora else "model"
    expected = checksum(policy_tensors(policy))
    assert checksum(read_tensors(out, stem)) == expected
    again = load_policy(tiny_llama, dtype, lora, seed=9, start_from=out)
    assert checksum(policy_tensors(again)) == expected
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in policy.named_parameters() if p.requires_grad
    }
    if lora:
        assert json.loads((out / "adapter_config.json").read_text())["r"] == lora.rank
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=policy.causal_lm.dtype)
        plain = PeftModel.from_pretrained(base, out)
    else:
        plain = AutoModelForCausalLM.from_pretrained(out)
        assert plain.dtype == policy.causal_lm.dtype
    if dtype == "float32":
        ids = random_ids(40, torch.Generator().manual_seed(1))
        with torch.no_grad():
            logprobs = plain(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected_scores = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(score_sequence(policy, ids)), expected_scores, atol=1e-4, rtol=1e-4)
