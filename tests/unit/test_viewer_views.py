"""One episode, one call and a group as the viewer shows them, from a hand-made store; hostile and broken records are shown, too."""

from __future__ import annotations

import contextlib
import functools
import json
import sqlite3
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.episode import Call, Episode, Outcome, Reward, Span, Task
from lightning_rl.episode_tree import episode_tree
from lightning_rl.errors import StoreError
from lightning_rl.store import Store
from lightning_rl.store.outlines import Outline, Tokens
from rollout_server.models.catalog import resolve_model
from tests.unit.domain import make_call, make_recipe, make_start
from trainers.viewer.call_view import NoExperts, call_view, experts
from trainers.viewer.episode_view import Nodes, episode_view, whole_text
from trainers.viewer.group_view import group_view, lines_of
from trainers.viewer.library import NotThere
from trainers.viewer.opened import OpenRun
from trainers.viewer.records import CallNode, SpanNode
from trainers.viewer.texts import LONGEST, BadPlace, Cut

DEEP = "[" * 20_000
HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e"
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "6*7?"}


class Index:
    def __init__(self, *ids: str) -> None:
        self._ids = ids

    def group(self, name: str) -> Sequence[str]:
        return self._ids

    def neighbours(self, episode_id: str) -> tuple[str | None, str | None]:
        return "before", None


def tool_call(id: str, arguments: str = '{"e": "6*7"}') -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "calculator", "arguments": arguments}}


def calls() -> list[Call]:
    """A call of a tool, the answer to it; the same asked again; and one whose history was edited."""
    asks = {"role": "assistant", "content": "", "tool_calls": [tool_call("t1")]}
    told = {"role": "tool", "tool_call_id": "t1", "content": "42"}
    request = {"messages": [SYSTEM, USER], "tools": [{"type": "function"}], "temperature": 1}
    history = [SYSTEM, USER, asks, told]
    edited = [SYSTEM, USER, {"role": "assistant", "content": "no tools"}, {"role": "user", "content": "then?"}]
    return [
        make_call([1, 2, 3], [4, 5], "one", span_id="solver", started_at=2.0, ended_at=3.0, request=request, response=asks),
        make_call([1, 2, 3, 4, 5, 6], [7], "two", index=1, parent_id="one", relation="extension", span_id="nobody", started_at=5.0,
                  versions=[4], request={"messages": history}, response={"content": "42"}),
        make_call([1, 2, 3, 4, 5, 6], [8, 9], "again", index=2, parent_id="one", relation="fork", parted_at=6, span_id="checker",
                  started_at=7.0, versions=[5, 6], request={"messages": history}, response={"content": "41"}),
        make_call([1, 2, 3, 4, 0], [], "edited", index=3, relation="edit", parted_at=4, span_id="solver", started_at=8.0,
                  request={"messages": edited}, response={"content": HOSTILE}),
    ]  # fmt: skip


def spans() -> list[Span]:
    of = {"episode_id": "e"}
    return [
        Span(id="root", name="crew", kind="agent", started_at=1.0, ended_at=9.0, **of),
        Span(id="solver", name="solver", kind="agent", parent_id="root", started_at=1.5, ended_at=0.0, **of),
        Span(id="told", name="calculator", kind="tool", parent_id="solver", started_at=3.0, ended_at=5.0,
             attributes={"call_id": "one", "tool_call_id": "t1", "result": "42"}, **of),
        Span(id="ran", name="calculator", kind="tool", parent_id="solver", started_at=3.5, ended_at=4.0,
             attributes={"tool_call_id": "t1", "arguments": {"e": "6*7"}, "cost": 3}, **of),
        Span(id="over", name="to checker", kind="handoff", parent_id="root", started_at=6.0, ended_at=6.0, **of),
        Span(id="checker", name="checker", kind="agent", parent_id="root", started_at=6.5, ended_at=8.0, error="no", **of),
        Span(id="orphan", name="orphan", kind="chain", parent_id="lost", started_at=0.5, **of),
        Span(id="egg", name="egg", kind="chain", parent_id="hen", started_at=9.0, **of),
        Span(id="hen", name="hen", kind="chain", parent_id="egg", started_at=9.5, **of),
    ]  # fmt: skip


def episode(**values: Any) -> Episode:
    rewards = [
        Reward(episode_id="e", name="correct", value=1.0, source="function"),
        Reward(episode_id="e", name="fine", value=0.5, span_id="told"),
        Reward(episode_id="e", name="fine", value=0.25, call_id="two"),
        Reward(episode_id="e", name="stray", value=2.0, span_id="gone"),
    ]
    start = make_start("e", group="0/t", started_at=1.0, step=0)
    made = Episode(start=start, calls=calls(), spans=spans(), rewards=rewards, outcome=Outcome.COMPLETED, answer="42",
                   counted=True, ended_at=9.0)  # fmt: skip
    return structs.replace(made, **values)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "episodes.db") as opened:
        yield opened


