import contextlib
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import event

from lightning_rl.episode import CallLink, Episode, EpisodeStart, Outcome, Reward, Sampling, Span, Task
from lightning_rl.errors import EpisodeEnded, StoreError
from lightning_rl.store import Store
from lightning_rl.store.sqlite import BUSY_SECONDS
from tests.unit.domain import make_call, make_start

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(store_place):
    with Store.open(store_place) as store:
        yield store


@pytest.fixture
def file_store(tmp_path):
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
            "restricted": ["grammar", "top_p"],
            "entropies": [0.0, 1.0 - 2**-24],
            "alternatives": [[(70_000, -0.25), (2**31 - 1, -math.inf)], []],
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
    with pytest.raises(StoreError, match="alternatives of 1 tokens and 2 sampled ids"):
        store.add_call(full_call(alternatives=[[]]))


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


def test_processes_open_and_write_at_the_same_time(store_place):
    writers = [start_writer(store_place, f"e{n}", 50) for n in range(4)]
    for writer in writers:
        writer.communicate(timeout=60)
    assert [writer.returncode for writer in writers] == [0] * 4
    with Store.open(store_place) as store:
        assert [len(episode.calls) for episode in store.episodes()] == [50] * 4


def test_what_was_written_survives_kill_9(store_place):
    writer = start_writer(store_place, "e", 100_000)
    for line in writer.stdout:
        if int(line) >= 20:
            break
    writer.send_signal(signal.SIGKILL)
    acknowledged = [int(line) for line in writer.stdout if line.endswith("\n")]
    writer.wait(timeout=60)
    last = max(acknowledged, default=20)
    with Store.open(store_place) as store:
        indices = [call.index for call in store.episode("e").calls]
    assert indices in (list(range(last + 1)), list(range(last + 2)))


def test_a_full_disk_is_told_and_nothing_is_half_written(file_store):
    store = file_store

    def limit(connection, _record):
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 4}")

    store.begin(make_start())
    store.close()  # the next connection has room for four more pages only
    event.listen(store._transactions._reader, "connect", limit)
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
    with pytest.raises(StoreError, match="cannot be in a database of the kind 'mysql'"):
        Store.open("mysql://localhost/episodes")
    with pytest.raises(StoreError, match="must be an SQLite file"):
        Store.open("sqlite://")


def test_a_url_names_the_same_file(tmp_path):
    path = tmp_path / "episodes.db"
    with Store.open(f"sqlite:///{path}") as store:
        store.begin(make_start())
    with Store.open(str(path)) as store:
        assert store.start_of("e") == make_start()


