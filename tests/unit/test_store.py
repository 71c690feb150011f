import math
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import event

from lightning_rl.episode import EpisodeStart, Outcome, Reward, Sampling, Span, Task
from lightning_rl.errors import StoreError
from lightning_rl.store import Store
from tests.unit.domain import make_call, make_start

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "episodes.db") as store:
        yield store


def full_call(**values):
    return make_call(
        [1, 2, 3],
        [70_000, 2**31 - 1],
        **{
            "logprobs": [-0.1, math.nextafter(-1.0, 0)],
            "versions": [3, 4],
            "parent_id": "p",
            "relation": "edit",
            "parted_at": 2,
            "span_id": "s",
            "experts": b"\x00\x01",
            "cached_tokens": 2,
            "request": {"messages": [{"role": "user", "content": "héllo \ud83d"}]},
            "response": {"content": None, "tool_calls": [{"id": "x"}]},
            "started_at": 1.25,
            "ended_at": 2.5,
        }
        | values,
    )


def test_an_episode_comes_back_as_it_was_written(store):
    start = EpisodeStart(
        id="e",
        task=Task(id="t", input={"question": "?", "answer": [1, {"a": None}]}),
        phase="train",
        step=2,
        sample=3,
        attempt=1,
        group="g",
        sampling=Sampling(temperature=1.0, max_tokens=5, seed=2**62),
        started_at=10.5,
    )
    spans = [
        Span(id="s1", episode_id="e", name="solve", kind="agent", started_at=1.0, ended_at=4.0),
        Span(
            id="s2",
            episode_id="e",
            name="calc",
            kind="tool",
            parent_id="s1",
            started_at=2.0,
            attributes={"a": [1]},
            error="E",
        ),
    ]
    rewards = [
        Reward(episode_id="e", name="correct", value=0.1, time=3.0),
        Reward(episode_id="e", name="well_formed", value=1.0, call_id="c", span_id="s2"),
    ]
    store.begin(start)
    store.add_call(full_call())
    store.add_spans(spans[:1])
    store.add_rewards(rewards[:1])
    running = store.episode("e")
    assert (running.outcome, running.answer, running.counted) == (None, None, False)
    store.end(
        "e", Outcome.COMPLETED, answer={"x": [1, "é"]}, counted=True, spans=spans[1:], rewards=rewards[1:], ended_at=9.0
    )
    episode = store.episode("e")
    assert episode.start == start == store.start_of("e")
    assert episode.calls == [full_call()]
    assert episode.spans == spans
    assert episode.rewards == rewards
    assert (episode.outcome, episode.answer, episode.error) == (Outcome.COMPLETED, {"x": [1, "é"]}, None)
    assert (episode.counted, episode.ended_at) == (True, 9.0)


def test_writing_twice_is_writing_once(store):
    store.begin(make_start(step=1))
    store.begin(make_start(step=2))
    store.add_call(full_call())
    store.add_call(full_call())
    for _ in range(2):
        store.end(
            "e",
            Outcome.TIMEOUT,
            counted=False,
            error="slow",
            spans=[Span(id="s", episode_id="e", name="n", kind="tool")],
            rewards=[Reward(episode_id="e", name="r", value=1.0)],
            ended_at=1.0,
        )
    episode = store.episode("e")
    assert episode.start.step == 1
    assert [len(records) for records in (episode.calls, episode.spans, episode.rewards)] == [1, 1, 1]
    assert store.call_count("e") == 1


def test_span_ids_are_unique_within_an_episode_only(store):
    for name in ("e1", "e2"):
        store.begin(make_start(name))
        store.add_spans([Span(id="tool-call_0", episode_id=name, name="calc", kind="tool")])
    assert [len(episode.spans) for episode in store.episodes()] == [1, 1]


def test_indices_of_calls_go_on_behind_gaps(store):
    store.begin(make_start())
    assert store.next_call_index("e") == 0
    for index in (0, 4):
        store.add_call(msgspec.structs.replace(full_call(), id=f"c{index}", index=index))
    assert (store.next_call_index("e"), store.call_count("e")) == (5, 2)


