"""`lrl run`: the first thing a new user tries, with a scripted server and with a real one."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_rl.cli import main
from lightning_rl.episode import Outcome
from lightning_rl.store import Store
from lightning_rl.store.place import store_of
from tests.integration.served_web import Served, served
from tests.postgres import PostgresServer

ROOT = Path(__file__).parents[2]
AGENT = """
import sys
from openai import OpenAI

def ask(client, *said):
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), said)]
    return client.chat.completions.create(model="any", messages=messages).choices[0].message

def solve(task):
    client = OpenAI(max_retries=0)
    print("let me see")
    first = ask(client, task["question"])
    ask(client, task["question"], "Not what it said.", "And one more.")
    return {"correct": 0.5, "id": len(task["id"])}

def talks(task):
    return ask(OpenAI(max_retries=0), "Hello").content

def fails(task):
    raise ValueError("no idea")

def marks(task):
    open("mark", "w").close()

def number(task):
    return 0.25

def idle(task):
    return task

def score(task, episode):
    return {"calls": len(episode.calls)}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "180")
    (tmp_path / "agent.py").write_text(AGENT)
    return tmp_path


@pytest.fixture
def web(tiny_llama: Path, here: Path) -> Iterator[Served]:
    folder = here / "runs" / "try"
    folder.mkdir(parents=True)
    with served(tiny_llama, store=str(folder / "episodes.db"), aliases=["*"]) as web:
        yield web


