"""The figures of a step: from sums over tokens, and from what was learned from."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from msgspec import structs

from tests.unit.domain import make_recipe
from tests.unit.test_learning import rollout, scores_of
from trainers.learning import learn_from
from trainers.publish import Gap
from trainers.step_metrics import ADVANTAGE_EDGES, step_line, step_metrics
from trainers.tracking import Wandb

SUMS = {
    "tokens": 8.0, "correctable": 4.0, "weight_sum": 4.0, "weight_square_sum": 5.0, "clip_fraction": 2.0, "correction": 8.0,
    "correction_masked": 1.0, "kl_behaviour": 0.4, "kl_reference": 0.8, "entropy": 4.0, "gap": 0.04, "value_loss": 0.5,

    "critic_gradient_norm": 3.0,
    "loss": -1.0, "gradient_norm": 2.0, "agent_tokens/": 2.0, "agent_entropy/": 1.0, "agent_tokens/tokens/v1": 6.0,
    "agent_entropy/tokens/v1": 3.0,
    "version_tokens/3": 3.0, "version_gap/3": 0.03, "version_tokens/2": 1.0, "version_gap/2": 0.01,
}  # fmt: skip


@pytest.fixture
def metrics(tmp_path):
    recipe = make_recipe(tmp_path, train={"steps": 3, "credit": "turn_gae", "objective": {"name": "grpo"}})
    group = [
        rollout("a0", "a", 1.0, [(1, 2)]),
        rollout("a1", "a", -1.0, [(1, 4)]),
        rollout("b0", "b", 9.0, [(1, 2)]),
        rollout("b1", "b", 3.0, [(1, 4)], temperature=0.0),
    ]
    scores = scores_of(group)
    scores["a0c0"] = structs.replace(scores["a0c0"], values=[0.5, 0.0])
    data = learn_from(recipe, group, scores)
    return step_metrics(
        recipe,
        data,
        SUMS,
        Gap(mean=0.001, largest=0.01, tokens=4),
        2,
        0.0,
        {"rollout": 2.0, "score": 1.0, "train": 4.0},
    )


def test_they_are_means_of_what_was_summed_up(metrics):
    assert {name: metrics[name] for name in ("kl", "kl_reference", "clip_fraction", "correction", "correction_masked")} == {
        "kl": 0.1, "kl_reference": 0.1, "clip_fraction": 0.25, "correction": 1.0, "correction_masked": 0.125,
    }  # fmt: skip
    assert metrics["effective_sample_size"] == 16 / (4 * 5)
    assert (metrics["entropy"], metrics["entropy_by_agent"]) == (0.5, {"(unknown)": 0.5, "tokens/v1": 0.5})
    assert metrics["logprob_gap"] == {
        "rollout": 0.01, "published": 0.001, "published_max": 0.01, "by_version": {"2": 0.01, "3": 0.01},
    }  # fmt: skip


def test_they_count_what_was_learned_from(metrics):
    assert metrics["groups"] == {"all": 2, "trained": 2, "no_signal": 0, "of_one": 0}
    assert metrics["optimiser_steps"] == 1
    assert metrics["masked_fraction"] == 0.25
    assert metrics["reward"] == {"good": 3.0}
    assert metrics["returns"]["mean"] == 3.0
    assert metrics["returns"]["std"] == pytest.approx(2 * 2**0.5), "the mean of those of 1 and -1, and of 9 and 3"
    edges, counts = metrics["advantages"]["edges"], metrics["advantages"]["counts"]
    assert len(edges) == len(counts) + 1
    in_bin = {edges[place]: count for place, count in enumerate(counts) if count}
    assert in_bin == {0.5: 2, -1.0: 2, 4.5: 2}, "0.5, -1, and 9, which is beyond the last edge"
    targets, values = [1.0, -1.0, 9.0], [0.5, 0.0, 0.0]
    assert metrics["value"] == {
        "loss": 0.5,
        "targets": 3,
        "gradient_norm": 3.0,
        "explained_variance": pytest.approx(explained(targets, values)),
    }
    assert json.loads(json.dumps(metrics, allow_nan=False))


def test_means_over_no_tokens_are_unknown_and_rollouts_of_others_have_no_return(tmp_path):
    recipe = make_recipe(tmp_path, train={"steps": 3}, sampling={"max_tokens": 8})
    group = [rollout("a0", "a", 1.0), rollout("a1", "a", 0.0), rollout("a2", "a", 5.0, model="other", upstream="x")]
    sums = dict.fromkeys(SUMS, 0.0) | {"tokens": 8.0}
    figures = step_metrics(
        recipe,
        learn_from(recipe, group),
        sums,
        Gap(mean=0.0, largest=0.0, tokens=4),
        2,
        0.0,
        {"rollout": 1.0, "train": 1.0},
    )
    assert (figures["kl"], figures["logprob_gap"]["rollout"], figures["effective_sample_size"]) == (None, None, None)
    assert "kl unknown" in step_line(figures, recipe, 1.0)
    assert figures["returns"]["mean"] == 0.5


def test_staleness_is_counted_from_the_policy_that_played_the_step_over_the_learners_tokens(tmp_path):
    recipe = make_recipe(tmp_path, train={"steps": 3})
    group = [
        rollout("a0", "a", 1.0, [(1, 2)], versions=[4, 4]),
        rollout("a1", "a", 0.0, [(1, 2)], versions=[2, 4]),
        rollout("a2", "a", 5.0, model="other", upstream="x", versions=[0, 0]),
    ]
    data, gap, seconds = learn_from(recipe, group), Gap(mean=0.0, largest=0.0, tokens=4), {"rollout": 1.0, "train": 1.0}
    assert step_metrics(recipe, data, {}, gap, 5, 0.0, seconds)["staleness"] == {"mean": 0.5, "max": 2}
    nothing = learn_from(recipe, group[2:])
    assert step_metrics(recipe, nothing, {}, gap, 5, 0.0, seconds)["staleness"] == {"mean": None, "max": None}


def explained(targets, values):
    def variance(numbers):
        return sum(n * n for n in numbers) / len(numbers) - (sum(numbers) / len(numbers)) ** 2

    return 1 - variance([t - v for t, v in zip(targets, values, strict=True)]) / variance(targets)


def test_wandb_gets_a_histogram_and_the_same_names_in_every_step(metrics):
    sent = {}
    sink = object.__new__(Wandb)
    sink._run = SimpleNamespace(log=lambda values, step: sent.update(values))
    sink._wandb = SimpleNamespace(Histogram=lambda np_histogram: ("histogram", *np_histogram))
    sink.log(metrics, 1)
    assert sent["advantages"] == ("histogram", metrics["advantages"]["counts"], ADVANTAGE_EDGES)
    assert sent["returns/mean"] == 3.0
    assert not [name for name in sent if name == "advantages/edges"]
