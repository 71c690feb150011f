import gzip
import itertools
import json
import math
import tracemalloc
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rl.episode import Call, Episode, EpisodeStart, Outcome, Reward, Sampling, Span, Task
from lightning_rl.errors import TraceFileError
from lightning_rl.store import Store
from lightning_rl.trace_file import SUFFIXES, export_traces, import_traces, read_traces, write_traces
from lightning_rl.trace_file import parquet as trace_parquet
from lightning_rl.trace_file.parquet import features
from tests.unit.domain import make_call, make_start

ROOT = Path(__file__).resolve().parents[2]
_numbers = itertools.count()
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4)
free_text = st.text(st.characters(), max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | free_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(free_text, inner, max_size=3),
    max_leaves=5,
)
objects = st.dictionaries(free_text, json_values, max_size=3)
numbers = st.floats(allow_nan=False, allow_infinity=False)
small = st.integers(0, 2**31 - 1)
maybe = st.none() | text
entropies = st.floats(0, width=32, allow_infinity=False)
likeliest = st.lists(st.tuples(small, st.floats(max_value=0, width=32)), max_size=3)


def built(record, **fields):
    return st.builds(record, **fields)


@st.composite
def episodes(draw):
    name = f"e{next(_numbers)}-{draw(st.text('ab/é', max_size=2))}"
    of_it = {"episode_id": st.just(name)}

    def calls(index):
        length = draw(st.integers(0, 3))
        tokens = st.lists(small, min_size=length, max_size=length)
        return draw(
            built(
                Call,
                **of_it,
                id=st.just(f"{name}-c{index}"),
                index=st.just(index),
                model=text,
                prompt_ids=st.lists(small, max_size=4),
                sampled_ids=tokens,
                versions=tokens,
                logprobs=st.lists(st.floats(allow_nan=False), min_size=length, max_size=length),
                temperature=numbers,
                finish_reason=text,
                parent_id=maybe,
                relation=text,
                parted_at=st.none() | small,
                span_id=maybe,
                response_id=text,
                upstream=text,
                redacted=st.booleans(),
                restricted=st.lists(text, max_size=2),
                entropies=st.just([]) | st.lists(entropies, min_size=length, max_size=length),
                alternatives=st.just([]) | st.lists(likeliest, min_size=length, max_size=length),
                experts=st.none() | st.binary(max_size=4),
                cached_tokens=small,
                request=objects,
                response=objects,
                started_at=numbers,
                ended_at=numbers,
            )
        )

    def spans(number):
        named = {"id": st.just(f"s{number}"), "name": text, "kind": text, "parent_id": maybe, "error": maybe}
        started = st.just(float(number))
        return draw(built(Span, **of_it, **named, started_at=started, ended_at=numbers, attributes=objects))

    rewards = built(Reward, **of_it, name=text, value=numbers, time=numbers, call_id=maybe, span_id=maybe, source=text)
    sampling = built(
        Sampling,
        temperature=st.none() | numbers,
        top_p=st.none() | numbers,
        max_tokens=st.none() | small,
        seed=st.none() | st.integers(0, 2**62),
        top_logprobs=st.none() | small,
    )
    task = built(Task, id=text, input=objects)
    start = built(
        EpisodeStart,
        id=st.just(name),
        task=task,
        phase=text,
        step=small,
        sample=small,
        attempt=small,
        group=text,
        sampling=sampling,
        started_at=numbers,
    )
    ended = {
        "outcome": st.sampled_from(Outcome),
        "answer": json_values,
        "error": maybe,
        "counted": st.booleans(),
        "ended_at": numbers,
    }
    return Episode(
        start=draw(start),
        calls=[calls(index) for index in range(draw(st.integers(0, 3)))],
        spans=[spans(number) for number in range(draw(st.integers(0, 2)))],
        rewards=draw(st.lists(rewards, max_size=3, unique=True)),
        **(draw(st.fixed_dictionaries(ended)) if draw(st.booleans()) else {}),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def roomy(folder):
    with Store.open(folder / "all.db") as store:
        yield store


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=20, deadline=None)
@given(written=st.lists(episodes(), max_size=3))
def test_what_is_imported_is_what_was_exported(folder, roomy, suffix, written):
    """Through a file alone, and from a store through a file into a store; to the bit, and not once more."""
    path = folder / f"traces{suffix}"
    assert write_traces(path, iter(written)) == len(written)
    read = [*read_traces(path)]
    assert read == written
    assert repr(read) == repr(written)
    for _ in range(2):
        assert import_traces(path, roomy) == len(written)
    assert [roomy.episode(episode.id) for episode in written] == written
    again = folder / f"again{suffix}"
    write_traces(again, (roomy.episode(episode.id) for episode in written))
    assert repr([*read_traces(again)]) == repr([roomy.episode(episode.id) for episode in written])


