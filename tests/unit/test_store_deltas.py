"""What is left out of a stored call is put back: for any episode, in any order, by any process."""

import itertools
import json
import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from sqlalchemy import event

from lightning_rl.errors import StoreError
from lightning_rl.store import Store
from lightning_rl.store.bases import Bases
from lightning_rl.store.deltas import Base, delta, read_request, shared_end, shared_start, write_request
from lightning_rl.store.rows import pack_ids
from tests.unit.domain import make_call, make_start


@pytest.fixture
def store(store_place):
    with Store.open(store_place) as store:
        yield store


def stored_bytes(store):
    columns = ("prompt_ids", "sampled_ids", "logprobs", "versions", "request", "response")
    query = f"SELECT sum({' + '.join(f'length({name})' for name in columns)}) FROM calls"
    return int(store._transactions.read(lambda connection: connection.exec_driver_sql(query).scalar_one()))


_numbers = itertools.count()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6)
requests = st.dictionaries(st.sampled_from(["messages", "model", "seed", "tools"]), json_values, max_size=4)


@st.composite
def histories(draw):
    """Calls that extend, fork, edit and compact what came before, or have nothing to do with it."""
    calls = []
    for number in range(draw(st.integers(1, 8))):
        change = draw(st.sampled_from(["root", "extend", "fork", "edit", "compact"])) if calls else "root"
        if change == "root":
            prompt, request, parent = draw(ids), draw(requests), None
        else:
            before = calls[-1] if change == "extend" else draw(st.sampled_from(calls))
            sequence = before.prompt_ids + before.sampled_ids
            prompt = sequence + draw(ids)
            messages = before.request.get("messages")
            messages = [*messages, draw(json_values)] if isinstance(messages, list) else [draw(json_values)]
            if change == "edit":
                at = draw(st.integers(0, len(sequence)))
                prompt[at : at + 1] = draw(ids)
                messages[draw(st.integers(0, len(messages) - 1))] = draw(json_values)
            if change == "compact":
                prompt = prompt[len(prompt) // 2 :]
                messages = messages[len(messages) // 2 :]
            request = before.request | {"messages": messages} | draw(requests)
            parent = before.id if change in ("extend", "fork") else draw(st.sampled_from([None, "unknown"]))
        sampled = draw(ids)
        calls.append(make_call(prompt, sampled, id=f"c{number}", index=number, parent_id=parent, request=request))
    return calls


@pytest.fixture(scope="module")
def two_stores(tmp_path_factory):
    """Two processes' views of one file, which forget soon."""
    path = tmp_path_factory.mktemp("store") / "episodes.db"
    with Store.open(path) as one, Store.open(path) as other:
        one._calls._bases = Bases(max_bytes=200)
        yield one, other


@settings(max_examples=100, deadline=None)
@given(history=histories(), data=st.data())
def test_what_is_read_is_what_was_written(two_stores, history, data):
    one, other = two_stores
    episode = f"e{next(_numbers)}"
    calls = [
        structs.replace(
            call, id=f"{episode}-{call.id}", episode_id=episode, parent_id=call.parent_id and f"{episode}-{call.parent_id}"
        )
        for call in history
    ]  # fmt: skip
    order = [*data.draw(st.permutations(calls) | st.just(calls))]
    one.begin(make_start(episode))
    while order:
        batch = [order.pop(0) for _ in range(min(len(order), data.draw(st.integers(1, 3))))]
        data.draw(st.sampled_from([one, other])).add_calls(batch)
    read = one.episode(episode).calls
    assert read == calls
    assert json.dumps([call.request for call in read]) == json.dumps([call.request for call in calls])
    assert [other.call(call.id) for call in calls] == calls
    (summary,) = [summary for summary in one.starts() if summary.id == episode]
    assert (summary.calls, summary.sampled_tokens) == (len(calls), sum(len(call.sampled_ids) for call in calls))


@given(st.text("ab[]", max_size=12), st.text("ab[]", max_size=12))
def test_what_two_texts_share(one, other):
    start = shared_start(one, other)
    assert one[:start] == other[:start]
    assert one[start : start + 1] != other[start : start + 1] or start == min(len(one), len(other))
    assert shared_end(one, other) == shared_start(one[::-1], other[::-1])
    assert read_request(write_request({"k": one}, {"k": other}), {"k": other}) == {"k": one}


def conversation(turns):
    draw = random.Random(0)
    prompt = [draw.randrange(50_000) for _ in range(300)]
    messages = [{"role": "system", "content": "s" * 1000}]
    for turn in range(turns):
        sampled = [draw.randrange(50_000) for _ in range(30)]
        request = {"seed": turn, "messages": [*messages], "tools": [{"name": "t" * 500}], "user": "u"}
        yield make_call(
            prompt,
            sampled,
            id=f"c{turn}",
            index=turn,
            parent_id=f"c{turn - 1}" if turn else None,
            request=request,
            response={"content": "x" * 100},
        )
        prompt = prompt + sampled + [draw.randrange(50_000) for _ in range(50)]
        messages += [{"role": "assistant", "content": "x" * 100}, {"role": "tool", "content": "y" * 150}]


def test_an_episode_grows_with_what_is_new_and_not_with_its_turns_squared(store):
    """Also when the process changes in the middle, and for a client whose calls nobody knows to be continuations."""
    store.begin(make_start())
    sizes, statements = {}, []
    event.listen(store._transactions._reader, "before_cursor_execute", lambda *call: statements.append(call[2]))
    for turn, call in enumerate(conversation(200)):
        store.add_call(call)
        if turn + 1 in (50, 100, 200):
            sizes[turn + 1] = stored_bytes(store)
    assert sum("chain" in statement for statement in statements) == 0  # nothing had to be read back
    first, second = sizes[100] - sizes[50], sizes[200] - sizes[100]
    assert second < 2.1 * first
    assert sizes[200] < 200 * 1500
    assert store.episode("e").calls == [*conversation(200)]


def test_another_process_goes_on_where_one_ended(store_place):
    calls = [*conversation(40)]
    with Store.open(store_place) as store:
        store.begin(make_start())
    for call in calls:
        with Store.open(store_place) as store:
            store.add_call(call)
    with Store.open(store_place) as store:
        assert stored_bytes(store) < 40 * 1500
        assert store.episode("e").calls == calls


def test_many_branches_at_once_stay_small(store):
    store.begin(make_start())
    branches = [
        [make_call([branch, *call.prompt_ids], call.sampled_ids, id=f"b{branch}-{call.index}", index=100 * call.index + branch,
                   parent_id=f"b{branch}-{call.index - 1}" if call.index else None, request=call.request)
         for call in conversation(8)]
        for branch in range(90)
    ]  # fmt: skip
    for turn in zip(*branches, strict=True):
        store.add_calls(turn)
    first = stored_bytes(store)
    assert first < 90 * (4000 + 8 * 1500)
    assert store.call("b89-7") == branches[89][7]


def test_memory_is_bounded():
    bases = Bases(max_bytes=10_000)
    for number in range(1000):
        bases.add(f"e{number % 20}", Base(f"c{number}", bytes(900), {"k": "x" * 100}))
        kept = [base for episode in range(20) for base in bases.latest(f"e{episode}").values()]
        assert sum(base.size for base in kept) <= 10_000
    assert kept
    for number in range(20):
        bases.forget(f"e{number}")
    bases.add("huge", Base("c", bytes(20_000), {}))
    assert bases.latest("huge") == {}
    bases.add("e", Base("c", bytes(9_000), {}))
    assert list(bases.latest("e")) == ["c"]


def test_reading_one_call_costs_what_it_holds_and_not_its_turns_squared(tmp_path):
    with Store.open(tmp_path / "episodes.db") as store:
        store.begin(make_start())
        calls = [*conversation(300)]
        for begin in range(0, 300, 50):
            store.add_calls(calls[begin : begin + 50])
        for read in (lambda: store.call("c299"), lambda: store._load_base("e", None)):
            read()
            tracemalloc.start()
            found = read()
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert most < 8 * 2**20  # of every turn: 60 MB
        assert found.sequence == pack_ids(calls[-1].prompt_ids + calls[-1].sampled_ids, "")
        assert store.call("c299") == calls[-1]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("DELETE FROM calls WHERE id = 'c1'", "continues call c1, which is not there"),
        ("UPDATE calls SET base_tokens = 100000 WHERE id = 'c2'", "continues more tokens of call c1 than it has"),
        ("UPDATE calls SET base_id = 'c3' WHERE id = 'c2'", "continues itself"),
        ("UPDATE calls SET request = request || 'x' WHERE id = 'c2'", "has a request that cannot be read"),
        (
            "UPDATE calls SET request = '[[\"messages\",90000,0,0]]\n' WHERE id = 'c2'",
            "has a request that cannot be read",
        ),
    ],
)
def test_a_damaged_chain_is_an_error_and_no_wrong_token(store, damage, said):
    store.begin(make_start())
    calls = [*conversation(4)]
    for call in calls:
        store.add_call(call)
    store._transactions.write(lambda connection: connection.exec_driver_sql(damage))
    for read in (lambda: store.episode("e"), lambda: store.call("c3")):
        with pytest.raises(StoreError, match=said):
            read()
    assert store.call("c0") == calls[0]


def test_a_call_that_is_there_in_another_form_is_no_base(store):
    """Its id came back with other content: what continues the new one must not be put together from the old one."""
    store.begin(make_start())
    store.add_call(make_call([1, 2], [3], id="a", request={"messages": ["old"]}))
    extension = make_call([7, 8, 9, 10], [11], id="b", index=1, parent_id="a", request={"messages": ["new", "more"]})
    with_same_id = make_call([7, 8], [9], id="a", request={"messages": ["new"]})
    store.add_calls([with_same_id, extension])
    assert store.call("b") == extension
    after = make_call([7, 8, 9, 10, 11], [12], id="c", index=2, parent_id="b", request={"messages": ["new", "more", 1]})
    store.add_call(after)
    assert store.episode("e").calls[1:] == [extension, after]


def test_a_delta_without_a_base_is_the_whole():
    stored = delta(b"\1\0\0\0", {"a": "1"}, None)
    assert (stored.base_id, stored.base_tokens, stored.prompt_rest) == (None, 0, b"\1\0\0\0")
    assert read_request(stored.request, {}) == {"a": "1"}