V2_TABLES = """
CREATE TABLE episodes (
  id TEXT NOT NULL PRIMARY KEY, phase TEXT NOT NULL, step INTEGER NOT NULL, task_id TEXT NOT NULL, task_input TEXT NOT NULL,
  sample INTEGER NOT NULL, attempt INTEGER NOT NULL, "group" TEXT NOT NULL, sampling TEXT NOT NULL, started_at FLOAT NOT NULL,
  outcome TEXT, counted BOOLEAN NOT NULL, answer TEXT, error TEXT, ended_at FLOAT NOT NULL);
CREATE INDEX episodes_by_phase ON episodes (phase, step);
CREATE TABLE calls (
  id TEXT NOT NULL PRIMARY KEY, episode_id TEXT NOT NULL REFERENCES episodes (id), "index" INTEGER NOT NULL,
  model TEXT NOT NULL, prompt_ids BLOB NOT NULL, sampled_ids BLOB NOT NULL, sampled_tokens INTEGER NOT NULL,
  logprobs BLOB NOT NULL, versions BLOB NOT NULL, temperature FLOAT NOT NULL, finish_reason TEXT NOT NULL, parent_id TEXT,
  relation TEXT NOT NULL, parted_at INTEGER, span_id TEXT, experts BLOB, cached_tokens INTEGER NOT NULL,
  request TEXT NOT NULL, response TEXT NOT NULL, started_at FLOAT NOT NULL, ended_at FLOAT NOT NULL);
CREATE INDEX ix_calls_episode_id ON calls (episode_id);
CREATE TABLE spans (
  episode_id TEXT NOT NULL REFERENCES episodes (id), id TEXT NOT NULL, name TEXT NOT NULL, kind TEXT NOT NULL, parent_id TEXT,
  started_at FLOAT NOT NULL, ended_at FLOAT NOT NULL, attributes TEXT NOT NULL, error TEXT, PRIMARY KEY (episode_id, id));
CREATE TABLE rewards (
  number INTEGER NOT NULL PRIMARY KEY, episode_id TEXT NOT NULL REFERENCES episodes (id), name TEXT NOT NULL,
  value FLOAT NOT NULL, time FLOAT NOT NULL, call_id TEXT, span_id TEXT);
CREATE INDEX ix_rewards_episode_id ON rewards (episode_id);
PRAGMA user_version = 2;
"""
V1 = "ALTER TABLE calls DROP COLUMN relation; ALTER TABLE calls DROP COLUMN parted_at; PRAGMA user_version = 1;"
SINCE_3 = ("restricted", "entropies", "alternatives")
SAMPLING = '{"temperature":null,"top_p":null,"max_tokens":null,"seed":null}'


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_earlier_versions_are_brought_up_to_date(tmp_path, version):
    path = tmp_path / "episodes.db"
    old = full_call(relation="root", parted_at=None, parent_id=None, restricted=[], entropies=[], alternatives=[])
    reward = Reward(episode_id="e", name="r", value=1.0, source="unknown")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(V2_TABLES + (V1 if version == 1 else ""))
        columns = 'phase, step, task_id, task_input, sample, attempt, "group", sampling, started_at, counted, ended_at'
        connection.execute(
            f"INSERT INTO episodes (id, {columns}) VALUES (?, ?, 0, 't', '{{}}', 0, 0, '', ?, 0, 0, 0)",
            ("e", "train", SAMPLING),
        )
        blobs = (
            struct.pack("<3i", 1, 2, 3), struct.pack("<2i", 70_000, 2**31 - 1), struct.pack("<2d", *old.logprobs),
            struct.pack("<2i", 3, 4), b"\0\1", json.dumps(old.request), json.dumps(old.response),
        )  # fmt: skip
        connection.execute(
            'INSERT INTO calls (id, episode_id, "index", model, sampled_tokens, temperature, finish_reason, span_id, '
            "cached_tokens, started_at, ended_at, prompt_ids, sampled_ids, logprobs, versions, experts, request, "
            "response" + (", relation) " if version == 2 else ") ")
            + "VALUES ('c', 'e', 0, 'm', 2, 1, 'stop', 's', 2, 1.25, 2.5, ?, ?, ?, ?, ?, ?, ?"
            + (", 'root')" if version == 2 else ")"),
            blobs,
        )  # fmt: skip
        connection.execute("INSERT INTO rewards (episode_id, name, value, time) VALUES ('e', 'r', 1.0, 0.0)")
        connection.commit()
    for _ in range(2):
        with Store.open(path) as store:
            episode = store.episode("e")
            assert (episode.start, episode.calls, episode.rewards) == (make_start(), [old], [reward])
            store.add_episode(episode)
    longer = {"messages": [*old.request["messages"], {"role": "assistant", "content": "é"}]}
    second = make_call([*old.prompt_ids, *old.sampled_ids, 7], [8], id="d", index=1, parent_id="c", request=longer)
    with Store.open(path) as store:
        store.add_call(second)
        store.add_links([CallLink(episode_id="e", response_id="", span_id="nobody's")])
        store.add_rewards([reward])
        assert store.episode("e").calls == [old, second]
        assert store.call("d") == second
        assert len(store.episode("e").rewards) == 2  # before version 3 nothing told a reward from its repetition
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT base_id, base_tokens FROM calls WHERE id = 'd'").fetchone() == ("c", 5)
        for value in (2, 3):  # as a process of the earlier version goes on
            connection.execute(f"INSERT INTO rewards (episode_id, name, value, time) VALUES ('e', 'r', {value}, 0.0)")
        connection.commit()
    with Store.open(path) as store:
        assert [reward.value for reward in store.episode("e").rewards] == [1, 1, 2, 3]


def test_another_version_of_the_schema_is_refused(tmp_path):
    path = tmp_path / "episodes.db"
    Store.open(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="has version 99"):
        Store.open(path)


