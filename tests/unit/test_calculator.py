"""The calculator recipe: the agent against a plain OpenAI-compatible server, its tasks, and its reward."""

import ast
import json
import re
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rl.episode import Call, Episode, EpisodeStart, Outcome, Task
from trainers.runner.user_code import load_function

AGENTS = Path(__file__).parents[2] / "recipes" / "agents"
solve = load_function(AGENTS / "calculator.py", "solve")
calculator = sys.modules[solve.__module__]
make_tasks = load_function(AGENTS / "calculator_tasks.py", "make_tasks")
calculator_tasks = sys.modules[make_tasks.__module__]


class Mock:
    """An OpenAI-compatible server that answers with prepared messages and keeps what it was asked."""

    def __init__(self) -> None:
        self.replies: list[dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        mock = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/chat/completions"
                mock.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                message = {"role": "assistant", "content": None} | mock.replies.pop(0)
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                payload = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def mock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mock]:
    mock = Mock()
    thread = threading.Thread(target=mock.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("OPENAI_BASE_URL", mock.url)
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield mock
    mock.server.shutdown()
    mock.server.server_close()
    thread.join()


def tool_call(arguments: str, name: str = "calculator", call_id: str = "call_0") -> dict[str, Any]:
    return {"tool_calls": [{"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}]}


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


# the agent ------------------------------------------------------------------------------------------------------------


def test_solves_over_two_turns(mock: Mock) -> None:
    mock.replies = [tool_call('{"expression": "12*7+15"}'), {"content": "99"}]
    assert solve({"id": "1", "question": "12 boxes of 7 pens and 15 more?"}) == "99"
    first, second = mock.requests
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    assert first["tools"] == calculator.TOOLS
    assert second["messages"][:2] == first["messages"]
    assert second["messages"][-1] == {"role": "tool", "tool_call_id": "call_0", "content": "99"}


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (tool_call('{"expression": "1/0"}'), "error"),
        (tool_call('{"expression": '), "error"),
        (tool_call('"12"'), "error"),
        (tool_call('{"sum": "1+1"}'), "error"),
        (tool_call('{"expression": 12}'), "error"),
        (tool_call('{"expression": "__import__(1)"}'), "error"),
        (tool_call("{}", name="search"), "no tool 'search'"),
    ],
)
def test_tells_the_model_what_was_wrong(mock: Mock, reply: dict[str, Any], told: str) -> None:
    mock.replies = [reply, {"content": "sorry"}]
    assert solve({"question": "?"}) == "sorry"
    assert told in mock.requests[1]["messages"][-1]["content"]


def test_stops_after_four_turns(mock: Mock) -> None:
    mock.replies = [tool_call('{"expression": "1+1"}') for _ in range(9)]
    assert solve({"question": "?"}) == ""
    assert len(mock.requests) == 4


def test_agent_imports_nothing_of_ours() -> None:
    modules = {
        node.module if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse((AGENTS / "calculator.py").read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert modules <= {"openai", *sys.stdlib_module_names}


# the tool -------------------------------------------------------------------------------------------------------------

expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: "({}{}{})".format(*parts)),
    max_leaves=5,
)


def exact(expression: str) -> Fraction:
    return eval(re.sub(r"\d+", r"Fraction(\g<0>)", expression), {"Fraction": Fraction})


@given(expressions)
def test_evaluates_as_exact_arithmetic(expression: str) -> None:
    try:
        expected = exact(expression)
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            calculator.evaluate(expression)
        return
    result = calculator.evaluate(expression)
    if expected.denominator == 1:
        assert result == str(expected)
    else:
        assert float(result) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    "expression",
    ["", "x", "2**9", "1.5", "True", "'a'*9", "f(1)", "a.b", "[1]", "1;2", "1 2", "9" * 50, "1+" * 60 + "1", "(" * 99,
     "1000000*1000000*10", "1 if 1 else 2", "\0"],
)  # fmt: skip
def test_refuses_anything_else(expression: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        calculator.evaluate(expression)


# the tasks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def splits() -> dict[str, Any]:
    return make_tasks(seed=0, train=200, warm_start=120, eval=80)


def test_sizes_ids_and_answers(splits: dict[str, Any]) -> None:
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 200, "warm_start": 120, "eval": 80}
    for rows in splits.values():
        assert len(set(rows["id"])) == len(set(rows["question"])) == len(rows)
        assert all(answer > 0 for answer in rows["answer"])
        for question in rows["question"]:
            assert all(1 <= int(number) <= 999 for number in re.findall(r"\d+", question))


def test_splits_share_no_numbers_whatever_the_seed(splits: dict[str, Any]) -> None:
    other = make_tasks(seed=1, train=200, warm_start=120, eval=80)

    def numbers(split: str) -> set[tuple[str, ...]]:
        questions = [*splits[split]["question"], *other[split]["question"]]
        return {tuple(sorted(re.findall(r"\d+", question))) for question in questions}

    assert not numbers("train") & numbers("eval")
    assert other["train"]["question"] != splits["train"]["question"]


def test_same_seed_same_tasks_and_a_larger_split_begins_alike(splits: dict[str, Any]) -> None:
    larger = make_tasks(seed=0, train=300, warm_start=120, eval=80)
    assert larger["train"]["question"][:200] == splits["train"]["question"]
    assert larger["eval"].to_list() == splits["eval"].to_list()


def test_splits_that_overlap_are_refused() -> None:
    problem = {"numbers": [1, 2]}
    with pytest.raises(ValueError, match="occur in eval and in train"):
        calculator_tasks._check_disjoint({"train": [problem], "eval": [problem]})


def test_too_many_tasks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calculator_tasks.BUCKETS, "train", range(0))
    monkeypatch.setattr(calculator_tasks, "MAX_DRAWS", 10)
    with pytest.raises(ValueError, match="ask for fewer"):
        make_tasks(seed=0, train=5, warm_start=1, eval=1)


