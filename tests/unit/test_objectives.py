import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.algorithms import kl
from lightning_rl.algorithms.correction import BOUNDS, correction, corrections
from lightning_rl.algorithms.kl import penalties
from lightning_rl.algorithms.objective import TokenBatch, objective_loss
from lightning_rl.algorithms.settings import OBJECTIVES, Kl, settings_of

EVERY = pytest.mark.parametrize("name", OBJECTIVES)


def batch(seed=0, lengths=(3, 1, 7, 5, 4, 6), dtype=torch.float64, spread=0.3):
    """Calls of those lengths, with ratios far enough from 1 that every branch of a clip is taken."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)

    def noise(scale):
        return scale * torch.randn(tokens, generator=generator, dtype=dtype)

    logprobs = -torch.rand(tokens, generator=generator, dtype=dtype) * 3
    old = logprobs + noise(spread)
    return TokenBatch(
        logprobs=logprobs,
        entropies=noise(1.0).abs(),
        old=old,
        behaviour=old + noise(2 * spread),
        advantages=noise(1.0),
        weights=torch.rand(tokens, generator=generator, dtype=dtype),
        sequences=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        correctable=torch.rand(tokens, generator=generator) > 0.2,
        reference=logprobs + noise(spread),
    )


def gradient(one, objective):
    logprobs = one.logprobs.clone().requires_grad_()
    result = objective_loss(one._replace(logprobs=logprobs), objective)
    return torch.autograd.grad(result.loss, logprobs)[0]


@EVERY
def test_a_name_is_a_complete_setting(name):
    assert settings_of(name).name == name


def test_an_objective_is_looked_up_without_torch():
    code = (
        "import sys; from lightning_rl.algorithms.settings import OBJECTIVES, settings_of; "
        "[settings_of(name) for name in OBJECTIVES]; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@EVERY
def test_on_policy_the_gradient_is_that_of_reinforce(name):
    one = batch()
    one = one._replace(old=one.logprobs, behaviour=one.logprobs, reference=one.logprobs)
    assert torch.allclose(gradient(one, settings_of(name)), -one.advantages * one.weights, rtol=1e-12)


@EVERY
@pytest.mark.parametrize(("kind", "level"), [("truncate", "token"), ("mask", "sequence"), ("sequence_mask", "token")])
def test_micro_batches_of_whole_calls_add_up(name, kind, level):
    lengths = (3, 1, 7, 5, 4, 6)
    whole = batch(3, lengths)
    objective = structs.replace(settings_of(name), correction=correction(kind, level), entropy=0.01)
    once = objective_loss(whole, objective)
    ends = [0, *itertools.accumulate(lengths)]
    parts = []
    for first, last in [(0, 2), (2, 3), (3, 6)]:
        cut = [None if t is None else t[ends[first] : ends[last]] for t in whole]
        part = TokenBatch(*cut)
        parts.append(objective_loss(part._replace(sequences=part.sequences - first), objective))
    assert sum(part.loss for part in parts).item() == pytest.approx(once.loss.item(), rel=1e-12)
    assert {name for part in parts for name in part.metrics} == set(once.metrics)
    for metric, value in once.metrics.items():
        assert sum(part.metrics[metric] for part in parts).item() == pytest.approx(value.item(), rel=1e-12), metric


@EVERY
@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
def test_ratios_that_overflow_give_a_finite_loss_and_gradient(name, log_ratio):
    for what, kind in itertools.product(["old", "behaviour", "reference"], BOUNDS):
        one = batch(dtype=torch.float32)
        one = one._replace(**{what: one.logprobs - log_ratio})
        objective = structs.replace(settings_of(name), correction=correction(kind, "sequence"))
        result = objective_loss(one, objective)
        assert torch.isfinite(result.loss)
        assert all(torch.isfinite(value) for value in result.metrics.values())
        assert torch.isfinite(gradient(one, objective)).all()


@pytest.mark.parametrize("name", ["grpo", "dual", "gspo", "dppo"])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=10)
def test_clipped_are_the_tokens_without_a_gradient(name, seed):
    objective = structs.replace(settings_of("grpo"), dual_clip=1.4) if name == "dual" else settings_of(name)
    one = batch(seed)._replace(correctable=torch.ones(26, dtype=torch.bool))
    unmoved = gradient(one, structs.replace(objective, correction=correction("none"))) == 0
    assert objective_loss(one, objective).metrics["clip_fraction"] == unmoved.sum()


def test_cispo_keeps_the_gradient_of_every_token():
    objective = structs.replace(settings_of("cispo"), clip_high=0.1)
    assert objective_loss(batch(), objective).metrics["clip_fraction"] > 0
    assert (gradient(batch(), objective) != 0).all()


@EVERY
def test_the_gradient_flows_into_the_current_policy_only(name):
    one = batch()
    floats = {n: t.clone().requires_grad_() for n, t in one._asdict().items() if t.dtype == torch.float64}
    constants = {"advantages": one.advantages, "weights": one.weights}
    objective = structs.replace(settings_of(name), entropy=0.01)
    objective_loss(one._replace(**floats | constants), objective).loss.backward()
    assert {n for n, tensor in floats.items() if tensor.grad is not None} == {"logprobs", "entropies"}


@EVERY
def test_bfloat16_is_computed_in_float32(name):
    one = batch(dtype=torch.float32)
    low = one._replace(logprobs=one.logprobs.bfloat16(), old=one.old.bfloat16(), behaviour=one.behaviour.bfloat16())
    wide = low._replace(logprobs=low.logprobs.float(), old=low.old.float(), behaviour=low.behaviour.float())
    loss = objective_loss(low, settings_of(name)).loss
    assert loss.dtype == torch.float32
    assert loss == objective_loss(wide, settings_of(name)).loss


@EVERY
def test_a_batch_without_tokens_has_no_loss(name):
    empty = TokenBatch(*[None if t is None else t[:0] for t in batch()])
    for kind, level in itertools.product(BOUNDS, ["token", "sequence"]):
        result = objective_loss(empty, structs.replace(settings_of(name), correction=correction(kind, level)))
        assert result.loss == 0
        assert result.metrics["tokens"] == 0


def test_a_penalty_in_the_loss_needs_a_reference():
    with pytest.raises(ValueError, match="no reference log-probs"):
        objective_loss(batch()._replace(reference=None), settings_of("reinforce++_baseline"))


def test_metrics():
    old = torch.zeros(4)
    logprobs = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5]))
    behaviour = torch.log(torch.tensor([0.25, 1.0, 1.0, 1.0]))
    one = TokenBatch(
        logprobs=logprobs,
        entropies=torch.zeros(4),
        old=old,
        behaviour=behaviour,
        advantages=torch.tensor([1.0, -1.0, -1.0, 1.0]),
        weights=torch.ones(4),
        sequences=torch.tensor([0, 0, 1, 1]),
        correctable=torch.tensor([True, True, True, False]),
    )
    sums = {name: value.item() for name, value in objective_loss(one, settings_of("grpo")).metrics.items()}
    assert sums["tokens"] == 4
    assert sums["correctable"] == 3
    assert sums["clip_fraction"] == 2
    assert sums["ratio"] == pytest.approx(4)
    assert sums["correction"] == 2 + 1 + 1 + 1
    assert (sums["weight_sum"], sums["weight_square_sum"]) == (2 + 1 + 1, 4 + 1 + 1)
    assert sums["correction_masked"] == 0
    assert sums["kl_old"] == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 0.5)))
    assert sums["kl_behaviour"] == pytest.approx(sum(r - 1 - math.log(r) for r in (6, 1.5, 0.5)))
    assert "kl_reference" not in sums

    masked = structs.replace(settings_of("grpo"), correction=correction("mask"))
    assert objective_loss(one, masked).metrics["correction_masked"] == 1


def test_corrections():
    weight = torch.tensor([4.0, 0.5, 3.0, 0.125, 4.0, 1e9])
    correctable = torch.tensor([True, True, True, True, True, False])
    calls = torch.tensor([0, 0, 1, 2, 2, 2])

    def constants(kind, level="token", **bounds):
        return corrections(weight.log(), correctable, calls, correction(kind, level, **bounds)).tolist()

    assert constants("none") == [1, 1, 1, 1, 1, 1]
    assert constants("truncate") == pytest.approx([2, 0.5, 2, 0.125, 2, 1])
    assert constants("truncate", high=3.5, low=0.25) == pytest.approx([3.5, 0.5, 3, 0.25, 3.5, 1])
    assert constants("truncate", "sequence") == pytest.approx([2, 2, 2, 0.5, 0.5, 1])
    assert constants("mask") == pytest.approx([0, 0.5, 0, 0.125, 0, 1])
    assert constants("icepop") == pytest.approx([4, 0.5, 3, 0, 4, 1])
    assert constants("icepop", "sequence") == pytest.approx([2, 2, 3, 0.5, 0.5, 1])
    assert constants("sequence_mask") == pytest.approx([4, 0.5, 0, 0.125, 4, 1])
    assert constants("sequence_mask", "sequence", high=4.0) == pytest.approx([2, 2, 3, 0.5, 0.5, 1])
    assert constants("decoupled") == pytest.approx([4, 0.5, 3, 0.125, 4, 1])


# Divergences ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_expected_exactly_k1_and_k3_are_the_divergence_and_k2_has_its_gradient(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    probabilities = logprobs.exp().detach()
    divergence = (logprobs.exp() * (logprobs - reference)).sum()
    (true_gradient,) = torch.autograd.grad(divergence, logits, retain_graph=True)

    def expected(estimator):
        value = (probabilities * estimator(logprobs - reference)).sum()
        return value.item(), torch.autograd.grad(value, logits, retain_graph=True)[0]

    one, two, three = expected(kl.k1), expected(kl.k2), expected(kl.k3)
    assert one[0] == pytest.approx(divergence.item(), rel=1e-9, abs=1e-12)
    assert three[0] == pytest.approx(divergence.item(), rel=1e-9, abs=1e-12)
    assert torch.allclose(two[1], true_gradient, atol=1e-12)
    assert torch.allclose(one[1], torch.zeros(5, dtype=torch.float64), atol=1e-12)
    backwards = (reference.exp() * (reference - logprobs)).sum()
    assert torch.allclose(three[1], torch.autograd.grad(backwards, logits)[0], atol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@given(st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), max_size=5))
@settings(max_examples=20)
def test_penalties_are_the_coefficient_times_the_estimates(estimator, pairs):
    old, reference = [p[0] for p in pairs], [p[1] for p in pairs]
    estimates = getattr(kl, estimator)(torch.tensor([o - r for o, r in pairs], dtype=torch.float64))
    if estimator == "k3":
        estimates = estimates.clamp(max=10)
    expected = (0.1 * estimates).tolist()
    got = penalties(Kl(estimator=estimator, place="reward", coefficient=0.1), old, reference)
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)
    if estimator != "k1":
        assert all(value >= 0 for value in got)


def test_the_estimators_are_their_formulas():
    d = 0.7
    tensor = torch.tensor(d, dtype=torch.float64)
    assert kl.k1(tensor).item() == pytest.approx(d)
    assert kl.k2(tensor).item() == pytest.approx(d * d / 2)
    assert kl.k3(tensor).item() == pytest.approx(math.exp(-d) - 1 + d)