def test_a_link_says_which_span_made_a_call(store):
    store.begin(make_start("e"))
    store.begin(make_start("other"))
    store.add_call(full_call(id="a", response_id="r1", span_id=None))
    store.add_call(full_call(id="b", response_id="r1", span_id=None, index=1))
    store.add_call(full_call(id="c", response_id="r2", span_id="said by the request", index=2))
    store.add_call(full_call(id="d", response_id="r1", span_id=None, episode_id="other"))
    links = [CallLink(episode_id="e", response_id=response, span_id=span) for response, span in
             [("r1", "planner"), ("r2", ""), ("of another server", "planner")]]  # fmt: skip
    for _ in range(2):
        store.add_links(links)
    assert [call.span_id for call in store.episode("e").calls] == ["planner", "planner", "said by the request"]
    assert store.episode("other").calls[0].span_id is None
    late = CallLink(episode_id="e", response_id="r2", span_id="writer")
    store.end("e", Outcome.COMPLETED, counted=True, links=[late], ended_at=1.0)
    assert store.episode("e").calls[2].span_id == "writer"


def test_the_finished_form_of_an_episode_that_was_imported_while_it_ran(store):
    """Links and folds have said since where its calls, spans and rewards belong."""
    call, span = full_call(span_id=None), Span(id="s", episode_id="e", name="calc", kind="tool", parent_id="folded")
    reward = Reward(episode_id="e", name="r", value=1.0, span_id="folded")
    running = Episode(start=make_start(), calls=[call], spans=[span], rewards=[reward])
    replace = msgspec.structs.replace
    finished = replace(
        running,
        calls=[replace(call, span_id="s"), full_call(id="d", index=1, parent_id="c")],
        spans=[replace(span, parent_id="a"), Span(id="a", episode_id="e", name="solve", kind="agent", started_at=1.0)],
        rewards=[replace(reward, span_id="a"), replace(reward, span_id="a")],
        outcome=Outcome.COMPLETED,
        ended_at=2.0,
    )
    others = [
        replace(finished, calls=finished.calls[1:]),
        replace(finished, spans=finished.spans[1:]),
        replace(finished, rewards=[replace(reward, value=2.0)]),
        replace(finished, start=make_start(step=1)),
        replace(finished, calls=[replace(call, prompt_ids=[1, 2, 4])]),
    ]
    store.add_episode(running)
    for other in others:
        with pytest.raises(StoreError, match="has another episode e, with other content"):
            store.add_episode(other)
        assert store.episode("e") == running
    for _ in range(2):
        store.add_episode(finished)
        assert store.episode("e") == finished
    with pytest.raises(StoreError, match="has another episode e, with other content"):
        store.add_episode(running)


def test_an_episode_that_has_ended_changes_no_more(store):
    store.begin(make_start())
    store.begin(make_start("f"))
    store.add_call(full_call(span_id=None, response_id="r"))
    store.end("e", Outcome.COMPLETED, counted=True, ended_at=1.0)
    ended = store.episode("e")
    store.add_calls([full_call(span_id=None, response_id="r"), full_call(id="late", finish_reason="abort")])
    span, reward = Span(id="s", episode_id="e", name="n", kind="tool"), Reward(episode_id="e", name="r", value=1.0)
    store.add_spans([span, msgspec.structs.replace(span, episode_id="f")])
    store.add_rewards([reward])
    store.add_links([CallLink(episode_id="e", response_id="r", span_id="s")])
    with pytest.raises(EpisodeEnded):
        store.add_calls([full_call(id="x", episode_id="f"), full_call(id="new")], [span])
    assert store.episode("e") == ended
    assert (store.episode("f").calls, len(store.episode("f").spans)) == ([], 1)
    extension = full_call(id="y", episode_id="f", parent_id="late")  # what was left out is no base
    store.add_call(extension)
    assert store.call("y") == extension


