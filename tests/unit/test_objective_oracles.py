"""Objectives against other people's code, and against their formulas computed token by token."""

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.algorithms.aggregation import token_weights
from lightning_rl.algorithms.correction import BOUNDS, correction
from lightning_rl.algorithms.objective import TokenBatch, objective_loss
from lightning_rl.algorithms.settings import OBJECTIVES, Kl, Settings, settings_of
from tests.unit.domain import make_call, make_episode, transitions_of

# Token by token ------------------------------------------------------------------------------------------------------


def correction_by_hand(objective, tokens, of_call, t):
    """c of token t; `tokens`: dicts, `of_call`: the numbers of the tokens of its call."""
    what = objective.correction
    if objective.old == "server" or what.kind == "none" or not tokens[t]["correctable"]:
        return 1.0
    counted = [j for j in of_call if tokens[j]["correctable"]]
    product = math.prod(math.exp(tokens[j]["old"] - tokens[j]["behaviour"]) for j in counted)
    w = product if what.level == "sequence" else math.exp(tokens[t]["old"] - tokens[t]["behaviour"])
    if what.kind in ("truncate", "decoupled"):
        return min(max(w, what.low), what.high)
    tested = product ** (1 / len(counted)) if what.kind == "sequence_mask" else w
    return w if what.low <= tested <= what.high else 0.0


def loss_by_hand(objective, tokens, t, logprob):
    """The loss of token t as a function of its log-prob alone; what a gradient is stopped at is as `tokens` has it."""
    token = tokens[t]
    of_call = [j for j, other in enumerate(tokens) if other["sequences"] == token["sequences"]]

    def below(j):
        return tokens[j]["behaviour" if objective.old == "server" and tokens[j]["correctable"] else "old"]

    a, current = token["advantages"], token["logprobs"]
    ratio = math.exp(logprob - below(t))
    held = math.exp(current - below(t))
    if objective.ratio == "sequence":
        held = math.exp(sum(tokens[j]["logprobs"] - below(j) for j in of_call) / len(of_call))
        ratio = held * math.exp(logprob) / math.exp(current)
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    if objective.surrogate == "reinforce":
        surrogate = -a * logprob
    elif objective.surrogate == "clip":
        surrogate = -min(ratio * a, min(max(ratio, low), high) * a)
        if objective.dual_clip is not None and a < 0:
            surrogate = min(surrogate, -objective.dual_clip * a)
    elif objective.surrogate == "cispo":
        surrogate = -min(max(held, low), high) * a * logprob
    else:
        moved = math.exp(current) - math.exp(below(t))
        out = moved > objective.clip_high if a > 0 else moved < -objective.clip_low
        surrogate = 0.0 if out else -ratio * a
    loss = correction_by_hand(objective, tokens, of_call, t) * surrogate
    if objective.kl is not None and objective.kl.place == "loss":
        d = logprob - token["reference"]
        loss += objective.kl.coefficient * (d * d / 2 if objective.kl.estimator == "k2" else math.exp(-d) - 1 + d)
    return token["weights"] * (loss - objective.entropy * token["entropies"])


def calls_of_tokens(seed, tokens=24):
    """As plain numbers; some tokens are certain, some unlikely, some calls have no token to correct."""
    random = np.random.default_rng(seed)
    old = -3 * random.random(tokens) ** 2
    columns = {
        "logprobs": np.minimum(old + 0.4 * random.standard_normal(tokens), 0),
        "entropies": random.random(tokens),
        "old": old,
        "behaviour": np.minimum(old + 0.5 * random.standard_normal(tokens), 0),
        "advantages": random.standard_normal(tokens),
        "weights": random.random(tokens),
        "sequences": np.sort(random.permutation(np.r_[0:6, random.integers(0, 6, tokens - 6)])),
        "correctable": random.random(tokens) > 0.3,
        "reference": old + 0.5 * random.standard_normal(tokens),
    }
    return [{name: column[t].item() for name, column in columns.items()} for t in range(tokens)]


variants = st.fixed_dictionaries(
    {},
    optional={
        "correction": st.builds(correction, st.sampled_from([*BOUNDS]), st.sampled_from(["token", "sequence"])),
        "kl": st.sampled_from([Kl(estimator=name, place="loss", coefficient=0.1) for name in ("k2", "k3")]),
        "entropy": st.just(0.02),
        "dual_clip": st.just(1.5),
        "old": st.sampled_from(["trainer", "server"]),
        "clip_high": st.just(0.1),
    },
)