def test_an_episode_ends_once(store):
    store.begin(make_start())
    store.end("e", Outcome.TIMEOUT, counted=False, ended_at=1.0)
    with pytest.raises(StoreError, match="has ended as timeout and cannot end again as completed"):
        store.end("e", Outcome.COMPLETED, counted=True, ended_at=2.0)
    assert store.episode("e").outcome is Outcome.TIMEOUT


def test_an_end_that_fails_leaves_the_episode_running(store):
    store.begin(make_start())
    nan = Reward(episode_id="e", name="r", value=math.nan)
    with pytest.raises(StoreError, match="reward 'r' of episode e is nan"):
        store.end("e", Outcome.COMPLETED, counted=True, rewards=[nan], ended_at=1.0)
    with pytest.raises(StoreError, match="the answer of episode e cannot be written as JSON"):
        store.end("e", Outcome.COMPLETED, answer=object(), counted=True, ended_at=1.0)
    assert store.episode("e").outcome is None


def test_unknown_episodes(store):
    assert store.start_of("e") is None
    assert store.call_count("e") == 0
    actions = [
        lambda: store.episode("e"),
        lambda: store.add_call(full_call()),
        lambda: store.add_spans([Span(id="s", episode_id="e", name="n", kind="tool")]),
        lambda: store.add_rewards([Reward(episode_id="e", name="r", value=1.0)]),
        lambda: store.end("e", Outcome.COMPLETED, counted=True, ended_at=1.0),
    ]
    for action in actions:
        with pytest.raises(StoreError, match="no episode e in"):
            action()


def test_a_call_must_have_a_logprob_and_a_version_for_each_token(store):
    store.begin(make_start())
    with pytest.raises(StoreError, match="2 sampled ids, 1 log-probs and 2 versions"):
        store.add_call(full_call(logprobs=[-1.0]))


def test_lists_are_filtered_and_in_order(store):
    keys = [("train", 1, "a", 0, 0), ("train", 0, "b", 1, 0), ("train", 0, "b", 0, 1), ("train", 0, "b", 0, 0),
            ("eval-base", 0, "a", 0, 0)]  # fmt: skip
    for number, (phase, step, task, sample, attempt) in enumerate(keys):
        task_record = Task(id=task, input={})
        store.begin(
            EpisodeStart(id=f"e{number}", task=task_record, phase=phase, step=step, sample=sample, attempt=attempt)
        )
    store.add_call(full_call(episode_id="e1"))
    store.add_call(full_call(episode_id="e1", id="c2", index=1))
    rewards = [Reward(episode_id="e1", name=name, value=value) for name, value in [("b", 1.0), ("a", 0.5), ("b", 2.0)]]
    store.end("e1", Outcome.COMPLETED, counted=True, rewards=rewards, ended_at=5.0)

    assert [episode.id for episode in store.episodes(phase="train")] == ["e3", "e2", "e1", "e0"]
    assert [episode.id for episode in store.episodes(phase="train", step=1)] == ["e0"]
    assert [episode.id for episode in store.episodes(counted_only=True)] == ["e1"]
    assert [call.id for call in store.episodes(counted_only=True)[0].calls] == ["c", "c2"]
    summaries = {summary.id: summary for summary in store.starts(step=0)}
    assert list(summaries) == ["e4", "e3", "e2", "e1"]
    done = summaries["e1"]
    assert (done.calls, done.sampled_tokens, done.rewards) == (2, 4, {"b": 3.0, "a": 0.5})
    assert (done.outcome, done.counted, done.ended_at) == (Outcome.COMPLETED, True, 5.0)
    assert (summaries["e3"].calls, summaries["e3"].rewards, summaries["e3"].outcome) == (0, {}, None)


def test_threads_share_a_store(store):
    store.begin(make_start())
    failures = []

    def write(thread):
        try:
            for number in range(10):
                store.add_call(full_call(id=f"{thread}-{number}"))
        except StoreError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.call_count("e") == 160


