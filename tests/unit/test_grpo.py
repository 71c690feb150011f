import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rl.algorithms.aggregation import token_weights
from lightning_rl.algorithms.grpo import grpo_loss, metric_means
from lightning_rl.transition import group_transitions
from tests.unit.domain import make_call, make_episode

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def batch(seed=0, tokens=40, dtype=torch.float64):
    """Ratios far enough from 1 that every branch of the clip is taken."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn(tokens, generator=generator, dtype=dtype)

    logprobs = -torch.rand(tokens, generator=generator, dtype=dtype) * 3
    old = logprobs + noise(0.3)
    return logprobs, old, old + noise(0.5), noise(1.0), torch.rand(tokens, generator=generator, dtype=dtype)


@given(st.integers(0, 10_000), st.sampled_from([None, 0.5, 2.0]))
@settings(max_examples=50)
def test_the_loss_is_its_formula(seed, cap):
    logprobs, old, behaviour, advantages, weights = batch(seed)
    loss = grpo_loss(logprobs, old, behaviour, advantages, weights, **CLIP, tis_cap=cap).loss
    expected = 0.0
    for new, before, mu, a, w in zip(
        *(t.tolist() for t in (logprobs, old, behaviour, advantages, weights)), strict=True
    ):
        ratio = 2.718281828459045 ** (new - before)
        correction = 1.0 if cap is None else min(2.718281828459045 ** (before - mu), cap)
        expected -= w * correction * min(ratio * a, min(max(ratio, 0.8), 1.28) * a)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_flows_into_the_current_policy_only():
    tensors = [tensor.clone().requires_grad_() for tensor in batch()]
    logprobs, old, behaviour, advantages, weights = tensors
    grpo_loss(logprobs, old, behaviour, advantages.detach(), weights.detach(), **CLIP, tis_cap=2.0).loss.backward()
    assert logprobs.grad is not None
    assert old.grad is None
    assert behaviour.grad is None


def test_on_policy_the_gradient_is_that_of_reinforce():
    logprobs, _, _, advantages, weights = batch()
    logprobs.requires_grad_()
    old = logprobs.detach()
    grpo_loss(logprobs, old, old, advantages, weights, **CLIP, tis_cap=2.0).loss.backward()
    assert torch.allclose(logprobs.grad, -advantages * weights, rtol=1e-12)


@given(st.lists(st.integers(1, 39), max_size=5))
@settings(max_examples=30)
def test_micro_batches_add_up(cuts):
    whole = batch()
    bounds = [0, *sorted(cuts), 40]
    parts = [
        grpo_loss(*(t[start:end] for t in whole), **CLIP, tis_cap=2.0) for start, end in itertools.pairwise(bounds)
    ]
    once = grpo_loss(*whole, **CLIP, tis_cap=2.0)
    assert sum(part.loss for part in parts).item() == pytest.approx(once.loss.item(), rel=1e-12)
    for name, value in once.metrics.items():
        assert sum(part.metrics[name] for part in parts).item() == pytest.approx(value.item(), rel=1e-12)


def test_metrics():
    old = torch.tensor([0.0, 0.0, 0.0, 0.0])
    logprobs = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5]))
    behaviour = torch.log(torch.tensor([0.25, 1.0, 1.0, 1.0]))
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0])
    means = metric_means(grpo_loss(logprobs, old, behaviour, advantages, torch.ones(4), **CLIP, tis_cap=2.0).metrics)
    assert means["clip_fraction"] == 0.5
    assert means["ratio"] == pytest.approx(1.0)
    assert means["tis"] == pytest.approx((2 + 1 + 1 + 1) / 4)
    assert means["kl_old"] == pytest.approx(
        sum(r - 1 - torch.log(torch.tensor(r)).item() for r in (1.5, 1.5, 0.5, 0.5)) / 4
    )
    assert means["kl_behaviour"] > means["kl_old"]


def test_bfloat16_logprobs_are_computed_in_float32():
    logprobs, old, behaviour, advantages, weights = batch(dtype=torch.float32)
    low = logprobs.bfloat16()
    loss = grpo_loss(low, old, behaviour, advantages, weights, **CLIP, tis_cap=2.0).loss
    assert loss.dtype == torch.float32
    assert loss == grpo_loss(low.float(), old, behaviour, advantages, weights, **CLIP, tis_cap=2.0).loss


# The same batch through TRL's GRPOTrainer ----------------------------------------------------------------------------

LENGTHS = [3, 5, 2, 4, 5, 1]
MAX_LENGTH = 8


class Accelerator:
    """World size one."""

    num_processes = 1
    sync_gradients = True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x


def trl_loss(loss_type, logprobs, old, advantages, correction):
    """The loss of TRL's own method, on [6, 5] tensors padded on the right; it runs on the log-probs given."""
    from collections import defaultdict

    from trl.trainer.grpo_trainer import GRPOTrainer

    mask = torch.tensor([[float(t < length) for t in range(max(LENGTHS))] for length in LENGTHS], dtype=torch.float64)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        loss_type=loss_type,
        epsilon_low=CLIP["clip_low"],
        epsilon_high=CLIP["clip_high"],
        args=SimpleNamespace(delta=None, steps_per_generation=1),
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_LENGTH,
        accelerator=Accelerator(),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "importance_sampling_ratio": correction,
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_loss_and_gradient_are_those_of_trl(loss_type):
    generator = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    logprobs = (-3 * torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    old = logprobs.detach() + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    behaviour = old + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    normalise = "none" if loss_type == "dr_grpo" else "std"
    returns = [1.0, 0.0, 0.5, 0.0, 2.0, 0.25]  # two groups of three; the third is at its mean and has no term of ours

    transitions = []
    for start in (0, 3):
        rows = range(start, start + 3)
        group = [make_episode(f"e{i}", [make_call([1], [2] * LENGTHS[i], id=f"{i}", episode_id=f"e{i}")]) for i in rows]
        transitions += group_transitions(group, {f"{i}": returns[i] for i in rows}, normalise)
    if loss_type == "dr_grpo":  # a constant, which recipes do not offer: the loss is the same function
        weights = {t.call_id: 1 / (len(LENGTHS) * MAX_LENGTH) for t in transitions}
    else:
        weights = token_weights(transitions, "sequence" if loss_type == "grpo" else "token")

    grouped = torch.tensor(returns, dtype=torch.float64).view(2, 3)
    advantages = grouped - grouped.mean(1, keepdim=True)
    if normalise == "std":
        advantages = advantages / (grouped.std(1, keepdim=True) + 1e-4)
    theirs, their_metrics = trl_loss(
        loss_type, logprobs, old, advantages.flatten(), (old - behaviour).exp().clamp(max=2.0)
    )
    (their_gradient,) = torch.autograd.grad(theirs, logprobs)

    where = [(i, t) for i, length in enumerate(LENGTHS) for t in range(length)]
    rows, columns = map(list, zip(*where, strict=True))
    sampled = [len(t.sampled_ids) for t in transitions]
    ours = grpo_loss(
        logprobs[rows, columns],
        old[rows, columns],
        behaviour[rows, columns],
        torch.tensor([t.advantage for t in transitions], dtype=torch.float64).repeat_interleave(torch.tensor(sampled)),
        torch.tensor([weights.get(t.call_id, 0.0) for t in transitions], dtype=torch.float64).repeat_interleave(
            torch.tensor(sampled)
        ),
        **CLIP,
        tis_cap=2.0,
    )
    (our_gradient,) = torch.autograd.grad(ours.loss, logprobs)
    assert ours.loss.item() == pytest.approx(theirs.item(), rel=1e-12)
    assert torch.allclose(our_gradient, their_gradient, rtol=1e-12, atol=1e-15)
    assert our_gradient.abs().sum() > 0
    assert metric_means(ours.metrics)["clip_fraction"] == pytest.approx(their_metrics["clip_ratio/region_mean"][0])
