"""`lrl credit` on recorded episodes, and `lrl train --dry-run`: neither an engine nor an agent takes part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from lightning_rl.cli import main
from lightning_rl.credit import RULES
from lightning_rl.episode import Outcome, Reward
from lightning_rl.recipe import load_recipe
from lightning_rl.store import Store
from lightning_rl.trace_file import export_traces, read_traces
from tests.unit.domain import make_call, make_start

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two steps of one group of three, and an episode of an evaluation."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(load_recipe(SMOKE, ["warm_start=null"]).to_yaml())
    with Store.open(folder / "episodes.db") as store:
        for step in range(2):
            for sample in range(3):
                id = f"train.{step}.{sample}"
                store.begin(structs.replace(make_start(id), step=step, sample=sample, group=f"{step}/t"))
                store.add_call(make_call([1, 2], [3 + sample, 4], id=f"c-{id}", episode_id=id))
                rewards = [Reward(episode_id=id, name="vowels", value=float(sample == step))]
                store.end(id, Outcome.COMPLETED, counted=True, rewards=rewards, ended_at=1.0)
        store.begin(make_start("eval", phase="eval-base"))
        store.end("eval", Outcome.COMPLETED, counted=True, ended_at=1.0)
        store.begin(make_start("lost", group="0/t"))
        store.end("lost", Outcome.TIMEOUT, counted=False, ended_at=1.0)
    return folder


def credit(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert main(["credit", *map(str, arguments), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_last_step_or_another_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = credit(capsys, run)
    assert (last["schema"], last["step"], last["groups"][0]["episodes"]) == (1, 2, [f"train.1.{i}" for i in range(3)])
    assert credit(capsys, run, "--step", 1)["step"] == 1
    assert main(["credit", str(run)]) == 0
    assert "step 2, credit equal, objective grpo" in capsys.readouterr().out


def test_an_episode_by_all_rules_or_those_that_are_named(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = credit(capsys, run, "train.0.0")
    assert [other["rule"] for other in report["others"]] == [*RULES]
    assert report["own"]["calls"]["c-train.0.0"]["ret"] == 1.0
    (run.parent / "mine.py").write_text(
        "def half(group):\n    return {c.id: r.ret / 2 for r in group for c in r.calls}\n"
    )
    monkeypatch.chdir(run.parent)
    report = credit(
        capsys, run, "train.0.0", "train.objective.normalise=none", "--rule", "final", "--rule", "mine.py:half"
    )
    own, final, half = (part["calls"]["c-train.0.0"] for part in (report["own"], *report["others"]))
    assert own["advantage"] == final["advantage"] == pytest.approx(2 / 3)
    assert (half["ret"], half["advantage"]) == (0.5, pytest.approx(1 / 3))
    assert main(["credit", str(run), "train.0.0", "--rule", "mine.py:half"]) == 0
    assert "half" in capsys.readouterr().out


def test_a_trace_file_by_the_recipe_that_is_given(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = run.parent / "traces.jsonl"
    with Store.open(run / "episodes.db") as store:
        export_traces(store, traces)
    expected = credit(capsys, run)
    for source in (traces, run / "episodes.db"):
        assert credit(capsys, source, "--recipe", run / "recipe.yaml") == expected
        assert main(["credit", str(source)]) == 2
        assert "--recipe" in capsys.readouterr().err
    file = run.parent / "out.json"
    assert main(["credit", str(run), "--json", str(file)]) == 0
    assert json.loads(file.read_text()) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.0.9"], "did you mean train.0."),
        (["eval"], "in training only"),
        (["lost"], "did not count (timeout)"),
        (["--step", "9"], "has no step 9: it has 1 to 2"),
        (["train.0.0", "--step", "1"], "not both"),
        (["--rule", "final"], "EPISODE"),
        (["train.0.0", "--rule", "finale"], "did you mean 'final'?"),
        (["train.0.0", "--rule", "nowhere.py:rule"], "nowhere.py"),
        (["train.credit=finale"], "did you mean 'final'?"),
    ],
)
def test_mistakes_are_said(run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["credit", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    overrides = ["train.objective=ppo", "train.epochs=2", "train.objective.kl={coefficient: 0.05}"]
    assert main(["train", str(SMOKE), "--dry-run", *overrides]) == 0
    out = capsys.readouterr().out
    for said in (
        "2 groups × 4 rollouts = 8 episodes; 2 updates of the policy (1 minibatch × 2 epochs)",
        "runs/smoke/<time>/",
        "token_gae, the objective's own",
        "the reference policy",
        "the critic (128 units",
        "0.5 times the mean square by which V before a token misses its target",
        "0.05 times k3 of each token against the reference policy",
        r"\mathcal{L} = \sum_t w'_t\, (c_t\, \ell_t + \kappa_t) + \mathcal{V}",
        "nothing was written",
    ):
        assert said in out
    assert not [*tmp_path.iterdir()]


def test_a_dry_run_says_that_a_rule_leaves_the_critic_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(SMOKE), "--dry-run", "train.objective=ppo", "train.credit=equal"]) == 0
    assert "ppo's own is token_gae, which reads a critic: there is none here" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_dry_run_finds_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(SMOKE), "--dry-run", "train.objective=grop"]) == 2
    assert "did you mean 'grpo'?" in capsys.readouterr().err
    assert main(["train", str(SMOKE), "--dry-run", "evaluate.tasks=5"]) == 2
    assert "eval tasks" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path), "--dry-run"]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_the_commands_of_the_docs_find_a_rule_where_they_are_started(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    docs = (SMOKE.parents[1] / "docs" / "credit.md").read_text()
    (here / "my_rules.py").write_text(docs.split("```python\n# my_rules.py\n")[1].split("```")[0])
    monkeypatch.chdir(here)
    assert "lrl traces replay RUN train.credit=my_rules.py:mostly_last" in " ".join(docs.split())
    assert main(["traces", "replay", str(run), "train.credit=my_rules.py:mostly_last", "--json", "out.jsonl"]) == 0
    steps = [json.loads(line)["step"] for line in Path("out.jsonl").read_text().splitlines()]
    assert steps == [1, 2], "as the console counts"
    capsys.readouterr()
    section = "train.credit={rule: 'my_rules.py:mostly_last', arguments: {share: 5e-1}}"
    for override in ("train.credit=my_rules.py:mostly_last", "train.credit.rule=my_rules.py:mostly_last", section):
        assert credit(capsys, run, override)["rule"] == f"{here / 'my_rules.py'}:mostly_last"
    assert main(["credit", str(run), "train.credit=my_rule.py:mostly_last"]) == 2
    assert "override train.credit: there is no file" in capsys.readouterr().err


def test_steps_are_selected_as_they_are_shown(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["traces", "list", str(run), "--step", "2"]) == 0
    listed = capsys.readouterr().out
    assert "train.1.0" in listed
    assert "train.0.0" not in listed
    out = tmp_path / "step.jsonl"
    assert main(["traces", "export", str(run), "--out", str(out), "--step", "1"]) == 0
    assert {episode.start.step for episode in read_traces(out)} == {0}
    assert main(["traces", "show", str(run), "train.1.0"]) == 0
    assert "train step 2, task" in capsys.readouterr().out
    for words, message in (
        (["list", run, "--step", "3"], "no step 3 of the training: it has 1 to 2"),
        (["export", run, "--out", out, "--step", "0"], "it has 1 to 2"),
        (["list", run, "--step", "1", "--phase", "eval-base"], "the phase eval-base has no steps"),
    ):
        assert main(["traces", *map(str, words)]) == 2
        assert message in capsys.readouterr().err


def test_a_rule_that_cannot_be_called_fails_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def rule(group, *, share):\n    return {}\n")
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--dry-run"]):
        assert main(["train", str(SMOKE), *more, f"train.credit={tmp_path}/mine.py:rule", "runs_dir=runs"]) == 2
        assert "required argument: 'share'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_promises_no_update_without_a_group(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", str(SMOKE), "--dry-run", "train.minibatches=20", "train.epochs=3"]) == 0
    said = "at most 6 updates of the policy (2 minibatches × 3 epochs, fewer where fewer groups have a loss)"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "hint", "other"),
    [
        ("train.credit=token_gae", "choose another rule", "penalty"),
        ("train.objective=reinforce++", "train.objective.kl={coefficient: 0}", "rule"),
    ],
)
def test_what_is_not_stored_has_one_way_out(
    run: Path, capsys: pytest.CaptureFixture[str], override: str, hint: str, other: str
) -> None:
    assert main(["traces", "replay", str(run), override]) == 2
    told = capsys.readouterr().err.split("from the record alone")[1]
    assert hint in told
    assert other not in told
