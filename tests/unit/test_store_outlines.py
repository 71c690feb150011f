"""An outline of an episode says what the episode says, whatever its calls repeat of each other."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from msgspec import structs

from lightning_rl.store import Store
from lightning_rl.store.outlines import load_chosen, load_episode_of, load_group_place, load_groups, load_outline
from tests.unit.domain import make_call, make_start
from tests.unit.test_store_deltas import histories

_numbers = itertools.count()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    with Store.open(tmp_path_factory.mktemp("store") / "episodes.db") as opened:
        yield opened


@settings(max_examples=40, deadline=None)
@given(history=histories())
def test_it_is_the_episode_with_its_prompts_packed(store: Store, history) -> None:
    id = f"e{next(_numbers)}"
    store.begin(make_start(id))
    store.add_calls([structs.replace(call, id=f"{id}-{call.id}", episode_id=id, experts=b"\0\1") for call in history])
    outline, episode = store.read(lambda connection: load_outline(connection, id)), store.episode(id)
    assert outline is not None
    assert structs.replace(outline.episode, calls=[]) == structs.replace(episode, calls=[])
    assert outline.episode.calls == [structs.replace(call, prompt_ids=[], experts=None) for call in episode.calls]
    for call, short in zip(episode.calls, outline.episode.calls, strict=True):
        assert json.dumps(call.request) == json.dumps(short.request)
        tokens = outline.tokens[call.id]
        assert (tokens.prompt_ids(), tokens.prompt, tokens.sampled) == (
            call.prompt_ids,
            len(call.prompt_ids),
            len(call.sampled_ids),
        )


def test_what_a_long_list_repeats_is_told_from_what_only_looks_so(store: Store) -> None:
    lists = [[1], [1, 2], [12, 3], [[1], [2]], [[1], [2], "]"], [], [[1], [2], "],"], [float("nan")], [1, 2, 3]]
    store.begin(make_start("lists"))
    calls = [
        make_call([1], [2], f"l{n}", episode_id="lists", index=n, request={"messages": said})
        for n, said in enumerate(lists)
    ]
    store.add_calls(calls)
    outline = store.read(lambda connection: load_outline(connection, "lists"))
    assert outline is not None
    assert json.dumps([call.request["messages"] for call in outline.episode.calls]) == json.dumps(lists)


def test_groups_are_found_by_name(tmp_path: Path) -> None:
    with Store.open(tmp_path / "episodes.db") as store:
        for id, group, step in (("a", "3/t", 3), ("b", "3/t", 3), ("c", "3/s", 3), ("d", "no number", 4), ("e", "", 3)):
            store.begin(make_start(id, group=group, step=step))
        assert store.read(lambda connection: load_groups(connection, "train", 3)) == ["3/s", "3/t"]
        places = [
            store.read(lambda connection, name=name: load_group_place(connection, name))
            for name in ("3/t", "no number", "9/t")
        ]
        assert places == [("train", 3), ("train", 4), None]
        assert [one.id for one in store.read(lambda connection: load_chosen(connection, ["b", "x", "a"]))] == ["a", "b"]
        assert store.read(lambda connection: load_episode_of(connection, "x")) is None