WRITER = """
import sys
from lightning_rl.store import Store
from tests.unit.domain import make_call, make_start
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
with Store.open(path) as store:
    store.begin(make_start(name))
    for number in range(count):
        store.add_call(make_call(range(500), [1, 2], id=f"{name}-{number}", episode_id=name, index=number))
        print(number, flush=True)
"""


def start_writer(path, name, count):
    command = [sys.executable, "-c", WRITER, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_processes_open_and_write_at_the_same_time(tmp_path):
    path = tmp_path / "episodes.db"  # none of them finds the file
    writers = [start_writer(path, f"e{n}", 50) for n in range(4)]
    for writer in writers:
        writer.communicate(timeout=60)
    assert [writer.returncode for writer in writers] == [0] * 4
    with Store.open(path) as store:
        assert [len(episode.calls) for episode in store.episodes()] == [50] * 4


def test_what_was_written_survives_kill_9(tmp_path):
    path = tmp_path / "episodes.db"
    writer = start_writer(path, "e", 100_000)
    for line in writer.stdout:
        if int(line) >= 20:
            break
    writer.send_signal(signal.SIGKILL)
    acknowledged = [int(line) for line in writer.stdout if line.endswith("\n")]
    writer.wait(timeout=10)
    last = max(acknowledged, default=20)
    with Store.open(path) as store:
        indices = [call.index for call in store.episode("e").calls]
    assert indices in (list(range(last + 1)), list(range(last + 2)))


def test_a_full_disk_is_told_and_nothing_is_half_written(store):
    def limit(connection, _record):
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 4}")

    store.begin(make_start())
    store.close()  # the next connection has room for four more pages only
    event.listen(store._engine, "connect", limit)
    with pytest.raises(StoreError, match="database or disk is full") as caught:
        store.add_call(full_call(request={"text": "x" * 100_000}))
    assert "free some space" in caught.value.hint
    assert store.call_count("e") == 0
    store.add_call(full_call())
    assert store.call_count("e") == 1


def test_places_that_cannot_be_opened(tmp_path):
    with pytest.raises(StoreError, match="unable to open database file") as caught:
        Store.open(tmp_path / "no" / "episodes.db")
    assert "folder exists" in caught.value.hint
    text = tmp_path / "text.db"
    text.write_text("this is not a database, but long enough to be read as one" * 20)
    with pytest.raises(StoreError, match="file is not a database"):
        Store.open(text)
    with pytest.raises(StoreError, match="must be an SQLite file"):
        Store.open("postgresql://localhost/episodes")
    with pytest.raises(StoreError, match="must be an SQLite file"):
        Store.open("sqlite://")


def test_a_url_names_the_same_file(tmp_path):
    path = tmp_path / "episodes.db"
    with Store.open(f"sqlite:///{path}") as store:
        store.begin(make_start())
    with Store.open(str(path)) as store:
        assert store.start_of("e") == make_start()


def test_a_file_of_the_first_version_is_brought_up_to_date(tmp_path):
    path = tmp_path / "episodes.db"
    with Store.open(path) as store:
        store.begin(make_start())
        store.add_call(full_call(relation="root", parted_at=None))
        with store._writer.begin() as connection:
            for column in ("relation", "parted_at"):
                connection.exec_driver_sql(f"ALTER TABLE calls DROP COLUMN {column}")
            connection.exec_driver_sql("PRAGMA user_version = 1")
    for _ in range(2):
        with Store.open(path) as store:
            assert store.episode("e").calls[0] == full_call(relation="root", parted_at=None)
    with Store.open(path) as store:
        store.add_call(full_call(id="second"))
        assert store.episode("e").calls[1] == full_call(id="second")


def test_another_version_of_the_schema_is_refused(tmp_path):
    path = tmp_path / "episodes.db"
    with Store.open(path) as store, store._writer.begin() as connection:
        connection.exec_driver_sql("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="has version 99"):
        Store.open(path)
