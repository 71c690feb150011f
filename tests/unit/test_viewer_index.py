"""The viewer's list of episodes against plain Python over the same store."""

import contextlib
import json
import math
import random
import sqlite3
import threading
import time
from itertools import pairwise

import msgspec
import pytest

from lightning_rl.agents import callers
from lightning_rl.episode import EpisodeStart, Outcome, Reward, Span, Task
from lightning_rl.errors import LightningError, StoreError
from lightning_rl.store import Store
from lightning_rl.store.browsing import Listing, SaidCall
from lightning_rl.store.deltas import request_texts, write_request
from tests.unit.domain import make_call, make_episode
from trainers.viewer.index import EpisodeIndex, reading
from trainers.viewer.index.cache import Cache
from trainers.viewer.index.columns import Columns
from trainers.viewer.index.words import Requests, words_in_json, words_of
from trainers.viewer.library import Library
from trainers.viewer.places import shelf_of
from trainers.viewer.records import EpisodeQuery

WORDS = ["red", "Green", "blue", "re", "größe", "北京", "o'neil", "x_1", "3.14"]


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "episodes.db") as store:
        yield store


@pytest.fixture
def any_store(store_place):
    with Store.open(store_place) as store:
        yield store


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(reading, "_REFRESHED_S", 0.0)
    monkeypatch.setattr(reading, "_KEPT_S", 0.0)
    monkeypatch.setattr(reading, "_REST", 0.0)