def test_looking_makes_nothing(tmp_path):
    for place in (tmp_path / "episodes.db", f"sqlite:///{tmp_path}/episodes.db"):
        with pytest.raises(StoreError, match="there is no episode store at"):
            Store.open(place, create=False)
    assert not [*tmp_path.iterdir()]
    (tmp_path / "episodes.db").touch()
    with pytest.raises(StoreError, match="there is no episode store at"):
        Store.open(tmp_path / "episodes.db", create=False)
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE things (id)")
    for place in (tmp_path / "episodes.db", tmp_path / "other.db"):
        before = place.read_bytes()
        for upgrade in (True, False):
            with pytest.raises(StoreError, match="there is no episode store at"):
                Store.open(place, create=False, upgrade=upgrade)
        assert place.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"episodes.db", "other.db"}


@pytest.mark.parametrize("was_killed", [False, True])
def test_who_looks_on_leaves_a_run_as_it_is(tmp_path, was_killed):
    running, run = tmp_path / "running", tmp_path / "run"
    running.mkdir()
    with Store.open(running / "episodes.db") as store:
        store.begin(make_start())
        if was_killed:  # what was committed is beside the file
            shutil.copytree(running, run)
    if not was_killed:
        shutil.copytree(running, run)
    before = {path.name: path.read_bytes() for path in run.iterdir() if not path.name.endswith("-shm")}
    assert (len(before) == 2) == was_killed
    with Store.open(run / "episodes.db", create=False, upgrade=False) as looking:
        assert looking.start_of("e") == make_start()
        with pytest.raises(StoreError, match="readonly database"):
            looking.begin(make_start("f"))
    assert {path.name: path.read_bytes() for path in run.iterdir() if not path.name.endswith("-shm")} == before


def test_who_looks_on_sees_what_a_live_run_writes(tmp_path):
    path = tmp_path / "episodes.db"
    with Store.open(path) as store, Store.open(path, create=False, upgrade=False) as looking:
        store.begin(make_start())
        assert looking.start_of("e") == make_start()


def test_opening_a_file_waits_for_no_writer(tmp_path):
    path = tmp_path / "episodes.db"
    Store.open(path).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        for create in (True, False):
            with Store.open(path, create=create) as store:
                assert store.starts() == []
        assert time.monotonic() - began < BUSY_SECONDS / 2


@pytest.mark.parametrize("is_open", [False, True])
def test_a_file_that_cannot_be_written_to_can_be_looked_at(tmp_path, is_open):
    folder = tmp_path / "a ?#%41"
    folder.mkdir()
    path = folder / "episodes.db"
    with Store.open(path) as store:
        store.begin(make_start())
        if not is_open:
            store.close()
        for one, mode in ((path, 0o444), (folder, 0o555)):
            one.chmod(mode)
        with as_nobody(tmp_path), Store.open(path, create=False) as other:
            assert other.start_of("e") == make_start()
            with pytest.raises(StoreError, match="readonly database"):
                other.begin(make_start("f"))


def test_a_file_of_an_earlier_version_must_be_opened_once_by_who_may_write_to_it(tmp_path):
    path = tmp_path / "episodes.db"
    with Store.open(path) as store:
        store.begin(make_start())
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript("".join(f"ALTER TABLE calls DROP COLUMN {name};" for name in SINCE_3))
        connection.execute("PRAGMA user_version = 3")
    path.chmod(0o444)
    with (
        as_nobody(tmp_path),
        pytest.raises(StoreError, match=r"cannot bring up to date .* readonly database") as caught,
    ):
        Store.open(path, create=False)
    assert "open it once with the right to write" in caught.value.hint
    path.chmod(0o644)
    for mode in (0o644, 0o444):
        path.chmod(mode)
        with Store.open(path, create=False) as store:
            assert store.start_of("e") == make_start()


@contextlib.contextmanager
def as_nobody(folder):
    """Root may write anywhere."""
    if os.getuid() != 0:
        yield
        return
    closed = [parent for parent in folder.parents if parent.owner() == "root" and not parent.stat().st_mode & 0o001]
    modes = {parent: parent.stat().st_mode for parent in [folder, *closed]}
    for parent in modes:
        parent.chmod(0o755)
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        for parent, mode in modes.items():
            parent.chmod(mode)