def lrl_run(*arguments: str) -> int:
    return main(["run", *arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said about arguments that cannot be run."""
    try:
        code = lrl_run(*arguments)
    except SystemExit as exit:  # argparse's
        code = int(str(exit.code))
    assert code == 2
    return capsys.readouterr().err


def test_a_function_runs_and_its_trace_is_shown(web: Served, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["agent.py:solve", "--server", web.url, "--task", '{"question": "What is [b]12[/b] * 7?"}']
    assert lrl_run(*arguments) == 0
    shown = capsys.readouterr().out
    for text in (
        "completed",
        '{"correct": 0.5, "id": 13}',
        "The numbers that it returned are its answer, no rewards",
        "What is [b]12[/b] * 7?",
        "2 calls, 2 tokens sampled",
        "call 0  root",
        "call 1  history edited at token ",
        "agent solve",
        "let me see",
        "stored in runs/try/episodes.db; again: lrl traces show runs/try try.0.task-",
        "lrl run recipe.yaml",
    ):
        assert text in shown
    name = re.findall(r"try\.0\.task-\w+\.\d\.0\.\w{8}", shown)[0]
    assert main(["traces", "show", "runs/try", name]) == 0
    assert "What is [b]12[/b] * 7?" in capsys.readouterr().out
    assert lrl_run(*arguments, "--json", "--seed", "3", "--max-tokens", "7", "--reward", "agent:score") == 0
    episode = json.loads(capsys.readouterr().out)
    again = episode["start"]["id"]
    assert again[:-8] == name[:-8].replace(".0.0.", ".1.0."), "the next sample of the same task"
    assert again[-8:] != name[-8:], "which nobody else can have begun"
    assert episode["start"]["sampling"]["seed"] == 3
    assert [(reward["name"], reward["value"]) for reward in episode["rewards"]] == [("calls", 2.0)]
    assert web.manager.submitted[-1].sampling.max_tokens == 7
    with Store.open(here / "runs" / "try" / "episodes.db") as store:
        assert len(store.episodes(phase="try")) == 2


def test_an_agent_that_fails_says_why_and_exits_with_1(web: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert lrl_run("agent.py:fails", "--server", web.url, "--task", "{}") == 1
    shown = capsys.readouterr().out
    assert "agent_error" in shown
    assert "ValueError: no idea" in shown


def test_what_is_missing_is_said(web: Served, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lrl_run("agent.py:idle", "--server", f"{web.url}/v1", "--task", '{"id": 3}') == 0
    shown = capsys.readouterr().out
    assert "It made no call: does it take its base URL from OPENAI_BASE_URL" in shown
    assert "It gave no reward" in shown
    assert lrl_run("agent.py:number", "--server", web.url, "--task", "{}") == 0
    assert "The number that it returned is its reward, named 'return'." in capsys.readouterr().out
    said = refused(capsys, "agent.py:marks", "--server", web.url, "--task", "{}", "--out", str(here / "elsewhere"))
    assert not (here / "mark").exists(), "its agent does not begin"
    with Store.open(here / "elsewhere" / "episodes.db") as store:
        assert [episode.outcome for episode in store.episodes()] == [Outcome.CANCELLED]
    assert f"does not record in {here / 'elsewhere' / 'episodes.db'}" in said
    assert "lrl serve --model MODEL --store" in said


def test_what_cannot_be_run_is_refused_before_anything_starts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "task.json").write_bytes(b"\xff")
    task = ["--task", '{"id": "t"}']
    for arguments, said in (
        (["agent.py:slove", "--model", "m", *task], "defines no 'slove' at its top level (did you mean 'solve'?)"),
        (["agnet:solve", "--model", "m", *task], "there is no module agnet"),
        (["agent.py:solve", "--model", "tiny-lama", *task], "did you mean 'tiny-llama'?"),
        (["agent.py:solve", *task], "which model?"),
        (["agent.py:solve", "--model", "m"], "which task?"),
        (["--model", "m", *task], "which agent?"),
        (["agent.py:solve", "--command", "node x.js", *task], "give a function or --command, not both"),
        (["--command", "nodee x.js", "--model", "m", *task], "there is no program 'nodee' on PATH"),
        (["--command", "node 'x", "--model", "m", *task], "no closing quotation"),
        (["agent.py:solve", "--model", "m", "--task", "[1]"], "the task must be a JSON object, not [1]"),
        (["agent.py:solve", "--model", "m", "--task", '{"a": NaN}'], "NaN is no JSON"),
        (["agent.py:solve", "--model", "m", "--task", r'{"a": "\ud83d"}'], "half of a letter (a lone surrogate)"),
        (["agent.py:solve", "--model", "m", "--task", '{"a": "\udcff"}'], "half of a letter (a lone surrogate)"),
        (["agent.py:solve", "--model", "m", "--task", '{"id": null}'], "a task's id must be text or a whole number"),
        (["agent.py:solve", "--model", "m", "--task-file", "none.json"], "none.json: No such file"),
        (["agent.py:solve", "--model", "m", "--task-file", "task.json"], "not UTF-8"),
        (["agent.py:solve", "--model", "m", "--reward", "agent.py:skore", *task], "did you mean 'score'?"),
        (
            ["agent.py:solve", "--server", "http://127.0.0.1:9", *task],
            "no rollout server answers at http://127.0.0.1:9",
        ),
        (["agent.py:solve", "--model", "m", "--max-tokens", "0", *task], "'0' is not a whole number above 0"),
        (["recipe.yaml"], "recipe.yaml: No such file"),
    ):
        assert said in refused(capsys, *arguments), arguments


def test_a_model_is_started_for_a_program(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = ROOT / "recipes" / "agents" / "calculator.js"
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    task = '{"question": "What is 1 + 1?"}'
    code = lrl_run("--command", f"node {script}", "--model", "tiny-llama", "--task", task, "--max-tokens", "4")
    shown = capsys.readouterr().out
    assert code == 0, shown
    assert f"agent node {script}" in shown
    assert "call 0  root" in shown
    assert "4 tokens sampled" in shown


def test_a_task_of_a_recipe_is_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "recipes" / "smoke.yaml")
    assert "(did you mean 'eval-0001'?)" in refused(capsys, recipe, "--task", "eval-001")
    assert lrl_run(recipe, "sampling.max_tokens=3", "--task", "eval-0001") == 0
    shown = capsys.readouterr().out
    assert "task eval-0001" in shown
    assert "vowels = " in shown


def test_a_recipe_with_a_store_of_its_own_is_recorded_there(
    here: Path, postgres: PostgresServer, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, url = str(ROOT / "recipes" / "smoke.yaml"), postgres.url().partition("&run=")[0]
    assert lrl_run(recipe, "sampling.max_tokens=1", f"recording.store={url}") == 0
    shown = capsys.readouterr().out
    assert f"stored in {url}&run=" in shown
    assert "lrl traces show runs/try-smoke try.0." in shown
    assert not (here / "runs" / "try").exists(), "which keeps the store that it has"
    with Store.open(store_of(here / "runs" / "try-smoke")) as store:
        assert [episode.outcome for episode in store.episodes()] == [Outcome.COMPLETED]