def filled(place, count=3):
    store = Store.open(place)
    for number in range(count):
        name = f"e{number}"
        phase = "train" if number else "eval-base"
        store.begin(make_start(name, phase=phase, step=number))
        request = {"messages": [{"role": "user", "content": "é\0\ud83d"}], "n": 1e400}
        values = {"logprobs": [math.nan, -math.inf], "versions": [0, 1], "request": request, "experts": b"\0\xff"}
        store.add_call(make_call([1, 2], [3, 2**31 - 1], id=f"c{number}", episode_id=name, **values))
        reward = Reward(episode_id=name, name="r", value=0.1 + 0.2, time=1.5)
        store.end(name, Outcome.COMPLETED, answer={"x": None}, counted=number != 1, rewards=[reward], ended_at=2.0)
    return store


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_no_number_keeps_its_bits_and_a_selection_is_exported(tmp_path, suffix):
    path = tmp_path / f"traces{suffix}"
    with filled(tmp_path / "a.db") as store, Store.open(tmp_path / "b.db") as other:
        assert export_traces(store, path) == 3
        assert import_traces(path, other) == import_traces(path, other) == 3
        assert repr(other.episodes()) == repr(store.episodes())
        for selection, ids in [
            ({"phase": "train"}, ["e1", "e2"]),
            ({"step": 1}, ["e1"]),
            ({"counted_only": True}, ["e0", "e2"]),
        ]:
            export_traces(store, path, **selection)
            assert [episode.id for episode in read_traces(path)] == ids


def test_other_tools_read_both_forms(tmp_path):
    from datasets import load_dataset

    with filled(tmp_path / "a.db") as store:
        export_traces(store, tmp_path / "t.parquet")
        export_traces(store, tmp_path / "t.jsonl")
        rows = load_dataset("parquet", data_files=str(tmp_path / "t.parquet"), split="train", streaming=True)
        assert rows.features == features()
        for row, episode in zip(rows, store.episodes(), strict=True):
            assert row["start"]["id"] == episode.id
            assert row["calls"][0]["sampled_ids"] == episode.calls[0].sampled_ids
            assert json.loads(row["calls"][0]["request"]) == episode.calls[0].request
        header, *lines = (tmp_path / "t.jsonl").read_text().splitlines()
        assert json.loads(header) | {"created_by": ""} == {
            "format": "lightning-rl-traces", "version": 1, "created_by": "", "episodes": 3,
        }  # fmt: skip
        assert [json.loads(line)["start"]["id"] for line in lines] == ["e0", "e1", "e2"]


def test_the_columns_are_the_fields_of_the_records():
    def names(record):
        return list(record.__struct_fields__)

    columns = features()
    assert list(columns) == names(Episode)
    assert list(columns["start"]) == names(EpisodeStart)
    assert list(columns["start"]["task"]) == names(Task)
    assert list(columns["start"]["sampling"]) == names(Sampling)
    assert list(columns["calls"].feature) == names(Call)
    assert list(columns["spans"].feature) == names(Span)
    assert list(columns["rewards"].feature) == names(Reward)
    documented = (ROOT / "docs" / "traces.md").read_text(encoding="utf-8")
    for record in (Episode, EpisodeStart, Task, Sampling, Call, Span, Reward):
        assert [name for name in names(record) if f"`{name}`" not in documented] == []


def test_files_from_before_entropies_and_alternatives_are_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def as_before(rows):
        for row in rows:
            del row["start"]["sampling"]["top_logprobs"]
            for call in row["calls"]:
                del call["entropies"], call["alternatives"]
        return rows

    recorded = {"entropies": [0.5], "alternatives": [[(3, -0.5)]]}
    call = make_call([1, 2], [3], **recorded)
    lines, table = tmp_path / "t.jsonl", tmp_path / "t.parquet"
    for path in (lines, table):
        write_traces(path, [Episode(start=make_start(), calls=[call])])
    header, *rows = lines.read_text().splitlines()
    rows = [json.dumps(row) for row in as_before([json.loads(row) for row in rows])]
    lines.write_text("\n".join([header, *rows]))
    written = pyarrow.parquet.read_table(table)
    older = pyarrow.Table.from_pylist(as_before(written.to_pylist()))
    pyarrow.parquet.write_table(older.replace_schema_metadata(written.schema.metadata), table)
    for path in (lines, table):
        (episode,) = read_traces(path)
        assert episode.calls == [make_call([1, 2], [3])]


HEADER = '{"format": "lightning-rl-traces", "version": 1}'