def test_an_episode_is_a_tree_of_all_that_happened(store: Store, tmp_path: Path) -> None:
    store.add_episode(episode())
    recipe = make_recipe(tmp_path, reward={"weights": {"good": 1.0, "correct": 2.0, "fine": 4.0, "stray": 0.0}})
    view = episode_view(OpenRun("k", store, None, recipe), Index("e"), "e")
    assert [("  " * node.depth + node.id, node.parent) for node in view.nodes] == [
        ("orphan", None),
        ("root", None),
        ("  solver", "root"),
        ("    one", "solver"),
        ("    ran", "solver"),
        ("    edited", "solver"),
        ("  two", "root"),
        ("  over", "root"),
        ("  checker", "root"),
        ("    again", "checker"),
        ("egg", None),
        ("  hen", "egg"),
    ]
    nodes = {node.id: node for node in view.nodes}
    tool = nodes["ran"]
    assert isinstance(tool, SpanNode)
    said = [text and text.text for text in (tool.arguments, tool.result, tool.attributes)]
    assert said == ['{"e": "6*7"}', "42", '{"cost": 3}']
    assert [(reward.value, reward.weight) for reward in tool.rewards] == [(0.5, 4.0)]
    assert nodes["checker"].error.text == "no"  # type: ignore[union-attr]
    assert [reward.name for reward in view.rewards] == ["correct", "stray"], "what belongs to no node is the episode's"
    assert view.total == 2 * 1.0 + 4 * 0.75
    assert (view.step, view.before, [sibling.id for sibling in view.siblings]) == (1, "before", ["e"])
    assert [sibling.total for sibling in view.siblings] == [view.total] == [5.0]


def test_calls_say_what_is_new_and_where_they_parted(store: Store) -> None:
    store.add_episode(episode())
    view = episode_view(OpenRun("k", store, None, None), Index("e"), "e")
    found = {node.id: node for node in view.nodes if isinstance(node, CallNode)}
    assert [message.role for message in found["one"].news] == ["system", "user"]
    assert [tool.arguments.text for tool in found["one"].reply.tools] == ['{"e": "6*7"}']
    assert [message.text.text for message in found["two"].news] == ["42"]
    assert found["again"].news == []
    assert [message.text.text for message in found["edited"].news] == ["no tools", "then?"]
    assert [found[id].continues for id in ("one", "two", "again", "edited")] == [None, "one", "two", "one"]
    assert found["again"].versions == [5, 6]
    assert (found["edited"].mean_logprob, found["edited"].versions, found["edited"].messages) == (None, [], 4)


def test_a_call_knows_who_wrote_its_prompt(store: Store) -> None:
    store.add_episode(episode())
    run = OpenRun("k", store, None, None)
    view = call_view(run, "again")
    assert [(part.start, part.end, part.call) for part in view.prompt_parts] == [
        (0, 3, None),
        (3, 5, "one"),
        (5, 6, None),
    ]
    assert (view.before, view.after, view.sampled.ids, view.sampled.texts) == ("two", "edited", [8, 9], [])
    assert "no recipe" in view.tokenizer
    assert view.parameters.text == "{}"
    first = call_view(run, "one")
    assert (first.tools and first.tools.text, first.parameters.text) == ('[{"type": "function"}]', '{"temperature": 1}')
    edited = call_view(run, "edited")
    assert [(part.start, part.end, part.index) for part in edited.prompt_parts] == [
        (0, 3, None),
        (3, 4, 0),
        (4, 5, None),
    ]
    assert view.node == next(n for n in episode_view(run, Index(), "e").nodes if n.id == "again")
    with pytest.raises(NotThere):
        call_view(run, "nobody")