@pytest.mark.parametrize("name", OBJECTIVES)
@given(seed=st.integers(0, 100_000), changed=variants)
@settings(max_examples=25, deadline=None)
def test_loss_and_gradient_are_the_formula_token_by_token(name, seed, changed):
    objective = structs.replace(settings_of(name), **changed)
    tokens = calls_of_tokens(seed)
    columns = {field: np.array([token[field] for token in tokens]) for field in TokenBatch._fields}
    one = TokenBatch(**{field: torch.from_numpy(column) for field, column in columns.items()})
    one.logprobs.requires_grad_()
    one.entropies.requires_grad_()
    result = objective_loss(one, objective)
    result.loss.backward()

    step = 1e-6
    for t, token in enumerate(tokens):
        rise = loss_by_hand(objective, tokens, t, token["logprobs"] + step)
        fall = loss_by_hand(objective, tokens, t, token["logprobs"] - step)
        assert one.logprobs.grad[t].item() == pytest.approx((rise - fall) / (2 * step), rel=1e-6, abs=1e-8)
        if objective.entropy:
            assert one.entropies.grad[t].item() == pytest.approx(-objective.entropy * token["weights"])
    expected = math.fsum(loss_by_hand(objective, tokens, t, token["logprobs"]) for t, token in enumerate(tokens))
    assert result.loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


# The same batch through TRL's trainers -------------------------------------------------------------------------------

LENGTHS = [3, 5, 2, 4, 5, 1]
MAX_LENGTH = 8
RETURNS = [1.0, 0.0, 0.5, 0.0, 2.0, 0.25]  # two groups of three; the third is at its mean and has no term of ours


class Accelerator:
    """World size one."""

    num_processes = 1
    sync_gradients = True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x


def padded_mask():
    return torch.tensor([[float(t < length) for t in range(max(LENGTHS))] for length in LENGTHS], dtype=torch.float64)


def trl_inputs(advantages, **inputs):
    ids = torch.zeros_like(padded_mask(), dtype=torch.long)
    return {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": padded_mask(),
        "advantages": advantages,
        "num_items_in_batch": padded_mask().sum(),
        **inputs,
    }


