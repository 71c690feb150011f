"""The longest step there is, end to end: a critic, a reference policy, several updates of one step's rollouts, more tasks where
groups teach nothing. Killed, resumed, and replayed from its record: the same weights, bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lightning_rl.ledger import Ledger
from lightning_rl.store import Store
from tests.integration.test_train import RECIPE, descendants, finish, gone, here, lrl, until
from trainers.run import latest_policy
from trainers.run_directory import open_run

pytestmark = pytest.mark.timeout(600)

PPO = [
    "warm_start=null", "train.steps=2", "evaluate.tasks=2", "train.minibatches=2", "train.epochs=2",
    "train.tasks_per_step=2",
    "train.samples_per_task=2", "train.objective={name: ppo, kl: {coefficient: 0.1}, dynamic_sampling: 1, entropy_bonus: 0.01}",
]  # fmt: skip


def test_ppo_killed_while_it_scores_is_what_its_record_teaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = lrl("train", RECIPE, *PPO, cwd=tmp_path)
    until(process, "step 2/2: score")
    family = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone(family)
    process = lrl("train", "--resume", "runs/smoke", cwd=tmp_path)
    output = finish(process)
    assert process.returncode == 0, output
    run = open_run(tmp_path / "runs" / "smoke")
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    rows = [row for row in rows if "evaluation" not in row]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        Ledger.from_dict(row["ledger"]).check("a step")
        assert row["optimiser_steps"] == 2 * min(2, row["groups"]["trained"])
        assert row["groups"]["all"] == row["groups"]["trained"] + row["groups"]["no_signal"] >= 2
        assert row["kl_reference"] >= 0
        assert row["value"]["targets"] == sum(row["advantages"]["counts"]) > 0
        assert row["seconds"].keys() == {"rollout", "score", "train"}
        assert 0 < row["effective_sample_size"] <= 1
        assert row["logprob_gap"]["published"] < 1e-3
    assert rows[0]["value"]["explained_variance"] == 0.0, "a new critic says 0 everywhere"
    with Store.open(run.store) as store:
        steps = [{e.start.group for e in store.episodes(phase="train", step=step) if e.counted} for step in range(2)]
    assert [len(groups) for groups in steps] == [row["groups"]["all"] for row in rows]

    process = lrl("traces", "replay", run.path, "--train", "--out", "again", "--json", "steps.json", cwd=tmp_path)
    output = finish(process)
    assert process.returncode == 0, output
    for line in (tmp_path / "steps.json").read_text().splitlines():
        calls = [call for episode in json.loads(line)["episodes"] for call in episode["calls"].values()]
        assert calls
        assert all(call["then"] == call["now"] for call in calls)
    ours, theirs = (load_file(latest_policy(one) / "adapter_model.safetensors")
                    for one in (open_run(tmp_path / "again"), run))  # fmt: skip
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours), "the record teaches something else"
    assert here(tmp_path, monkeypatch, "traces", "replay", run.path) == 2
    assert "token_gae reads a critic's values, and a record of episodes has none" in capsys.readouterr().err