def test_warm_start_is_easier_than_evaluation(splits: dict[str, Any]) -> None:
    def operations(row: dict[str, Any]) -> int:
        return len(re.findall(r"\d+", row["question"])) - 1

    assert {operations(row) for row in splits["warm_start"]} == {1}
    assert {operations(row) for row in splits["train"]} == {2}
    assert {operations(row) for row in splits["eval"]} == {2, 3}


def test_demonstrations_are_what_the_agent_would_have_done(mock: Mock, splits: dict[str, Any]) -> None:
    for row in list(splits["warm_start"])[:6]:
        messages = without_none(row["messages"])
        mock.replies = [messages[2], messages[4]]
        mock.requests.clear()
        assert solve({"id": row["id"], "question": row["question"]}) == str(row["answer"])
        assert mock.requests[1]["messages"] == messages[:4]
        assert mock.requests[1]["tools"] == row["tools"]


# the reward -----------------------------------------------------------------------------------------------------------


def episode(answer: Any, response: dict[str, Any] | None) -> Episode:
    start = EpisodeStart(
        id="e", task=Task(id="t", input={"question": "12 boxes of 7, and 15", "answer": 99}), phase="train"
    )
    calls = [] if response is None else [
        Call(id="c", episode_id="e", index=0, model="m", prompt_ids=[1], sampled_ids=[2], logprobs=[-1.0], versions=[0],
             temperature=1.0, finish_reason="stop", response=response)
    ]  # fmt: skip
    return Episode(start=start, calls=calls, answer=answer, outcome=Outcome.COMPLETED)


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("99", tool_call('{"expression": "12*7+15"}'), {"correct": 1, "well_formed": 1, "numbers": 1}),
        ("84", tool_call('{"expression": "12*7"}'), {"correct": 0, "well_formed": 1, "numbers": 2 / 3}),
        ("84", tool_call('{"expression": "12*12*12"}'), {"correct": 0, "well_formed": 1, "numbers": 1 / 3}),
        ("The answer is 99.", {"content": "99"}, {"correct": 1, "well_formed": 0, "numbers": 0}),
        ("99.0", tool_call("{"), {"correct": 1, "well_formed": 0, "numbers": 0}),
        ("99 or 84", tool_call('{"expression": "1/0"}'), {"correct": 0, "well_formed": 0, "numbers": 0}),
        ("", tool_call('{"expression": "2"}'), {"correct": 0, "well_formed": 1, "numbers": 0}),
        (None, None, {"correct": 0}),
    ],
)
def test_score(answer: Any, response: dict[str, Any] | None, expected: dict[str, float]) -> None:
    record = episode(answer, response)
    rewards = calculator_tasks.score(record.start.task, record)
    assert {reward.name: reward.value for reward in rewards} == expected
    assert all((reward.call_id == "c") == (reward.name != "correct") for reward in rewards)


def test_thousands_separators() -> None:
    assert calculator_tasks.last_number("1,234") == 1234
    assert calculator_tasks.last_number("12, 34") == 34


def test_smoke_reward() -> None:
    score = load_function(AGENTS / "smoke_reward.py", "score")
    record = episode("", {"content": "aEx9"})
    assert score(record.start.task, record) == {"vowels": 0.5}
    empty = episode("", {"content": None})
    assert score(empty.start.task, empty) == {"vowels": 0.0}
