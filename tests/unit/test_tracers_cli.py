"""`lrl traces`: what it shows, and that what it shows cannot command the terminal."""

import argparse
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lightning_rl.episode import Call, EpisodeStart, Outcome, Reward, Span, Task
from lightning_rl.errors import StoreError
from lightning_rl.store import Store
from tracers.cli import COMMANDS
from tracers.trace_view import safe

HOSTILE = "\x1b[2J\x1b]0;title\x07[red]markup[/red] \u202e\x9b31m end"


def lrl_traces(*arguments: str) -> int:
    _, configure, run = COMMANDS["traces"]
    parser = argparse.ArgumentParser()
    configure(parser)
    return run(parser.parse_args(arguments))


@pytest.fixture
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "160")
    with Store.open(tmp_path / "episodes.db") as store:
        for sample in range(2):
            episode_id = f"train.1.t.{sample}.0"
            task = Task(id="t", input={"question": "how [bold]many[/bold]?"})
            store.begin(EpisodeStart(id=episode_id, task=task, phase="train", step=1, sample=sample, started_at=sample))
        system = {"role": "system", "content": "be brief"}
        asked = {"role": "tool", "tool_call_id": "c", "content": "84"}
        tool_calls = [{"id": "c", "type": "function", "function": {"name": "calculator", "arguments": '{"e": "12*7"}'}}]
        first = Call(
            id="one", episode_id="train.1.t.0.0", index=0, model="policy", prompt_ids=[1, 2, 3], sampled_ids=[4, 5],
            logprobs=[-0.5, -1.5], versions=[3, 3], temperature=1.0, finish_reason="tool_calls",
            started_at=1, ended_at=2, request={"messages": [system]},
            response={"content": HOSTILE, "tool_calls": tool_calls},
        )  # fmt: skip
        second = Call(
            id="two", episode_id="train.1.t.0.0", index=1, model="policy", prompt_ids=[1, 2, 3, 4, 5, 6],
            sampled_ids=[7], logprobs=[-0.25], versions=[4], temperature=1.0, finish_reason="stop",
            started_at=3, ended_at=4, parent_id="one", cached_tokens=5, response={"content": "84"},
            request={"messages": [system, {"role": "assistant", "tool_calls": tool_calls}, asked]},
        )  # fmt: skip
        store.add_call(first)
        store.add_call(second)
        store.end(
            "train.1.t.0.0", Outcome.COMPLETED, answer="84", counted=True, ended_at=5,
            spans=[Span(id="s", episode_id="train.1.t.0.0", name="solve", kind="agent", started_at=0.5, ended_at=4.5)],
            rewards=[Reward(episode_id="train.1.t.0.0", name="well_formed", value=1, call_id="one", time=2),
                     Reward(episode_id="train.1.t.0.0", name="correct", value=0.5, time=2)],
        )  # fmt: skip
        store.end("train.1.t.1.0", Outcome.TIMEOUT, error="Traceback [/oops]", counted=False, ended_at=9)
    return tmp_path


def test_list(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lrl_traces("list", str(run_directory)) == 0
    shown = capsys.readouterr().out
    assert "train.1.t.0.0" in shown
    assert "correct 0.5" in shown
    assert "timeout (not counted)" in shown


def test_list_filters(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lrl_traces("list", str(run_directory / "episodes.db"), "--phase", "eval-base") == 0
    assert "train.1" not in capsys.readouterr().out
    assert lrl_traces("list", str(run_directory), "--limit", "1") == 0
    assert "the last 1 of 2" in capsys.readouterr().out


def test_show(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lrl_traces("show", str(run_directory), "train.1.t.0.0") == 0
    shown = capsys.readouterr().out
    for text in ("how [bold]many[/bold]?", "2 calls, 3 tokens sampled", "mean log-prob -1.000", "policy 3", "policy 4",
                 "[red]markup[/red]", 'calculator({"e": "12*7"})', "tool: 84", "well_formed = 1", "correct = 0.5",
                 "prompt 6 (5 cached)", "agent solve"):  # fmt: skip
        assert text in shown
    assert shown.count("be brief") == 1, "a follow-up call shows only what is new"
    assert "\x1b" not in shown
    assert "\x9b" not in shown


def test_show_defaults_to_the_last_and_shows_its_error(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lrl_traces("show", str(run_directory)) == 0
    shown = capsys.readouterr().out
    assert "train.1.t.1.0" in shown
    assert "Traceback [/oops]" in shown


def test_what_is_not_there_is_said(run_directory: Path) -> None:
    with pytest.raises(StoreError, match=r"no episode train\.1\.t\.0\.1") as raised:
        lrl_traces("show", str(run_directory), "train.1.t.0.1")
    assert raised.value.hint == "did you mean train.1.t.0.0?"
    with pytest.raises(StoreError, match="no episode database"):
        lrl_traces("list", str(run_directory / "nowhere"))


@given(st.text(alphabet=st.characters(), max_size=40) | st.text(alphabet="\x1b[]0123;mHJ\x07\\ab\x9b\r\b", max_size=40))
def test_no_text_reaches_the_terminal_as_a_command(text: str) -> None:
    out = io.StringIO()
    Console(file=out, force_terminal=False, width=80).print(safe(text))
    assert not any((ord(letter) < 32 and letter != "\n") or 127 <= ord(letter) < 160 for letter in out.getvalue())
    out.getvalue().encode()


def test_ordinary_text_is_untouched() -> None:
    assert safe("naïve 3 × 4 → [12]\n\tok").plain == "naïve 3 × 4 → [12]\n\tok"
