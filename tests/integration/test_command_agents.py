"""Agents that are programs of their own: real processes, everything that they may write, and what becomes of it."""

import json
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rl.episode import EpisodeStart, Outcome, Sampling, Task
from lightning_rl.store import Store
from tests.integration.served_web import served
from trainers.runner.command_agent import CommandFailed, _Lines
from trainers.runner.pool import EpisodeResult, RunnerPool, episode_id
from trainers.runner.words import Command

ROOT = Path(__file__).parents[2]
AGENT = r"""
import json, os, subprocess, sys, time
line = sys.stdin.buffer.readline()
assert sys.stdin.read() == "", "standard input is closed after the task"
task = json.loads(line)
assert json.load(open(os.environ["LRL_TASK"])) == task
out = sys.stdout.buffer

def say(text):
    out.write(text.encode() if isinstance(text, str) else text)
    out.flush()

match task["how"]:
    case "well":
        say('thinking\n{"no": "word of ours"}\n{"reward": 0.5, "name": "valid"}\n{"reward": 2}\n')
        names = ["OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "LRL_EPISODE"]
        say(json.dumps({"answer": {"env": [os.environ[name] for name in names], "cwd": os.getcwd()}}))
    case "silently":
        pass
    case "in pieces":
        for letter in '{"answer": "ä"}\r\n{"reward": 1}'.encode():
            say(bytes([letter]))
    case "at length":
        say(b"x" * 10_000_000 + b"\n" + json.dumps({"answer": "y" * 10_000_000}).encode() + b"\n" + b"\xff\xfe\n" * 9)
    case "with company":
        child = "import time\nwhile True: print('x' * 1000, flush=True)" if task["id"] == "loud" else "import time; time.sleep(99)"
        process = subprocess.Popen([sys.executable, "-c", child])
        say(json.dumps({"answer": process.pid}) + "\n")
    case "deaf":
        os.close(0)
        say('{"answer": 1}\n')
    case "code":
        print("the reason", file=sys.stderr)
        say('{"answer": 1}\n')
        sys.exit(3)
    case "signal":
        os.kill(os.getpid(), 9)
    case "hang":
        process = subprocess.Popen(["sleep", "300"])
        say('{"reward": 1}\n')
        open(task["pid"], "w").write(str(process.pid))
        time.sleep(300)
    case "bytes":
        say(task["text"].encode("latin-1"))
"""
BAD = {
    "nan": ('{"reward": NaN}\n', 'a reward must be a finite number: {"reward": NaN}'),
    "huge": ('{"reward": 1e999}\n', "a reward must be a finite number"),
    "integer": ('{"reward": 1' + "0" * 400 + "}\n", "a reward must be a finite number"),
    "string": ('{"reward": "high"}', 'a reward must be a finite number: {"reward": "high"}'),
    "true": ('{"reward": true, "name": "ok"}\n', "a reward must be a finite number"),
    "name": ('{"reward": 1, "name": 2}\n', "a reward's name must be text"),
    "twice": ('{"answer": 1}\n{"answer": 2}\n', 'answered a second time: {"answer": 2}'),
    "latin": ('{"answer": "\xe4"}\n', "a line that is not UTF-8"),
    "surrogate": ('{"answer": "\\ud800"}\n', "not JSON"),
    "infinite": ('{"answer": Infinity}\n', "the agent returned a float, which is not JSON"),
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "episodes.db") as store:
        yield store