def test_whatever_somebody_wrote_is_text(store: Store) -> None:
    huge = "x" * 10_000_000
    call = make_call([1], [2], "c", request={"messages": [{"role": HOSTILE * 99, "content": "\ud800 half"}, {"content": huge}]},
                     response={"content": HOSTILE, "tool_calls": [tool_call("t", "no JSON \udc00")]})  # fmt: skip
    span = Span(
        id="s",
        episode_id="e",
        name="\x00" + HOSTILE,
        kind="tool",
        attributes={"result": huge, "\ud800": [float("nan")]},
    )
    wrong = episode(
        start=structs.replace(make_start("e"), task=Task(id="t", input={"q": HOSTILE})), calls=[call], spans=[span], rewards=[],
        outcome=None, answer=None, counted=False,
    )  # fmt: skip
    store.add_episode(wrong)
    run = OpenRun("k", store, None, None)
    view = episode_view(run, Index(), "e")
    text = msgspec.json.encode(view)
    assert len(text) < 60_000
    assert json.loads(text)["task_input"]["text"] == json.dumps({"q": HOSTILE}, ensure_ascii=False)
    node = next(node for node in view.nodes if isinstance(node, CallNode))
    assert node.news[0].text.text == "\ufffd half"
    assert len(node.news[0].role) < 400
    assert node.reply.tools[0].arguments.text == "no JSON \ufffd"
    long = node.news[1].text
    assert (len(long.text), long.length) == (LONGEST, len(huge))
    assert whole_text(run, long.place).text == huge
    tool = next(node for node in view.nodes if isinstance(node, SpanNode))
    assert tool.name.startswith("␀<script>")
    assert tool.result is not None
    assert len(whole_text(run, tool.result.place).text) == len(huge)
    assert (view.ended_at, view.total, view.outcome) == (None, None, None)
    for place in ("", "{", '["e"]', "[1, 2]", '["e", {}]', "[" * 10_000):
        with pytest.raises(BadPlace):
            whole_text(run, place)
    for gone in ('["e", "answer"]', '["other", "answer"]', '["e", "call", "c", "news", 7]'):
        with pytest.raises(NotThere):
            whole_text(run, gone)


@pytest.mark.parametrize(
    ("change", "row"),
    [("UPDATE calls SET response = '{' WHERE id = 'one'", "call one"), ("UPDATE calls SET response = '[]'", "call one"),
     (f"UPDATE calls SET response = '{DEEP}'", "call"),
     ("UPDATE calls SET restricted = '' WHERE id = 'two'", "call two"), ("UPDATE calls SET logprobs = x'010203'", "call one"),
     ("UPDATE calls SET versions = x'01' WHERE id = 'two'", "call two"), ("UPDATE calls SET sampled_ids = 'text'", "call one"),
     ("UPDATE calls SET request = 7 WHERE id = 'one'", "call one"), ("UPDATE episodes SET outcome = 'weird'", "episode e"),
     ("UPDATE episodes SET task_input = '{'", "episode e"), ("UPDATE episodes SET sampling = '{\"x\": 1}'", "episode e"),
     ("UPDATE spans SET attributes = '{' WHERE id = 'root'", "span root"),
     (f"UPDATE episodes SET answer = '{DEEP}'", "episode e")],
)  # fmt: skip
def test_a_damaged_row_is_named(store: Store, change: str, row: str) -> None:
    store.add_episode(episode())
    with contextlib.closing(sqlite3.connect(store.place)) as database, database:
        database.execute(change)
    run = OpenRun("k", store, None, None)
    whole = functools.partial(store.episode, "e")
    views = (
        whole,
        functools.partial(episode_view, run, Index("e"), "e"),
        functools.partial(group_view, run, Index("e"), "0/t"),
    )
    for view in views:
        with pytest.raises(StoreError, match=f"{row}.* cannot be read") as damage:
            view()
        assert "the store is damaged" in (damage.value.hint or "")


KEYS = [
    "role",
    "content",
    "type",
    "text",
    "name",
    "arguments",
    "input",
    "function",
    "tool_calls",
    "id",
    "call_id",
    "messages",
]
WORDS = ["text", "tool_use", "tool_result", "function_call", "reasoning", "message", "assistant", "{}", "\ud800", ""]
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5)


@given(said=FIELDS, messages=st.lists(FIELDS | VALUES, max_size=3) | VALUES, replies=st.tuples(FIELDS, FIELDS))
def test_records_that_no_server_of_ours_wrote_can_be_looked_at(said: Any, messages: Any, replies: Any) -> None:
    made = [
        make_call([1], [2], str(index), index=index, request=said | {key: messages}, response=reply)
        for index, (key, reply) in enumerate(zip(("messages", "input"), replies, strict=True))
    ]
    kinds = [Span(id=kind, episode_id="e", name="n", kind=kind, attributes=said) for kind in ("tool", "handoff", "odd")]
    outline = Outline(episode(calls=made, spans=kinds), {call.id: Tokens(b"", 0) for call in made})
    nodes = Nodes(outline, {}, Cut()).all()
    assert {call.id for call in made} <= {node.id for node in nodes}
    assert len(lines_of(outline)) >= len(made)
    msgspec.json.encode(nodes)


