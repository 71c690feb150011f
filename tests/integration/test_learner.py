"""The learner with all its parts: scoring pass, reference policy, critic, entropy bonus."""

import json

import pytest
import torch
from msgspec import structs

from lightning_rl.algorithms.settings import Kl, settings_of
from lightning_rl.scores import CallScores
from tests.integration.learning import (
    LORA,
    everything_sampled,
    one_rank,
    recipe_with_everything,
    rows_with_everything,
    with_active_adapter,
)
from trainers.checkpoint import TrainState, checkpoint_path
from trainers.critic import Critic
from trainers.learner import Learner, row_loss, row_scores
from trainers.packing import PADDING, rows_to_score
from trainers.policy import load_policy, row_tensors
from trainers.publish import policy_tensors, write_policy


@pytest.fixture(scope="module", autouse=True)
def _distributed():
    with one_rank():
        yield


def rows_of_calls(limit=4096):
    return rows_to_score(everything_sampled(), {f"e{e}": "g" for e in range(4)}, limit)


def test_the_gradient_does_not_depend_on_rows(tiny_llama):
    """Not of a sequence-level ratio, the KL and entropy terms, nor of the critic; and it ends at the critic's input."""
    settings = structs.replace(settings_of("gspo"), kl=Kl(estimator="k3", place="loss", coefficient=0.1), entropy=0.01)
    policy = with_active_adapter(load_policy(tiny_llama, "float32", LORA, seed=0))
    critic = Critic(policy.causal_lm.config.hidden_size, 16, seed=0)
    torch.nn.init.normal_(critic.outer.weight, generator=torch.Generator().manual_seed(0))
    module = torch.nn.ModuleDict({"policy": policy, "critic": critic})
    (whole,) = rows_of_calls()
    scores = {
        call_id: CallScores(old=[x + 1e-4 * i for i, x in enumerate(own.old)], reference=[x - 0.2 for x in own.old])
        for call_id, own in row_scores(policy, critic, None, whole).items()
    }

    def gradients(limit, value_coefficient):
        module.zero_grad()
        rows = [*rows_with_everything(scores, limit), PADDING]
        for row in rows:
            row_loss(policy(**row_tensors(row), critic=critic), row, settings, value_coefficient)[0].backward()
        return len(rows), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    one, expected = gradients(4096, 0.5)
    assert sum(bool(gradient.any()) for gradient in expected.values()) > 50
    for limit in (300, 200):
        many, actual = gradients(limit, 0.5)
        assert many > one
        for name, gradient in expected.items():
            largest = float(gradient.abs().max())
            torch.testing.assert_close(actual[name], gradient, atol=2e-4 * largest, rtol=1e-3)
    _, without = gradients(4096, 0.0)
    for name, gradient in without.items():
        assert torch.equal(gradient, expected[name]) == (not name.startswith("critic."))


@pytest.mark.parametrize(("dtype", "lora"), [("float32", LORA), ("bfloat16", None)], ids=["adapter", "full-bf16"])
def test_scores_reference_and_critic_through_steps_and_a_checkpoint(tiny_llama, tmp_path, dtype, lora):
    recipe, start = recipe_with_everything(dtype, lora), None
    if lora:  # the warm start's adapter is what the reference is, not the base
        start = tmp_path / "start"
        write_policy(with_active_adapter(load_policy(tiny_llama, dtype, lora, seed=0)), start, tiny_llama)
    learner = Learner(recipe, tiny_llama, start)
    before = learner.score([rows_of_calls()], reference=True)
    assert all(own.old == own.reference and not any(own.values) for own in before.values())
    assert {call.id: len(call.sampled_ids) for call in everything_sampled()} == {
        call_id: len(own.old) for call_id, own in before.items()
    }
    names = policy_tensors(learner.policy).keys()
    assert not any("critic" in name or "reference" in name for name in names)

    first = learner.step([rows_with_everything(before)], 1e-3)
    assert first["ratio"] == first["tokens"]  # the scores are those of the training pass, to the bit
    assert first["kl_old"] == first["kl_reference"] == 0
    assert first["agent_tokens/planner"] + first["agent_tokens/writer"] == first["tokens"]
    assert first["agent_entropy/planner"] + first["agent_entropy/writer"] == pytest.approx(first["entropy"])
    assert first["version_tokens/0"] == first["correctable"] < first["tokens"]
    assert first["version_gap/0"] == pytest.approx(first["gap"])
    assert 0 < first["value_targets"] < first["tokens"]

    learner.save(tmp_path / "checkpoints", TrainState(step=1, version=2, world_size=1), 1)
    (kept,) = (tmp_path / "checkpoints").glob("step-*/critic.pt")
    assert {tensor.dtype for tensor in torch.load(kept)["critic"].values()} == {torch.float32}
    assert "critic.pt" in json.loads(kept.with_name("files.json").read_bytes())
    second = learner.step([rows_with_everything(before)], 1e-3)
    assert second["value_loss"] < first["value_loss"]
    assert second["kl_reference"] > 0
    after = learner.score([rows_of_calls()], reference=True)
    learner.stop()
    for call_id, own in after.items():
        assert own.reference == before[call_id].reference
        assert own.old != before[call_id].old
        assert any(own.values)

    resumed = Learner(recipe, tiny_llama, start)
    resumed.load(checkpoint_path(tmp_path / "checkpoints", 1))
    assert resumed.step([rows_with_everything(before)], 1e-3) == second
    assert resumed.score([rows_of_calls()], reference=True) == after
    assert policy_tensors(resumed.policy).keys() == names
    resumed.stop()


def test_the_critic_is_clipped_apart_from_the_policy(tiny_llama):
    """However far off it is, the policy learns the same, to the bit; and a critic's step is bounded by its own clipping."""
    steps, states = [], []
    for scale in (0.0, 1e5, 1e6):
        learner = Learner(recipe_with_everything(), tiny_llama, None)
        rows = [
            structs.replace(row, value_targets=[scale * target for target in row.value_targets])
            for row in rows_with_everything(learner.score([rows_of_calls()], reference=True))
        ]
        sums = [learner.step([rows], 1e-3) for _ in range(2)]
        steps.append((learner.policy, sums))
        states.append([call.values for call in learner.score([rows_of_calls()], reference=False).values()])
        learner.stop()
    (none, nothing), (much, far), (more, further) = steps
    assert [step["gradient_norm"] for step in nothing] == [step["gradient_norm"] for step in far]
    assert nothing[0]["critic_gradient_norm"] == 0 < 1e4 < far[0]["critic_gradient_norm"]
    assert further[0]["critic_gradient_norm"] == pytest.approx(10 * far[0]["critic_gradient_norm"])
    for name, tensor in policy_tensors(none).items():
        assert torch.equal(tensor, policy_tensors(much)[name])
        assert torch.equal(tensor, policy_tensors(more)[name])
    for values, others in zip(*states[1:], strict=True):
        assert values == pytest.approx(others, rel=1e-3), "both gradients were cut to one norm"
