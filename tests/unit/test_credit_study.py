"""The study's figures by hand, its tasks' rewards, and what it says when trainings did not get there."""

from __future__ import annotations

import asyncio
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.credit import RULES as KNOWN_RULES
from lightning_rl.credit.rollouts import rollout_of
from lightning_rl.episode import Episode, Task
from lightning_rl.recipe import load_recipe
from recipes.studies.credit import agents, rewards
from recipes.studies.credit.figures import episodes_to_threshold, median_of, ratio_of, smoothed
from recipes.studies.credit.report import EPISODES, as_json, markdown, read_curves
from recipes.studies.credit.run import RULES, TASKS
from tests.unit.domain import make_call, make_episode

RECIPE = Path(agents.__file__).parent / "recipe.yaml"


def test_the_first_full_window_counts() -> None:
    assert episodes_to_threshold([1.0, 1.0], 16) == math.inf
    assert episodes_to_threshold([0.5, 1.0, 1.0, 0.7, 1.0], 16) == 64
    assert episodes_to_threshold([1.0, 0.0, 1.0, 0.0], 16) == math.inf


@given(st.lists(st.floats(1, 1000) | st.just(math.inf), min_size=1, max_size=7))
def test_an_interval_holds_its_median_and_stays_within_the_values(values: list[float]) -> None:
    interval = median_of(values)
    assert min(values) <= interval.low <= interval.high <= max(values)
    assert interval.low <= interval.median <= interval.high or len(values) < 3


def test_medians_bear_trainings_that_never_learned() -> None:
    assert median_of([100, 200, math.inf]).median == 200
    assert median_of([100, math.inf, math.inf]).median == math.inf
    assert ratio_of([400.0] * 5, [100.0] * 5).median == 4
    assert smoothed([0.0, 0.6, 0.9], 5) == pytest.approx([0.0, 0.3, 0.5, 0.5, 0.5])


class Scripted:
    """A client that answers with the letters that it was given."""

    def __init__(self, letters: str) -> None:
        self._letters = iter(letters)
        self.chat = SimpleNamespace(completions=self)

    async def create(self, **_: Any) -> Any:
        message = SimpleNamespace(content=next(self._letters))
        return SimpleNamespace(choices=[SimpleNamespace(message=message)])


def played(task: str, letters: str, key: str) -> Episode:
    answer = asyncio.run(getattr(agents, task)({"key": key}, Scripted(letters), random.Random(0)))
    calls = [make_call([1, 2, k], [7], id=f"c{k}", index=k) for k in range(len(letters))]
    episode = structs.replace(make_episode("e", calls), answer=answer)
    given = getattr(rewards, task)(Task(id="t", input={"key": key}), episode)
    return structs.replace(episode, rewards=given)


@pytest.mark.parametrize("task", TASKS)
def test_only_the_first_letter_changes_what_is_earned_apart_from_luck(task: str) -> None:
    weights = load_recipe(RECIPE).reward.weights
    ids = [f"c{k}" for k in range(6)]
    right, elsewhere, wrong = (
        rollout_of(played(task, letters, "B"), weights, ids) for letters in ("BAAAAA", "BCDACD", "CAAAAA")
    )
    assert right.ret == elsewhere.ret == wrong.ret + 1
    assert right.earned == elsewhere.earned
    decisive = right.earned["c0"] - wrong.earned["c0"] if task == "long_tail" else right.outcome - wrong.outcome
    assert decisive == 1
    assert sum(map(abs, right.earned.values())) == (task == "long_tail") + 5 * rewards.LUCK * (task != "early_key")


def test_every_rule_is_in_the_study() -> None:
    assert set(RULES) == set(KNOWN_RULES)
    assert load_recipe(RECIPE).train.tasks_per_step * load_recipe(RECIPE).train.samples_per_task == EPISODES


def test_the_table_says_who_never_learned(tmp_path: Path) -> None:
    for rule, curve in (("equal", [0.5] * 10), ("tree", [0.5, 1.0, 1.0, 1.0])):
        for seed in range(3):
            (tmp_path / f"early_key.{rule}.{seed}.json").write_text(json.dumps({"curve": curve}))
    curves = read_curves(tmp_path)
    table = markdown(curves).splitlines()
    (equal,) = [line for line in table if line.startswith("| `equal`")]
    (tree,) = [line for line in table if line.startswith("| `tree`")]
    assert ">160" in equal
    assert "3 of 3 never" in equal
    assert ">2.5" in tree
    assert json.loads(as_json(curves))["curves"] == curves