def settled(index):
    """When everything was read."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        index._reader._refresh_at = 0.0
        page = index.page(EpisodeQuery(limit=500))
        with index._reader.lock:
            if not index._reader.columns.unread(1) and page.indexing.done == page.indexing.total:
                return page
        time.sleep(0.01)
    raise AssertionError("not read in time")


def begin(store, id, number=0, **values):
    fields = {"phase": "train", "step": number, "group": f"g{number}", "started_at": 100.0 + number} | values
    store.begin(EpisodeStart(id=id, task=Task(id=f"Task-{number}", input={"q": "what"}), **fields))


def fill(store, count, seed):
    random_ = random.Random(seed)
    for number in range(count):
        id = f"e{number}"
        begin(
            store, id, number % 3, phase=random_.choice(["train", "eval-base"]), sample=number, started_at=float(number)
        )
        spans = [Span(id="a", episode_id=id, name="outer", kind="agent", started_at=1.0)]
        if random_.random() < 0.5:
            spans.append(Span(id="b", episode_id=id, name="inner", kind="agent", parent_id="a", started_at=2.0))
        messages = []
        for index in range(random_.randrange(4)):
            messages = [*messages, {"role": "user", "content": " ".join(random_.choices(WORDS, k=3))}]
            sampled = random_.randrange(3)
            call = make_call(
                range(index + 2),
                range(sampled),
                id=f"{id}-{index}",
                episode_id=id,
                index=index,
                versions=[random_.randrange(5) for _ in range(sampled)],
                span_id=random_.choice([None, "a", "b"]),
                agent=random_.choice(["", "said"]),
                request={"model": "m", "messages": messages},
                response={"role": "assistant", "content": random_.choice(WORDS)},
            )
            store.add_call(call)
        store.add_spans(spans)
        names = random_.sample(["good", "bad"], random_.randrange(3))
        store.add_rewards([Reward(episode_id=id, name=name, value=random_.choice([0.0, 0.5, 1.0])) for name in names])
        if random_.random() < 0.8:
            outcome = random_.choice([Outcome.COMPLETED, Outcome.TIMEOUT])
            store.end(id, outcome, counted=random_.random() < 0.5, ended_at=number + random_.random())


def plain_row(episode):
    versions = [version for call in episode.calls for version in call.versions]
    rewards = {}
    for reward in episode.rewards:
        rewards[reward.name] = rewards.get(reward.name, 0.0) + reward.value
    texts = [str(message["content"]) for call in episode.calls for message in call.request["messages"]]
    texts += [call.response["content"] for call in episode.calls] + [span.name for span in episode.spans]
    return {
        "id": episode.id,
        "phase": episode.start.phase,
        "step": episode.start.step + (episode.start.phase == "train"),
        "task": episode.start.task.id,
        "outcome": episode.outcome,
        "counted": episode.counted,
        "calls": len(episode.calls),
        "tokens": sum(len(call.sampled_ids) for call in episode.calls),
        "agents": {caller.agent for caller in callers(episode).values()} - {None},
        "versions": [min(versions), max(versions)] if versions else [],
        "rewards": rewards,
        "started_at": episode.start.started_at,
        "seconds": None if episode.outcome is None else episode.ended_at - episode.start.started_at,
        "words": set().union(*map(words_of, texts)),
    }


def fits(row, query):
    def within(value, ends):
        low, high = ends
        return ends == (None, None) or (
            value is not None and (low is None or value >= low) and (high is None or value <= high)
        )

    low, high = query.version
    overlaps = (
        bool(row["versions"])
        and (low is None or row["versions"][1] >= low)
        and (high is None or row["versions"][0] <= high)
    )
    return (
        (not query.phase or row["phase"] in query.phase)
        and (not query.outcome or (row["outcome"] or "running") in query.outcome)
        and query.counted in (None, row["counted"])
        and (not query.agent or not row["agents"].isdisjoint(query.agent))
        and query.task.lower() in row["task"].lower()
        and all(within(row[name], getattr(query, name)) for name in ("step", "calls", "tokens", "seconds"))
        and (query.version == (None, None) or overlaps)
        and all(within(row["rewards"].get(name), ends) for name, ends in query.reward.items())
        and all(any(known.startswith(word) for known in row["words"]) for word in words_of(query.text))
    )


def key_of(row, sort):
    value = row["rewards"].get(sort.removeprefix("reward.")) if sort.startswith("reward.") else row[sort]
    return value[1] if sort == "versions" and value else None if value == [] else value


def any_query(random_):
    def ends(values):
        low, high = sorted(random_.choices(values, k=2))
        return random_.choice([(None, None), (None, None), (low, None), (None, high), (low, high)])

    return EpisodeQuery(
        phase=random_.choice([(), (), ("train",), ("train", "eval-base"), ("none",)]),
        outcome=random_.choice([(), (), ("running",), ("completed", "running"), ("timeout",)]),
        counted=random_.choice([None, None, True, False]),
        agent=random_.choice([(), (), ("inner",), ("outer", "said")]),
        task=random_.choice(["", "", "task", "K-1", "9"]),
        text=random_.choice(["", "", *WORDS, "gre bl", "grosse", "RE blue", "京", "missing"]),
        step=ends([0, 1, 2, 3]),
        calls=ends([0, 1, 2, 3]),
        tokens=ends([0, 1, 2, 5]),
        seconds=ends([0.0, 0.3, 0.8]),
        version=ends([0, 1, 2, 3, 4]),
        reward=random_.choice([{}, {}, {"good": ends([0.0, 0.5, 1.0])}]),
        sort=random_.choice(["started_at", "id", "task", "outcome", "calls", "seconds", "versions", "reward.good"]),
        descending=random_.choice([True, False]),
        limit=500,
    )


@pytest.mark.parametrize("seed", range(2))
def test_pages_are_what_plain_python_finds(any_store, seed):
    store = any_store
    fill(store, 60, seed)
    rows = [plain_row(episode) for episode in store.episodes()]
    index = EpisodeIndex(store, None)
    try:
        shown = {row.id: row for row in settled(index).rows}
        for row in rows:
            has = shown[row["id"]]
            assert set(has.agents) == row["agents"]
            for name in (
                "phase",
                "step",
                "task",
                "outcome",
                "counted",
                "calls",
                "tokens",
                "versions",
                "rewards",
                "seconds",
            ):
                assert getattr(has, name) == row[name], name
        random_ = random.Random(seed)
        found = 0
        for _ in range(300):
            query = any_query(random_)
            page = index.page(query)
            expected = [row for row in rows if fits(row, query)]
            assert {row.id for row in page.rows} == {row["id"] for row in expected}, query
            assert page.matched == len(expected)
            by_id = {row["id"]: key_of(row, query.sort) for row in expected}
            keys = [by_id[row.id] for row in page.rows]
            known = [key for key in keys if key is not None]
            assert keys[: len(known)] == known, "those without a value come last"
            assert all(one >= two if query.descending else one <= two for one, two in pairwise(known))
            pages = [index.page(msgspec.structs.replace(query, offset=at, limit=7)).rows for at in range(0, 60, 7)]
            assert [row for rows_ in pages for row in rows_] == page.rows
            found += bool(expected)
        assert found > 50
        facets = index.facets()
        assert facets.agents["outer"] == sum("outer" in row["agents"] for row in rows)
        assert sum(facets.outcomes.values()) == sum(facets.phases.values()) == len(rows)
        assert facets.outcomes["running"] == sum(row["outcome"] is None for row in rows)
        assert facets.rewards["good"].high == max(row["rewards"].get("good", -math.inf) for row in rows)
    finally:
        index.close()


def test_neighbours_go_through_a_phase_in_the_order_of_the_store(store):
    fill(store, 30, 5)
    index = EpisodeIndex(store, None)
    try:
        for phase in ("train", "eval-base"):
            ids = store.episode_ids(phase=phase)
            for before, id, after in zip([None, *ids], ids, [*ids[1:], None], strict=False):
                assert index.neighbours(id) == (before, after)
        assert index.neighbours("nobody") == (None, None)
        group = [
            episode.id
            for episode in sorted(store.episodes(), key=lambda one: one.start.sample)
            if episode.start.group == "g1"
        ]
        assert index.group("g1") == group
        assert index.group("") == index.group("none") == []
    finally:
        index.close()


def test_a_run_that_goes_on(any_store):
    store = any_store
    begin(store, "e0")
    index = EpisodeIndex(store, None)
    try:
        first = settled(index)
        assert (first.total, first.rows[0].outcome, first.rows[0].seconds, first.rows[0].calls) == (1, None, None, 0)
        said = {"messages": [{"role": "user", "content": "early"}]}
        store.add_call(make_call([1], [2], id="c0", episode_id="e0", versions=[7], agent="a", request=said))
        store.add_rewards([Reward(episode_id="e0", name="good", value=0.5)])
        second = settled(index)
        assert second.revision != first.revision
        assert (second.rows[0].calls, second.rows[0].rewards, second.rows[0].versions) == (1, {"good": 0.5}, [7, 7])
        assert index.page(EpisodeQuery(text="early", agent=("a",))).matched == 1
        store.add_rewards([Reward(episode_id="e0", name="good", value=0.5, time=1.0)])
        store.end("e0", Outcome.AGENT_ERROR, error="Late trouble", counted=True, ended_at=103.0)
        begin(store, "e1", 1)
        done = {row.id: row for row in settled(index).rows}
        assert (done["e0"].outcome, done["e0"].rewards, done["e0"].seconds) == (Outcome.AGENT_ERROR, {"good": 1.0}, 3.0)
        assert [row.id for row in index.page(EpisodeQuery(text="EARLY troub")).rows] == ["e0"]
        settled(index)
        assert index.page(EpisodeQuery()).revision == index.page(EpisodeQuery()).revision
        store.add_episode(msgspec.structs.replace(make_episode("old"), answer="imported"))
        assert settled(index).total == 3
        assert [row.id for row in index.page(EpisodeQuery(text="imported")).rows] == ["old"]
    finally:
        index.close()


def test_a_second_opening_reads_nothing_again(store, tmp_path, monkeypatch):
    fill(store, 30, 1)
    index = EpisodeIndex(store, tmp_path / "cache")
    first = settled(index)
    index.close()
    read = []
    monkeypatch.setattr(
        reading, "_read", lambda connection, ids, before=reading._read: (read.extend(ids), before(connection, ids))[1]
    )
    index, other = EpisodeIndex(store, tmp_path / "cache"), EpisodeIndex(store, tmp_path / "cache")
    try:
        assert settled(index).rows == settled(other).rows == first.rows
        assert set(read) == {row.id for row in first.rows if row.outcome is None}
        texts = {word: index.page(EpisodeQuery(text=word)).matched for word in WORDS}
        assert texts == {word: other.page(EpisodeQuery(text=word)).matched for word in WORDS}
        assert texts["red"] > 0
    finally:
        index.close()
        other.close()


def test_another_store_at_the_same_place_is_another_store(tmp_path):
    for time_ in (1.0, 2.0):
        place = tmp_path / "episodes.db"
        for path in tmp_path.glob("episodes.db*"):
            path.unlink()
        with Store.open(place) as store:
            begin(store, "e0", started_at=time_)
            store.end("e0", Outcome.COMPLETED, answer=f"time{time_:.0f}", counted=True, ended_at=3.0)
            index = EpisodeIndex(store, tmp_path / "cache")
            assert [row.started_at for row in settled(index).rows] == [time_]
            assert index.page(EpisodeQuery(text=f"time{time_:.0f}")).matched == 1
            index.close()


@pytest.mark.parametrize("damage", ["garbage", "cut", "version"])
def test_a_damaged_cache_is_made_anew(store, tmp_path, damage):
    fill(store, 10, 2)
    index = EpisodeIndex(store, tmp_path / "cache")
    first = settled(index)
    index.close()
    (path,) = (tmp_path / "cache").glob("*.db")
    if damage == "version":
        raw = sqlite3.connect(path)
        raw.execute("PRAGMA user_version = 99")
        raw.close()
    else:
        content = path.read_bytes()
        path.write_bytes(b"no database" * 1000 if damage == "garbage" else content[: len(content) // 2])
    index = EpisodeIndex(store, tmp_path / "cache")
    try:
        assert settled(index).rows == first.rows
        settled(index)
        assert index.page(EpisodeQuery(text="outer")).matched == 10
    finally:
        index.close()


def test_a_cache_that_breaks_while_it_is_used(store, tmp_path):
    fill(store, 10, 2)
    index = EpisodeIndex(store, tmp_path / "cache")
    try:
        settled(index)
        raw = sqlite3.connect(next((tmp_path / "cache").glob("*.db")))
        raw.execute("DROP TABLE words")
        raw.close()
        with pytest.raises(StoreError, match="cannot be searched by text now"):
            index.page(EpisodeQuery(text="outer"))
        deadline = time.monotonic() + 10
        found = 0
        while found < 10 and time.monotonic() < deadline:
            time.sleep(0.02)
            with contextlib.suppress(StoreError):
                found = index.page(EpisodeQuery(text="outer")).matched
        assert found == 10
    finally:
        index.close()


def test_without_a_cache_that_works_the_list_goes_on_without_its_search(store, monkeypatch):
    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    fill(store, 10, 2)
    monkeypatch.setattr(Cache, "add", full)
    index = EpisodeIndex(store, None)
    try:
        assert {agent for row in settled(index).rows for agent in row.agents} >= {"outer", "inner"}
        with pytest.raises(StoreError, match="cannot be searched by text: database or disk is full"):
            index.page(EpisodeQuery(text="outer"))
        assert index.page(EpisodeQuery(agent=("outer",))).matched > 0
    finally:
        index.close()


@pytest.mark.parametrize(
    ("damage", "is_listed"),
    [
        ("UPDATE episodes SET step = 'abc' WHERE id = 'e3'", False),
        ("UPDATE episodes SET outcome = 'weird' WHERE id = 'e3'", False),
        ("UPDATE episodes SET task_id = CAST(x'ff41' AS TEXT) WHERE id = 'e3'", False),
        ("UPDATE episodes SET task_id = x'ff41' WHERE id = 'e3'", False),
        ("UPDATE calls SET versions = x'0102' WHERE episode_id = 'e3'", True),
        ("UPDATE calls SET request = printf('%.*c', 9000, '[') WHERE episode_id = 'e3'", True),
        ("UPDATE calls SET response = CAST(x'ff41' AS TEXT) WHERE episode_id = 'e3'", True),
    ],
)
def test_a_damaged_episode_is_alone_in_it(store, tmp_path, damage, is_listed):
    said = {"messages": [{"role": "user", "content": "what"}]}
    for number in range(8):
        begin(store, f"e{number}")
        store.add_call(make_call([1], [2], id=f"c{number}", episode_id=f"e{number}", request=said, response=said))
        store.end(f"e{number}", Outcome.COMPLETED, counted=True, ended_at=101.0)
    with contextlib.closing(sqlite3.connect(tmp_path / "episodes.db")) as raw:
        assert raw.execute(damage).rowcount == 1
        raw.commit()
    index = EpisodeIndex(store, None)
    try:
        assert ("e3" in {row.id for row in settled(index).rows}) == is_listed
        assert index.page(EpisodeQuery(text="what")).matched == 7
    finally:
        index.close()


def test_what_goes_wrong_is_told_and_tried_again(store, monkeypatch):
    def broken(connection):
        raise RuntimeError("odd")

    begin(store, "e0")
    monkeypatch.setattr(reading, "_RETRY_S", 0.01)
    with monkeypatch.context() as patched:
        patched.setattr(reading, "number_of_episodes", broken)
        index = EpisodeIndex(store, None)
        with pytest.raises(StoreError, match="odd"):
            index.page(EpisodeQuery())
    try:
        deadline = time.monotonic() + 10
        while index._reader.failure is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert index.page(EpisodeQuery()).total == 1
    finally:
        index.close()


def test_who_waits_is_told_when_it_stops(store, monkeypatch):
    goes_on = threading.Event()
    monkeypatch.setattr(reading, "number_of_episodes", lambda connection: goes_on.wait(10))
    index = EpisodeIndex(store, None)
    threading.Timer(0.1, index.stop).start()
    began = time.monotonic()
    with pytest.raises(StoreError, match="is being closed"):
        index.page(EpisodeQuery())
    assert time.monotonic() - began < 2
    goes_on.set()
    index.close()


def test_running_episodes_are_compared_by_what_they_had():
    columns = Columns()

    def put(rewards, outcome=None):
        before = columns.revision
        columns.put(
            Listing(
                **{name: [""] for name in ("phase", "task", "group")},
                **{name: [0] for name in ("step", "sample", "attempt", "calls", "tokens", "counted")},
                **{name: [1.0] for name in ("started_at", "ended_at")},
                id=["e"],
                outcome=[outcome],
                rewards=[rewards],
            )
        )
        return columns.revision > before

    assert put({"a": 1.0, "b": math.nan})
    assert not put({"a": 1.0, "b": math.nan})
    assert put({"b": 2.0})
    assert columns.rewards_of(columns.rows(["e"])) == [{"b": 2.0}]
    assert put({"b": 3.0}, "completed")
    assert not put({"b": 4.0})
    assert columns.rewards_of(columns.rows(["e"])) == [{"b": 3.0}]


@pytest.mark.parametrize(
    "text", ['"', "a AND", "NOT", "*", "(", "a:b", "-x", "';--", "\0", "\ud800", "NEAR(a b)", "^a", "é" * 9999]
)
def test_no_text_is_an_error(store, text):
    fill(store, 3, 3)
    index = EpisodeIndex(store, None)
    try:
        settled(index)
        assert index.page(EpisodeQuery(text=text)).total == 3
    finally:
        index.close()


def test_a_sort_that_is_none(store):
    index = EpisodeIndex(store, None)
    try:
        assert index.page(EpisodeQuery()).rows == []
        assert index.facets().versions is None
        with pytest.raises(LightningError, match="cannot be sorted"):
            index.page(EpisodeQuery(sort="rewards"))
    finally:
        index.close()


def test_words_of_json_are_those_that_were_said():
    arguments = json.dumps({"path": "C:\\new"})
    call = {"id": "call_ab12", "arguments": arguments}
    said = json.dumps({"role": "assistant", "content": 'One\ntwo "three" café', "tool_calls": [call]})
    assert {"one", "two", "three", "cafe", "c", "new"} <= words_in_json(said)
    assert words_in_json(said).isdisjoint({"role", "assistant", "content", "call", "ab12", "ntwo", "arguments"})


def test_requests_give_whole_words_where_texts_part_within_one():
    def message(content):
        return request_texts({"messages": [{"role": "user", "content": content}]})

    one, two = message("the answer is 42 metres"), message("the answer is 4711 metres")
    requests = Requests()
    requests.add(SaidCall("a", None, "", None, b"", write_request(one, {}), ""))
    assert words_in_json(requests.add(SaidCall("b", None, "", "a", b"", write_request(two, one), ""))) == {"4711"}
    assert requests.add(SaidCall("c", None, "", "a", b"", "damaged", "")) == ""


def test_what_is_very_long_is_cut(store):
    begin(store, "e0")
    said = {"messages": [{"role": "user", "content": "start " + "x" * 3_000_000 + " end"}]}
    store.add_call(make_call([1], [2], id="c0", episode_id="e0", request=said, response={"content": "answered"}))
    store.end("e0", Outcome.COMPLETED, answer="done", counted=True, ended_at=101.0)
    index = EpisodeIndex(store, None)
    try:
        settled(index)
        found = {text: index.page(EpisodeQuery(text=text)).matched for text in ("start", "answered", "done", "end")}
        assert found == {"start": 1, "answered": 1, "done": 1, "end": 0}
    finally:
        index.close()


def test_a_store_that_nobody_had_open_is_opened_anew_when_a_run_writes_to_it(tmp_path):
    path = tmp_path / "episodes.db"
    with Store.open(path) as store:
        begin(store, "e0")
    library = Library(shelf_of(str(path)), None)
    with library.reading("episodes") as book:
        assert book.index.page(EpisodeQuery()).total == 1
    with Store.open(path) as store:
        begin(store, "e1", 1)
        with library.reading("episodes") as live:
            assert live.index.page(EpisodeQuery()).total == 2
        begin(store, "e2", 2)
        with library.reading("episodes") as again:
            assert again is live
            live.index._reader._refresh_at = 0.0
            assert live.index.page(EpisodeQuery()).total == 3
    library.stop()
    with pytest.raises(StoreError, match="is being closed"), library.reading("episodes"):
        pass
    library.close()


def test_a_store_that_takes_long_to_fail_is_not_tried_again_at_once(tmp_path, monkeypatch):
    tried = []

    def away(*_, **__):
        tried.append(time.sleep(0.2))
        raise StoreError("the server is away", hint="start it")

    Store.open(tmp_path / "episodes.db").close()
    library = Library(shelf_of(str(tmp_path / "episodes.db")), None)
    monkeypatch.setattr(Store, "open", away)
    for _ in range(3):
        with pytest.raises(StoreError, match="the server is away"), library.reading("episodes"):
            pass
    assert len(tried) == 1
    library.close()
