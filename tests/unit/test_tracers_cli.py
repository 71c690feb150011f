"""`lrl traces`: what it shows, and that what it shows cannot command the terminal."""

import argparse
import io
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from rich.console import Console

from lightning_rl.episode import Call, Episode, EpisodeStart, Outcome, Reward, Span, Task
from lightning_rl.errors import StoreError
from lightning_rl.store import Store
from tests.unit.domain import make_call, make_episode
from tracers.cli import COMMANDS
from tracers.commands.view import episode_view, safe

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
            started_at=3, ended_at=4, parent_id="one", cached_tokens=5, restricted=["grammar", "top_p"], response={"content": "84"},
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
                 "prompt 6 (5 cached)", "agent solve", "restricted by grammar, top_p"):  # fmt: skip
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


def test_items_of_responses_are_shown_as_messages_and_only_what_is_new() -> None:
    made = {"id": "t1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    start = [{"role": "user", "content": [{"type": "input_text", "text": "one and one"}]}]
    item = {"type": "function_call", "call_id": "t1", "name": "add", "arguments": '{"a": 1}'}
    told = [
        {"type": "reasoning", "content": []},
        item,
        {"type": "function_call_output", "call_id": "t1", "output": "2"},
    ]
    system = "You add."
    first = make_call([1], [2], id="a", started_at=1, request={"input": start, "instructions": system},
                      response={"content": None, "tool_calls": [made]})  # fmt: skip
    other = make_call(
        [1], [2], id="b", index=1, started_at=2, request={"messages": [{"role": "user", "content": "aside"}]}
    )
    second = make_call([1], [2], id="c", index=2, started_at=3, parent_id="a",
                       request={"input": start + told, "instructions": system}, response={"content": "two"})  # fmt: skip
    shown = view_of(structs.replace(make_episode("e"), calls=[first, other, second]))
    for once in (
        "system: You add.",
        "user: one and one",
        '→ add({"a": 1})',
        "tool: 2",
        "assistant: two",
        "user: aside",
    ):
        assert shown.count(once) == 1, once
    assert "input_text" not in shown


def test_parts_of_anthropics_are_shown_as_messages() -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "84"}]}
    use = {"type": "tool_use", "id": "t", "name": "times", "input": {"a": 7}}
    messages = [
        {"role": "user", "content": [result, {"type": "text", "text": "go on"}]},
        {"role": "assistant", "content": [use]},
    ]
    call = make_call([1], [2], request={"system": [{"type": "text", "text": "Be brief."}], "messages": messages})
    shown = view_of(make_episode("e", [call]))
    for text in ("system: Be brief.", "tool: 84", "user: go on", 'assistant: → times({"a": 7})'):
        assert text in shown


def test_a_tool_is_one_line_however_many_saw_it_and_its_rewards_are_there() -> None:
    made = {"id": "t1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    call = make_call([1], [2], started_at=1.0, ended_at=2.0, span_id="agent", response={"tool_calls": [made]})
    span = {"episode_id": "e", "ended_at": 3.0}
    spans = [
        Span(id="root", name="root", kind="agent", **span),
        Span(id="agent", name="adder", kind="agent", parent_id="root", started_at=0.5, **span),
        Span(id="served", name="add", kind="tool", started_at=2.0, parent_id="agent",
             attributes={"tool_call_id": "t1", "call_id": "c", "result": "2"}, **span),
        Span(id="own", name="add", kind="tool", started_at=2.1, parent_id="agent", attributes={"tool_call_id": "t1"}, **span),
    ]  # fmt: skip
    stray = make_call([1], [2], id="stray", index=1, started_at=2.5, span_id="unknown")
    rewards = [Reward(episode_id="e", name="fine", value=1, span_id="served")]
    shown = view_of(structs.replace(make_episode("e", [call, stray]), spans=spans, rewards=rewards))
    assert shown.count("tool add") == 1
    assert '"result": "2"}' in shown
    assert shown.count("fine = 1") == 1
    lines = {
        word: next(line.index(word) for line in shown.splitlines() if word in line)
        for word in ("agent adder", "call 1")
    }
    assert lines["call 1"] == lines["agent adder"], "a call whose span nobody knows is the root's"


def test_long_texts_are_cut_and_an_error_is_what_was_raised() -> None:
    try:
        try:
            raise KeyError("inner")
        except KeyError as error:
            problem = ValueError("no such table\nin the database")
            problem.add_note("For troubleshooting, see the manual")
            raise problem from error
    except ValueError as error:
        text = "".join(traceback.format_exception(error))
    group = "".join(traceback.format_exception(ExceptionGroup("several", [ValueError("one of them")])))
    spans = [
        Span(id=name, episode_id="e", name=name, kind="chain", error=error)
        for name, error in (("a", text), ("b", "never ended"), ("c", group))
    ]
    shown = view_of(
        structs.replace(make_episode("e", [make_call([1], [2], request={"prompt": "x" * 9000})]), spans=spans)
    )
    assert "ValueError: no such table" in shown
    assert "troubleshooting" not in shown
    assert "never ended" in shown
    assert "ExceptionGroup: several (1 sub-exception)" in shown
    assert "… (9000 characters)" in shown
    assert shown.count("x") < 4100


def view_of(episode: Episode) -> str:
    out = io.StringIO()
    Console(file=out, force_terminal=False, width=160).print(episode_view(episode))
    return out.getvalue()