def trl_loss(objective, drawn, advantages, weight, *, bias_corrected_kl):
    """The loss of TRL's own method, on [6, 5] tensors padded on the right; it runs on the log-probs given."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    kl = objective.kl
    loss_type = "cispo" if objective.surrogate == "cispo" else TRL_AGGREGATION[objective.aggregation]
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (drawn.logprobs, drawn.entropies, None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=objective.ratio,
        beta=0.0 if kl is None else kl.coefficient,
        loss_type=loss_type,
        epsilon_low=objective.clip_low,
        # TRL's bound of CISPO is the ratio itself.
        epsilon_high=objective.clip_high + (1 if loss_type == "cispo" else 0),
        args=SimpleNamespace(
            delta=objective.dual_clip, steps_per_generation=1, use_bias_correction_kl=bias_corrected_kl
        ),
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_LENGTH,
        accelerator=Accelerator(),
        _entropy_bonus_enabled=objective.entropy != 0,
        use_adaptive_entropy=False,
        entropy_coef=objective.entropy,
        _metrics={"train": defaultdict(list)},
    )
    inputs = trl_inputs(
        advantages,
        old_per_token_logps=drawn.old,
        ref_per_token_logps=drawn.reference,
        importance_sampling_ratio=weight,
    )
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


TRL_AGGREGATION = {"sequence": "grpo", "rollout": "grpo", "token": "dapo", "fixed": "dr_grpo"}  # one call a rollout


def drawn_tensors(seed=1):
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn((len(LENGTHS), max(LENGTHS)), generator=generator, dtype=torch.float64)

    logprobs = -3 * torch.rand((len(LENGTHS), max(LENGTHS)), generator=generator, dtype=torch.float64)
    old = logprobs + noise(0.3)
    return SimpleNamespace(
        logprobs=logprobs.requires_grad_(),
        entropies=noise(1.0).abs().requires_grad_(),
        old=old,
        behaviour=old + noise(0.5),
        reference=logprobs.detach() + noise(0.5),
    )


def our_loss(objective, drawn):
    """From episodes on: advantages and weights are ours, too."""
    transitions = []
    for start in (0, 3):
        rows = range(start, start + 3)
        group = [make_episode(f"e{i}", [make_call([1], [2] * LENGTHS[i], id=f"{i}", episode_id=f"e{i}")]) for i in rows]
        transitions += transitions_of(group, {f"{i}": RETURNS[i] for i in rows}, objective.advantage.normalise)
    weights = token_weights(transitions, objective.aggregation, length=MAX_LENGTH)
    if objective.asks_everywhere:  # then calls without an advantage have their terms
        weights["2"] = token_weights(transitions, "token")["0"]
        assert objective.aggregation == "token"
    where = [(i, t) for i, length in enumerate(LENGTHS) for t in range(length)]
    rows, columns = map(list, zip(*where, strict=True))
    sampled = torch.tensor([len(t.sampled_ids) for t in transitions])
    one = TokenBatch(
        **{name: tensor[rows, columns] for name, tensor in vars(drawn).items()},
        advantages=torch.tensor([t.advantage for t in transitions], dtype=torch.float64).repeat_interleave(sampled),
        weights=torch.tensor([weights.get(t.call_id, 0.0) for t in transitions], dtype=torch.float64).repeat_interleave(
            sampled
        ),
        sequences=torch.tensor(rows),
        correctable=torch.ones(len(rows), dtype=torch.bool),
    )
    return objective_loss(one, objective)


def trl_weight(what, drawn):
    log_weight = (drawn.old - drawn.behaviour) * padded_mask()
    if what.kind == "none":
        return torch.ones_like(log_weight)
    weight = (log_weight.sum(1, keepdim=True) if what.level == "sequence" else log_weight).exp()
    return weight.clamp(max=what.high) if what.kind == "truncate" else weight * (weight <= what.high)


def trl_advantages(normalise):
    grouped = torch.tensor(RETURNS, dtype=torch.float64).view(2, 3)
    advantages = grouped - grouped.mean(1, keepdim=True)
    return (advantages if normalise == "none" else advantages / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


GRPO = structs.replace(settings_of("grpo"), aggregation="token")
K3 = Kl(estimator="k3", place="loss", coefficient=0.04)
IN_TRL: dict[str, Settings] = {
    "grpo": settings_of("grpo"),
    "grpo, by calls": structs.replace(GRPO, aggregation="sequence"),
    "bnpo, dapo": GRPO,
    "dr_grpo": settings_of("dr_grpo"),
    "dapo": structs.replace(settings_of("dapo"), overlong=None),
    # A correction of single tokens counts as an advantage of single tokens: TRL's gradient is another then.
    "gspo": structs.replace(settings_of("gspo"), correction=correction("none")),
    "gspo, wider": structs.replace(
        settings_of("gspo"), clip_low=0.05, clip_high=0.1, correction=correction("truncate", "sequence")
    ),
    "cispo": settings_of("cispo"),
    "cispo, clipped": structs.replace(settings_of("cispo"), clip_high=0.1),
    "two-sided": structs.replace(GRPO, dual_clip=1.4),
    "k3": structs.replace(GRPO, kl=K3),
    "entropy": structs.replace(GRPO, entropy=0.02),
    "all at once": structs.replace(GRPO, dual_clip=1.4, kl=K3, entropy=0.02),
    "token_mask": structs.replace(GRPO, correction=correction("mask")),
    "sequence_truncate": structs.replace(GRPO, correction=correction("truncate", "sequence")),
    "sequence_mask": structs.replace(GRPO, correction=correction("mask", "sequence", high=3.0)),
}


@pytest.mark.parametrize("objective", IN_TRL.values(), ids=IN_TRL)
def test_loss_and_gradients_are_those_of_trl(objective):
    drawn = drawn_tensors()
    theirs, metrics = trl_loss(
        objective,
        drawn,
        trl_advantages(objective.advantage.normalise),
        trl_weight(objective.correction, drawn),
        bias_corrected_kl=False,
    )
    their_gradients = torch.autograd.grad(theirs, (drawn.logprobs, drawn.entropies), allow_unused=True)
    ours = our_loss(objective, drawn)
    our_gradients = torch.autograd.grad(ours.loss, (drawn.logprobs, drawn.entropies), allow_unused=True)

    assert ours.loss.item() == pytest.approx(theirs.item(), rel=1e-12)
    assert torch.allclose(our_gradients[0], their_gradients[0], rtol=1e-12, atol=1e-15)
    assert our_gradients[0].abs().sum() > 0
    assert (our_gradients[1] is None) == (their_gradients[1] is None)
    if our_gradients[1] is not None:
        assert torch.allclose(our_gradients[1], their_gradients[1], rtol=1e-12, atol=1e-15)
    if objective.kl is not None:
        mean = ours.metrics["kl_reference"] / ours.metrics["tokens"]
        assert mean.item() == pytest.approx(metrics["kl"][0])
    if objective.surrogate == "clip" and objective.ratio == "token" and objective.dual_clip is None:
        fraction = ours.metrics["clip_fraction"] / ours.metrics["tokens"]
        assert fraction.item() == pytest.approx(metrics["clip_ratio/region_mean"][0])


def test_on_policy_k2_has_the_gradient_of_trls_bias_corrected_k3():
    """TRL multiplies k3 by the ratio, unless told otherwise: then it, too, has the gradient of the divergence."""
    drawn = drawn_tensors()
    drawn.old = drawn.behaviour = drawn.logprobs.detach()
    theirs, _ = trl_loss(
        structs.replace(GRPO, kl=K3), drawn, trl_advantages("std"), torch.ones(6, 5), bias_corrected_kl=True
    )
    ours = our_loss(structs.replace(GRPO, kl=structs.replace(K3, estimator="k2")), drawn).loss
    gradients = [torch.autograd.grad(loss, drawn.logprobs)[0] for loss in (theirs, ours)]
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-15)


def test_on_policy_rloo_has_the_gradient_of_trls():
    """TRL clips the ratio of the call: on-policy that changes nothing, and it divides by no constant length."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    drawn = drawn_tensors()
    drawn.old = drawn.behaviour = drawn.logprobs.detach()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (drawn.logprobs, drawn.entropies, None),
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        _metrics={"train": defaultdict(list)},
    )
    old = (drawn.old * padded_mask()).sum(1)
    theirs = RLOOTrainer._compute_loss(trainer, None, trl_inputs(trl_advantages("none"), old_logps=old))
    ours = our_loss(settings_of("rloo"), drawn).loss
    gradients = [torch.autograd.grad(loss, drawn.logprobs)[0] for loss in (theirs, ours * MAX_LENGTH)]
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-15)