def line(**values):
    plain = msgspec.to_builtins(Episode(start=make_start("good"), calls=[make_call([1], [2], episode_id="good")]))
    return json.dumps(plain | values)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "line 1 is not JSON"),
        (["hello"], "line 1 is not JSON"),
        (['{"format": "another"}'], "line 1: this is not a trace file"),
        (['{"format": "lightning-rl-traces", "version": 2}'], "version 2 of the format, and this release reads versions up to 1"),
        ([HEADER[:-1] + ', "colour": 1}'], "line 1: unknown field colour"),
        ([HEADER[:-1] + ', "episodes": 2}', line()], "has 1 episodes, and its first line says 2"),
        ([HEADER, line(), line()[:-5]], "line 3 is not JSON"),
        ([HEADER, line(), "[1]"], "line 3: Expected `object`, got `array`"),
        ([HEADER, line(extra=1)], "line 2: unknown field extra"),
        ([HEADER, line(start={"id": "e", "task": {"id": "t", "input": {}, "mood": 1}})], "unknown field start.task.mood"),
        ([HEADER, line(calls=[{"id": "c", "weather": 1}])], r"line 2: unknown field calls\[0\].weather"),
        ([HEADER, line(calls=[{"id": "c"}])], "line 2: Object missing required field `episode_id`"),
        ([HEADER, line(outcome="fine")], "line 2: Invalid enum value 'fine'"),
        ([HEADER, line(rewards=[{"episode_id": "e2", "name": "r", "value": 1}])], "has a record of episode e2"),
    ],
)  # fmt: skip
def test_a_damaged_or_newer_file_is_refused_with_the_place(tmp_path, lines, said):
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(TraceFileError, match=said):
        list(read_traces(path))


def test_a_file_that_is_cut_off_anywhere_is_noticed_and_the_whole_one_imported_afterwards(tmp_path):
    with filled(tmp_path / "a.db", count=4) as store, Store.open(tmp_path / "b.db") as other:
        for suffix in SUFFIXES:
            whole = tmp_path / f"whole{suffix}"
            export_traces(store, whole)
            content = whole.read_bytes()
            cut = tmp_path / f"cut{suffix}"
            for part in (0.1, 0.5, 0.9):
                cut.write_bytes(content[: int(len(content) * part)])
                with pytest.raises(TraceFileError, match=r"cut\."):
                    import_traces(cut, other)
            import_traces(whole, other)
            assert repr(other.episodes()) == repr(store.episodes())
        lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
        cut.with_suffix(".jsonl").write_bytes(b"".join(lines[:-1]))
        with pytest.raises(TraceFileError, match="has 3 episodes, and its first line says 4"):
            list(read_traces(cut.with_suffix(".jsonl")))
        (tmp_path / "bytes.jsonl").write_bytes(lines[0] + b"\xff\xfe\n")
        with pytest.raises(TraceFileError, match="line 2 is not JSON"):
            list(read_traces(tmp_path / "bytes.jsonl"))


def test_episodes_are_never_mixed_with_others_of_the_same_name(tmp_path):
    one = Episode(start=make_start(), calls=[make_call([1], [2])])
    path = tmp_path / "traces.jsonl"
    with Store.open(tmp_path / "e.db") as store:
        store.begin(make_start(step=3))
        write_traces(path, [one])
        with pytest.raises(TraceFileError, match=r"line 2: .* has another episode e, with other content") as caught:
            import_traces(path, store)
        assert "a database, or schema (?run=NAME), of its own" in caught.value.hint
        assert store.episode("e") == Episode(start=make_start(step=3))
    finished = msgspec.structs.replace(
        one, calls=[*one.calls, make_call([1, 2], [3], id="d", index=1)], outcome=Outcome.TIMEOUT, ended_at=1.0
    )
    with Store.open(tmp_path / "later.db") as store:
        for episode in (one, finished, finished):  # what was exported while it ran is completed
            write_traces(path, [episode])
            import_traces(path, store)
            assert store.episode("e") == episode
        write_traces(path, [one])
        with pytest.raises(TraceFileError, match="with other content"):
            import_traces(path, store)
        assert store.episode("e") == finished


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "traces.jsonl.gz"
    write_traces(path, [Episode(start=make_start())])
    before = gzip.decompress(path.read_bytes())

    def failing():
        yield Episode(start=make_start())
        yield Episode(start=make_start("f"), outcome=Outcome.COMPLETED, answer=object())

    for suffix in SUFFIXES:
        with pytest.raises(TraceFileError, match="episode f"):
            write_traces(path.with_name(f"traces{suffix}"), failing())
    assert gzip.decompress(path.read_bytes()) == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(TraceFileError, match="any kind of file"):
        write_traces(tmp_path / "traces.csv", [])
    with pytest.raises(TraceFileError, match="cannot write"):
        write_traces(tmp_path / "no" / "traces.jsonl", [])
    with pytest.raises(TraceFileError, match="cannot read"):
        list(read_traces(tmp_path / "nothing.jsonl"))


@pytest.mark.parametrize("has_ids", [True, False])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix, has_ids, monkeypatch):
    monkeypatch.setattr(trace_parquet, "GROUP_BYTES", 200_000)

    def many(count):
        for number in range(count):
            ids, words = (range(3_000), range(100)) if has_ids else ([], [])
            text = {} if has_ids else {"content": f"{number} " * 4_000}  # a provider's
            call = make_call(ids, words, id=f"c{number}", episode_id=f"e{number}", request=text)
            yield Episode(start=make_start(f"e{number}"), calls=[call] * 3)

    def peak(count):
        tracemalloc.start()
        try:
            write_traces(tmp_path / f"t{suffix}", many(count))
            assert sum(1 for _ in read_traces(tmp_path / f"t{suffix}")) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)  # what imports leave
    assert peak(40) < 1.5 * peak(10)