def test_deep_trees_and_long_circles_end() -> None:
    chain = [
        Span(id=str(n), episode_id="e", name="n", kind="chain", parent_id=str(n - 1), started_at=n) for n in range(3000)
    ]
    assert [node.depth for node in episode_tree(episode(spans=chain, calls=[], rewards=[]))] == [*range(3000)]
    chain[0] = structs.replace(chain[0], parent_id="2999")
    circle = episode_tree(episode(spans=chain[::-1], calls=[], rewards=[]))
    assert [node.depth for node in circle] == [*range(3000)]


def test_numbers_that_are_none_are_left_out(store: Store) -> None:
    inf = float("inf")
    call = make_call([1], [2, 3], "c", logprobs=[-inf, -0.5], entropies=[0.5, float("nan")],
                     alternatives=[[(2, -0.5), (4, -inf)], [(3, inf)]])  # fmt: skip
    store.add_episode(episode(calls=[call], spans=[], rewards=[]))
    view = call_view(OpenRun("k", store, None, None), "c")
    assert (view.logprobs, view.entropies) == ([None, -0.5], [0.5, None])
    assert [[one.id for one in token] for token in view.alternatives] == [[2], []]


def test_experts_are_those_of_a_layer(store: Store, tmp_path: Path) -> None:
    layers, tokens = 3, 4  # of five, the last never went through the model
    recorded = array("h", range(tokens * layers * 2)).tobytes()
    call = make_call([1, 2, 3], [4, 5], "c", experts=recorded)
    store.add_episode(episode(calls=[call], spans=[], rewards=[]))
    recipe = make_recipe(tmp_path, model={"name": str(resolve_model("tiny-moe"))})
    run = OpenRun("k", store, None, recipe)
    assert call_view(run, "c").expert_layers == layers
    columns = experts(run, "c", 1)
    assert (columns.start, columns.layers, columns.experts) == (0, 3, [[2, 3], [8, 9], [14, 15], [20, 21]])
    with pytest.raises(NoExperts, match="there are 3"):
        experts(run, "c", 3)


def sample(id: str, number: int, replies: Sequence[str], correct: float | None) -> Episode:
    made = []
    for index, reply in enumerate(replies):
        said = [
            part
            for text in replies[:index]
            for part in ({"role": "assistant", "content": text}, {"role": "user", "content": "go on"})
        ]
        made.append(
            make_call([1, 2, 3, *range(10, 10 + index)], [ord(reply[0])], f"{id}-{index}", episode_id=id, index=index,
                      started_at=float(index), request={"messages": [SYSTEM, USER, *said]}, response={"content": reply})
        )  # fmt: skip
    rewards = [] if correct is None else [Reward(episode_id=id, name="good", value=correct)]
    start = make_start(id, sample=number, group="0/t")
    return Episode(start=start, calls=made, rewards=rewards, outcome=Outcome.COMPLETED, counted=True)


def test_samples_of_a_group_are_aligned_where_they_part(store: Store) -> None:
    for one in (
        sample("worst", 0, ["think", "it is 41"], 0.0),
        sample("none", 1, [], None),
        sample("best", 2, ["think", "it is 42", "done"], 1.0),
        sample("odd", 3, ["think", "I give up"], None),
    ):
        store.add_episode(one)
    for number, task in enumerate(("a", "z")):
        start = make_start(f"other{number}", group=f"0/{task}")
        store.begin(structs.replace(start, task=Task(id=task, input={})))
    view = group_view(OpenRun("k", store, None, None), Index("worst", "none", "best", "odd"), "0/t")
    assert [one.episode for one in view.samples] == ["best", "worst", "none", "odd"]
    assert [(one.call, one.message.text.text) for one in view.shared] == [
        (None, "Be brief."),
        (None, "6*7?"),
        ("best-0", "think"),
        (None, "go on"),
    ]
    best, worst, none, odd = view.samples
    assert [(one.call, one.message.text.text) for one in best.messages] == [
        ("best-1", "it is 42"),
        (None, "go on"),
        ("best-2", "done"),
    ]
    assert [one.same_characters for one in view.samples] == [0, len("it is 4"), 0, 0]
    assert (none.messages, none.total, odd.total) == ([], None, None)
    assert [one.message.text.text for one in worst.messages] == ["it is 41"]
    assert (view.shared_tokens, view.before, view.after, view.step) == (4, "0/a", "0/z", 1)
    with pytest.raises(NotThere):
        group_view(OpenRun("k", store, None, None), Index(), "0/t")