def test_what_others_name_may_be_long_and_what_is_a_key_has_a_bound(store):
    """PostgreSQL's trees take 2,700 bytes, which random text does not get below."""
    long = "".join(map(chr, random.Random(0).choices(range(0x20, 0xD7FF), k=4000)))
    store.begin(make_start())
    store.add_call(full_call(response_id=long, span_id=long, cached_tokens=2**40, model=long))
    store.add_spans([Span(id="s", episode_id="e", name=long, kind="tool", parent_id=long)])
    store.add_rewards([Reward(episode_id="e", name=long, value=1.0, span_id=long)])
    store.add_links([CallLink(episode_id="e", response_id=long, span_id="s")])
    assert (store.call("c").span_id, store.call("c").cached_tokens) == ("s", 2**40)
    for write in (
        lambda id: store.begin(make_start(id)),
        lambda id: store.add_call(full_call(id=id)),
        lambda id: store.add_spans([Span(id=id, episode_id="e", name="n", kind="tool")]),
    ):
        write(long[:300])
        with pytest.raises(StoreError, match="is longer than 1000 bytes"):
            write(long)
    with pytest.raises(StoreError, match="cannot write to the episode store"):
        store.add_call(full_call(id="d", cached_tokens=2**70))


def test_names_are_in_the_order_of_their_bytes(store):
    names = ["B", "Z-1", "a", "a-b", "a b", "aB", "\u00e4", "\U0001f600"]
    for number, name in enumerate(names[::-1]):
        store.begin(EpisodeStart(id=f"e{number}", task=Task(id=name, input={}), phase="train"))
    assert [summary.task_id for summary in store.starts()] == sorted(names, key=str.encode)


def test_a_batch_of_calls_is_written_whole_or_not_at_all(store):
    store.begin(make_start())
    span = Span(id="s", episode_id="e", name="calc", kind="tool")
    with pytest.raises(StoreError, match="no episode unknown in"):
        store.add_calls([full_call(), full_call(id="d", episode_id="unknown")], [span])
    assert (store.episode("e").calls, store.episode("e").spans) == ([], [])
    store.add_calls([full_call(), full_call(id="d", index=1)], [span])
    assert [call.id for call in store.episode("e").calls] == ["c", "d"]
    assert store.episode("e").spans == [span]


def test_rewards_given_again_count_again_and_rewards_written_again_do_not(store):
    store.begin(make_start())
    reward = Reward(episode_id="e", name="step", value=0.5, time=3.0)
    later = msgspec.structs.replace(reward, time=4.0)
    for _ in range(2):
        store.add_rewards([reward, reward, later])
    assert store.episode("e").rewards == [reward, reward, later]
    with pytest.raises(StoreError, match="reward 'step' of episode e is high, not a number"):
        store.add_rewards([msgspec.structs.replace(reward, value="high")])
    with pytest.raises(StoreError, match="reward 'step' of episode e is too large, not a number"):
        store.add_rewards([msgspec.structs.replace(reward, value=10**5000)])
    store.add_rewards([msgspec.structs.replace(reward, value=10**30)])
    assert store.episode("e").rewards[-1].value == 1e30


@pytest.mark.parametrize("text", ["a\0b", "a\ud83db", "é\u202e\U0001f600"])
def test_any_text_is_kept_or_visibly_replaced(store, text):
    seen = text.replace("\0", "␀").replace("\ud83d", "\ufffd")
    task = Task(id=text, input={text: text})
    store.begin(EpisodeStart(id="e", task=task, phase="train", group=text))
    nested = {"content": [text, {text: text}]}
    store.add_call(full_call(model=text, request=nested, response=nested, finish_reason=text, span_id=text))
    store.add_spans([Span(id=text, episode_id="e", name=text, kind="tool", attributes=nested, error=text)])
    store.add_rewards([Reward(episode_id="e", name=text, value=1.0, span_id=text)])
    store.end("e", Outcome.AGENT_ERROR, answer=text, error=text, counted=False, ended_at=1.0)
    episode = store.episode("e")
    call, span = episode.calls[0], episode.spans[0]
    assert episode.start.task == Task(id=seen, input={text: text})
    assert (call.model, call.finish_reason, call.span_id, call.request, call.response) == (
        seen, seen, seen, nested, nested,
    )  # fmt: skip
    assert (span.id, span.name, span.error, span.attributes) == (seen, seen, seen, nested)
    assert (episode.rewards[0].name, episode.answer, episode.error) == (seen, text, seen)
