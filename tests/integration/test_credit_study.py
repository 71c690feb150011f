"""The credit study's circle, for two steps: its agents against a real server, the trainer, a rule with a critic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_rl.agents import callers
from lightning_rl.store import Store
from recipes.studies.credit import training
from tests.integration.learning import one_rank


def test_two_steps_of_a_training(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(path: Path, overrides: list[str]) -> Any:
        return load_recipe(path, [*overrides, "train.steps=2", "train.samples_per_task=3"])

    load_recipe = training.load_recipe
    monkeypatch.setattr(training, "load_recipe", short)
    with one_rank(), training.Bench(tiny_llama, tmp_path / "bench") as bench:
        curve = bench.train(training.Training(task="two_agents", rule="turn_gae", seed=0))
        with Store.open(tmp_path / "bench" / "episodes.db") as store:
            episodes = [episode for step in (0, 1) for episode in store.episodes(phase=f"two_agents.turn_gae.0-{step}")]
    assert len(curve) == 2
    assert len(episodes) == 6
    for episode in episodes:
        who = callers(episode)
        agents = [who[call.id].agent for call in sorted(episode.calls, key=lambda call: call.index)]
        assert agents == ["planner"] + ["worker"] * 5
        assert {call.versions[0] for call in episode.calls} == {episode.start.step + 1}
    assert not (tmp_path / "bench").exists()
