"""One intermediate reward, followed from where it was given to the gradient that it makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_rl.episode import Episode, Reward
from lightning_rl.recipe import Recipe, load_recipe
from tests.integration.learning import LORA, group_of_calls
from trainers.learner import objective_loss
from trainers.loop import StepData, learn_from
from trainers.policy import load_policy, row_tensors

RECIPE = Path(__file__).parents[2] / "recipes" / "calculator.yaml"


def step(weight: float) -> tuple[Recipe, StepData]:
    """Four episodes that all answer wrong; the first call of one of them was well formed."""
    recipe = load_recipe(RECIPE, [f"reward.weights={{correct: 1.0, well_formed: {weight}}}"])
    episodes = []
    for i, episode in enumerate(group_of_calls()):
        first = episode.calls[0].id
        rewards = [
            Reward(episode_id=episode.id, name="correct", value=0.0),
            Reward(episode_id=episode.id, name="well_formed", value=float(i == 2), call_id=first),
        ]
        episodes.append(Episode(start=episode.start, calls=episode.calls, rewards=rewards, counted=True))
    return recipe, learn_from(recipe, episodes)


def gradient(recipe: Recipe, data: StepData, model_dir: Path) -> dict[str, torch.Tensor]:
    policy = load_policy(model_dir, "float32", LORA, seed=0)
    for row in data.packed.rows:
        loss, _ = objective_loss(policy(**row_tensors(row)), row, recipe.train.objective)
        loss.backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def test_an_intermediate_reward_reaches_the_loss(tiny_llama: Path) -> None:
    recipe, data = step(weight=0.1)
    advantages = {t.episode_id: t.advantage for t in data.transitions}
    rewarded = [t for t in data.transitions if t.episode_id == "e2"]
    assert all(t.ret == pytest.approx(0.1) for t in rewarded), "equal assignment: every call of the episode earns it"
    assert all(t.advantage > 0 for t in rewarded)
    assert all(value < 0 for episode, value in advantages.items() if episode != "e2")
    data.ledger.check("step")
    grads = gradient(recipe, data, tiny_llama)
    assert sum(float(g.abs().sum()) for g in grads.values()) > 0


def test_without_its_weight_there_is_nothing_to_learn() -> None:
    _, data = step(weight=0.0)
    assert data.packed.rows == []
    assert data.ledger.masked == {"no_signal": data.ledger.sampled}
    data.ledger.check("step")