@pytest.fixture
def somebody_listens() -> Iterator[str]:
    """An address where connections are taken: an agent's failure is then its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def run(tmp_path: Path, store: Store, somebody_listens: str) -> Callable[..., list[EpisodeResult]]:
    (tmp_path / "agent.py").write_text(AGENT)

    def run(tasks: dict[str, dict[str, Any]], *words: str, **settings: Any) -> list[EpisodeResult]:
        command = Command(words=list(words) or [sys.executable, "-I", "agent.py"], folder=str(tmp_path))
        given = {"must_reward": False, "server_url": somebody_listens, "timeout_s": 120.0, "max_attempts": 1}
        with RunnerPool(agent_command=command, store=store, **(given | settings)) as pool:
            return pool.run(
                [
                    EpisodeStart(
                        id=episode_id("train", 0, name, 0),
                        task=Task(id=name, input=fields),
                        phase="train",
                        sampling=Sampling(seed=1),
                    )
                    for name, fields in tasks.items()
                ]
            )

    return run


def test_a_program_gets_its_task_and_gives_answer_and_rewards(
    run: Callable[..., list[EpisodeResult]], store: Store, tmp_path: Path, somebody_listens: str
) -> None:
    tasks = {name: {"how": how} for name, how in {"a": "well", "b": "silently", "c": "in pieces", "d": "deaf"}.items()}
    tasks["big"] = {"how": "in pieces", "text": "é" * 1_000_000}
    well, silent, pieces, deaf, big = run(tasks)
    base = f"{somebody_listens}/e/{well.start.id}"
    assert well.answer == {"env": [f"{base}/v1", base, f"{base}/v1/traces", well.start.id], "cwd": str(tmp_path)}
    assert {reward.name: reward.value for reward in well.rewards} == {"valid": 0.5, "reward": 2.0}
    assert (silent.outcome, silent.answer) == (Outcome.COMPLETED, None)
    for result in (pieces, big):
        assert (result.answer, [reward.value for reward in result.rewards]) == ("ä", [1.0]), result.error
    assert deaf.answer == 1, deaf.error
    (span,) = store.episode(well.start.id).spans
    assert (span.kind, span.name) == ("agent", f"{sys.executable} -I agent.py")
    assert well.output == 'thinking\n{"no": "word of ours"}\n', "every other line is log"


def test_a_flood_and_a_child_left_behind_are_bounded(run: Callable[..., list[EpisodeResult]]) -> None:
    begun = time.monotonic()
    long, quiet, loud = run({name: {"how": how} for name, how in COMPANY.items()}, concurrency=3)
    assert time.monotonic() - begun < 60
    assert long.answer == "y" * 10_000_000, long.error
    assert len(long.output) <= 4000
    assert isinstance(quiet.answer, int)
    assert isinstance(loud.answer, int)
    for pid in (quiet.answer, loud.answer):
        assert gone(pid), "what a program leaves behind ends with its episode"


COMPANY = {"long": "at length", "quiet": "with company", "loud": "with company"}


def gone(pid: int) -> bool:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_bad_lines_are_errors_of_their_own_episodes(run: Callable[..., list[EpisodeResult]], store: Store) -> None:
    tasks: dict[str, dict[str, Any]] = {name: {"how": "bytes", "text": text} for name, (text, _) in BAD.items()}
    tasks["good"] = {"how": "well"}
    *bad, good = run(tasks)
    for result in bad:
        assert (result.outcome, result.counted) == (Outcome.AGENT_ERROR, False)
        said = BAD[result.start.task.id][1]
        assert said in str(store.episode(result.start.id).error)
        assert "Traceback" not in str(result.error)
    assert good.counted


def test_how_a_program_ends_is_an_outcome(
    run: Callable[..., list[EpisodeResult]], tmp_path: Path, store: Store
) -> None:
    code, killed = run({how: {"how": how} for how in ("code", "signal")})
    (hung,) = run({"hang": {"how": "hang", "pid": str(tmp_path / "pid")}}, timeout_s=3.0)
    assert code.outcome is Outcome.AGENT_ERROR
    assert "exit code 3" in str(code.error)
    assert "the reason" in str(code.error)
    assert killed.outcome is Outcome.INFRASTRUCTURE_ERROR
    assert "signal 9" in str(killed.error)
    assert hung.outcome is Outcome.TIMEOUT
    assert [reward.value for reward in hung.rewards] == [1.0], "what came before the end is kept"
    assert gone(int((tmp_path / "pid").read_text()))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    (alone,) = run({"alone": {"how": "code"}}, server_url=f"http://127.0.0.1:{free}")
    assert alone.outcome is Outcome.INFRASTRUCTURE_ERROR, "it failed because the server is gone"


def test_a_program_that_must_reward_and_does_not_has_failed(run: Callable[..., list[EpisodeResult]]) -> None:
    tasks = {"a": {"how": "silently"}, "b": {"how": "well"}, "c": {"how": "bytes", "text": '{"answer": 5}\n'}}
    tasks["d"] = {"how": "bytes", "text": '{"answer": {"valid": 5}}\n'}
    silent, well, *answered = run(tasks, must_reward=True, reward_names=["valid"])
    assert (silent.outcome, well.outcome) == (Outcome.AGENT_ERROR, Outcome.COMPLETED)
    assert "gave no reward: it answered NoneType None" in str(silent.error)
    for result in answered:
        assert (result.outcome, result.rewards) == (Outcome.AGENT_ERROR, []), "an answer is no reward"
        assert 'Write a line such as {"reward": 0.5}' in str(result.error)


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 7))
def test_whatever_is_written_is_log_or_ours_however_it_is_cut(lines: list[bytes], size: int) -> None:
    rewards: list[tuple[float, str]] = []
    reader = _Lines(lambda value, name: rewards.append((value, name)))
    text = b"\n".join([line.replace(b"\n", b"") for line in lines] + [b'{"reward": 1}', b'{"answer": [2]}'])
    try:
        for at in range(0, len(text), size):
            reader.feed(text[at : at + size])
        reader.end()
    except CommandFailed:
        return
    assert rewards[-1] == (1.0, "reward")
    assert reader.answer == [2]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_node_agent_of_the_recipes_is_recorded_call_by_call(
    tmp_path: Path, tiny_llama: Path, run: Callable[..., list[EpisodeResult]], store: Store
) -> None:
    with served(tiny_llama, store=str(tmp_path / "episodes.db"), aliases=["*"]) as web:
        tasks = {f"t{i}": {"question": f"What is {i} + {i}?"} for i in range(3)}
        results = run(tasks, "node", str(ROOT / "recipes" / "agents" / "calculator.js"), server_url=web.url)
    for i, result in enumerate(results):
        assert result.outcome is Outcome.COMPLETED, result.error
        episode = store.episode(result.start.id)
        assert episode.calls
        assert all(f"What is {i} + {i}?" in json.dumps(call.request) for call in episode.calls)
        assert isinstance(result.answer, str)


def test_a_program_that_cannot_be_started_says_so(run: Callable[..., list[EpisodeResult]]) -> None:
    (result,) = run({"a": {}}, "/no/such/program")
    assert result.outcome is Outcome.AGENT_ERROR
    assert "cannot start '/no/such/program'" in str(result.error)
