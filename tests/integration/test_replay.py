"""`lrl traces replay` on recorded episodes, without engine and agent. That it makes a run's very weights again is in test_train."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from lightning_rl.cli import main
from lightning_rl.episode import Episode, Outcome, Reward, Span, Task
from lightning_rl.recipe import load_recipe
from lightning_rl.store import Store
from lightning_rl.trace_file import export_traces
from tests.unit.domain import make_call, make_start
from trainers.runner.scoring import returned_rewards

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
STEPS, SAMPLES = 2, 4
REWARDS = '''
def stored(task, episode):
    """What the run's own function said."""
    assert all(reward.source != "function" for reward in episode.rewards), "it saw what it gave itself"
    return {"score": float(episode.calls[0].response["content"] == "good")}

async def better(task, episode):
    automatic = sum(reward.value for reward in episode.rewards if reward.source == "automatic")
    return {"score": 1.0 - stored(task, episode)["score"], "seen": automatic}

def fails(task, episode):
    if episode.id.endswith("2"):
        raise ValueError("no idea")
    return {}
'''


def episode(step: int, sample: int) -> Episode:
    """Sample 1 is good by the function, sample 2 says so itself; each called a tool in vain."""
    id = f"train.{step}.{sample}"
    tool = {"id": f"t-{id}", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    call = make_call(
        [1, 2], [3 + sample, 4], id=f"c-{id}", episode_id=id,
        response={"content": "good" if sample == 1 else "bad", "tool_calls": [tool]},
    )  # fmt: skip
    told = {"tool_call_id": tool["id"], "call_id": call.id, "arguments": {}, "result": "Error: no"}
    return Episode(
        start=structs.replace(make_start(id), task=Task(id="t", input={}), step=step, sample=sample, group=f"{step}/t"),
        calls=[call],
        spans=[Span(id=f"tool-{id}", episode_id=id, name="add", kind="tool", attributes=told)],
        rewards=[
            Reward(episode_id=id, name="own[/b]", value=float(sample == 2)),
            Reward(episode_id=id, name="tool_error", value=-0.5, call_id=call.id, source="automatic"),
            Reward(episode_id=id, name="score", value=float(sample == 1), source="function"),
        ],
        outcome=Outcome.COMPLETED,
        counted=True,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory, as `lrl train` leaves it."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    folder = tmp_path / "run"
    folder.mkdir()
    overrides = ["warm_start=null", "reward.weights={}", "evaluate.success=score", "reward.automatic.tool_error=-0.5",
                 f"reward.function={tmp_path / 'rewards.py'}:stored"]  # fmt: skip
    (folder / "recipe.yaml").write_text(load_recipe(SMOKE, overrides).to_yaml())
    with Store.open(folder / "episodes.db") as store:
        for step in range(STEPS):
            for sample in range(SAMPLES):
                made = episode(step, sample)
                store.begin(made.start)
                store.add_call(made.calls[0])
                store.end(
                    made.id, Outcome.COMPLETED, counted=True, spans=made.spans, rewards=made.rewards, ended_at=1.0
                )
            lost = make_start(f"train.{step}.lost", step=step, group=f"{step}/t")
            store.begin(lost)
            store.end(lost.id, Outcome.TIMEOUT, error="too long", counted=False, ended_at=2.0)
    return folder


def replay(source: Path, *arguments: str, fails: bool = False) -> list[dict[str, Any]]:
    out = source.parent / "out.json"
    assert main(["traces", "replay", str(source), *arguments, "--json", str(out)]) == (2 if fails else 0)
    return [] if fails else [json.loads(line) for line in out.read_text().splitlines()]


def rewards_of(step: dict[str, Any], when: str) -> list[dict[str, float]]:
    return [episode["rewards"][when] for episode in step["episodes"]]


def credit_of(step: dict[str, Any], what: str, when: str) -> list[float]:
    return [call[when][what] for episode in step["episodes"] for call in episode["calls"].values()]


def test_by_its_own_recipe_a_run_is_what_it_was(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = replay(run)
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert rewards_of(step, "then") == rewards_of(step, "now")
        assert all(call["then"] == call["now"] for episode in step["episodes"] for call in episode["calls"].values())
        assert step["ledger"]["then"] == step["ledger"]["now"]
        assert credit_of(step, "return", "now") == [-0.5, 0.5, 0.5, -0.5]
    shown = capsys.readouterr().out
    assert "step 2: 4 episodes of 5 attempts" in shown
    assert "own[/b]" in shown, "names are never read as markup"


def test_another_reward_function_replaces_what_the_recipe_gave_and_keeps_what_the_agent_gave(run: Path) -> None:
    other = ["reward.automatic={tool_error: -1.0, turns: {limit: 0, value: 0.25}}", "train.objective.normalise=none"]
    for step in replay(run, other[0], "--reward", f"{run.parent}/rewards.py:better", other[1]):
        assert rewards_of(step, "now") == [
            {
                "own[/b]": float(sample == 2),
                "tool_error": -1.0,
                "turns": 0.25,
                "score": float(sample != 1),
                "seen": -0.75,
            }
            for sample in range(SAMPLES)
        ]
        returns = [-0.5, -1.5, 0.5, -0.5]
        assert credit_of(step, "return", "now") == returns
        assert credit_of(step, "advantage", "now") == [value - sum(returns) / 4 for value in returns]
        assert rewards_of(step, "then")[1] == {"own[/b]": 0.0, "tool_error": -0.5, "score": 1.0}
        assert credit_of(step, "return", "then") == [-0.5, 0.5, 0.5, -0.5], "as the run's own recipe credited it"


def test_the_agent_is_not_needed_nor_is_a_reward_function_that_another_replaces(run: Path) -> None:
    expected = replay(run)
    recipe = run / "recipe.yaml"
    text = recipe.read_text().replace("calculator", "gone")
    assert text != recipe.read_text()
    recipe.write_text(text)
    assert replay(run) == expected
    (run.parent / "rewards.py").rename(run.parent / "other.py")
    assert replay(run, "--reward", f"{run.parent}/other.py:stored") == expected
    replay(run, fails=True)


def test_rewards_from_before_sources_were_known_are_replaced_by_name(run: Path) -> None:
    with closing(sqlite3.connect(run / "episodes.db")) as database, database:
        database.execute("UPDATE rewards SET source = 'unknown'")
    (first, _) = replay(run, "--reward", f"{run.parent}/rewards.py:better")
    assert rewards_of(first, "now")[1] == {"own[/b]": 0.0, "tool_error": -0.5, "score": 0.0, "seen": -0.5}


def test_a_database_or_a_trace_file_is_replayed_by_the_recipe_that_is_given(run: Path) -> None:
    recipe = ["--recipe", str(run / "recipe.yaml")]
    expected = replay(run)
    assert replay(run / "episodes.db", *recipe) == expected
    traces = run.parent / "traces.jsonl"
    with Store.open(run / "episodes.db") as store:
        export_traces(store, traces)
    assert replay(traces, *recipe) == expected


def test_what_an_agent_returned_counts_where_no_function_judges_it_and_only_there(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def judged(episode: dict[str, Any], when: str) -> float | None:
        return episode["rewards"][when].get("return")

    database = run.parent / "returned.db"
    with Store.open(database) as store:
        for sample in range(SAMPLES):
            made = episode(0, sample)
            store.begin(made.start)
            store.add_call(made.calls[0])
            returned = returned_rewards(float(sample), made.id)
            assert [reward.source for reward in returned] == ["returned"]
            store.end(made.id, Outcome.COMPLETED, counted=True, answer=float(sample), rewards=returned, ended_at=1.0)
    (run.parent / "rewards.py").write_text(
        REWARDS + 'def again(task, episode):\n    return {"return": 1 - episode.answer}\n'
    )
    plain = ["--recipe", str(run / "recipe.yaml"), "reward.automatic={}", "evaluate.success=return"]
    alone = replay(database, *plain, "reward.function=null")[0]["episodes"]
    judge = replay(database, *plain, "--reward", f"{run.parent}/rewards.py:again")[0]["episodes"]
    assert [judged(one, "now") for one in alone] == [0, 1, 2, 3]
    assert [judged(one, "now") for one in judge] == [1, 0, -1, -2], "not both"
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE rewards SET source = 'unknown'")
    older = replay(database, *plain, "--reward", f"{run.parent}/rewards.py:better", "evaluate.success=score")[0][
        "episodes"
    ]
    assert [judged(one, "now") for one in older] == [None] * SAMPLES
    assert "return R" in capsys.readouterr().out
    replay(run, "reward.function=null", "evaluate.success=own[/b]", "reward.automatic={}")  # emitted ones are enough


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reward", "rewards.py:stord"], "did you mean 'stored'"),
        (["--reward", "rewards.py:fails"], "failed on episode train.0.2: ValueError: no idea"),
        (["--phase", "eval-final"], "no episode of the phase eval-final"),
        (["--train"], "--train and --out go together"),
        (["--train", "--out", "."], "exists already"),
        (["--train", "--out", "new", "--phase", "eval-final"], "not eval-final"),
        (["reward.weights={score: 1.0}"], "own[/b]"),
        (["--phase", "train", "train.credits=equal"], "did you mean 'credit'"),
    ],
)
def test_what_is_wrong_is_said(
    run: Path, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    replay(run, *arguments, fails=True)
    assert words in capsys.readouterr().err
    assert not (run.parent / "new").exists()


def test_a_file_without_a_recipe_and_a_warm_start_that_is_not_there_are_said(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replay(run / "episodes.db", fails=True)
    assert "by which recipe" in capsys.readouterr().err
    assert main(["traces", "replay", "${LRL_UNSET}?run=x", "--recipe", str(run / "recipe.yaml")]) == 2
    assert "the environment variable LRL_UNSET, which the episode store's URL names" in capsys.readouterr().err
    warm = [str(run / "episodes.db"), "warm_start={steps: 1}", "--recipe", str(run / "recipe.yaml")]
    assert main(["traces", "replay", *warm, "--train", "--out", str(run.parent / "new")]) == 2
    assert "--start-from DIR names it" in capsys.readouterr().err
