"""Runs in figures: files that grow, tear and change, states, places; and what may be asked of a list."""

from __future__ import annotations

import json
import os
import threading
import time

import msgspec
import pytest
import yaml

from lightning_rl.errors import LightningError, ResumeError, StoreError
from tests.unit.domain import make_recipe
from trainers.run_directory import RunDirectory, create_run
from trainers.viewer.figures import Figures, Outline
from trainers.viewer.places import shelf_of
from trainers.viewer.query import QueryError, episode_query
from trainers.viewer.runs import Runs, is_held, state_of


def write(path, *rows, end="\n"):
    path.write_text("\n".join(json.dumps(row) for row in rows) + end)


def step(number, **values):
    return {"step": number, "success": number / 10, "ledger": {"masked": {"no_signal": number}}} | values


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = create_run(tmp_path / "runs", "demo")
    made.recipe.write_text(make_recipe(tmp_path, train={"steps": 9, "objective": {"name": "rloo"}}).to_yaml())
    return made


def test_figures_grow_line_by_line_and_half_a_line_waits_for_its_end(tmp_path):
    path, figures = tmp_path / "metrics.jsonl", Figures(tmp_path / "metrics.jsonl")
    assert figures.columns().steps == []
    write(path, step(1), step(2), end='\n{"step": 3, "succ')
    assert figures.columns().steps == [1, 2]
    with path.open("a") as file:
        file.write('ess": 0.5, "kl": null}\n')
    columns = figures.columns()
    assert columns.series == {"success": [0.1, 0.2, 0.5], "ledger.masked.no_signal": [1.0, 2.0, None]}


def test_a_resumed_run_writes_its_figures_anew(tmp_path):
    path, figures, outline = tmp_path / "m", Figures(tmp_path / "m"), Outline(tmp_path / "m")
    write(path, step(1), step(2), step(3))
    outline.refresh()
    assert (figures.columns().steps, outline.steps_done) == ([1, 2, 3], 3)
    write(
        tmp_path / "new", step(1), step(2, success=0.9), {**step(2), "evaluation": "step-2", "ci95": [0.1, 0.4], "n": 8}
    )
    (tmp_path / "new").replace(path)
    outline.refresh()
    assert figures.columns().series["success"] == [0.1, 0.9]
    assert (outline.steps_done, outline.evaluations[0].ci95) == (2, [0.1, 0.4])
    path.unlink()
    outline.refresh()
    assert (figures.columns().steps, outline.steps_done) == ([], 0)


def test_lines_of_others_and_numbers_that_are_none_do_no_harm(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(
        b'{"step": 1, "success": NaN, "text": "x", "kl": Infinity, "list": [1, 2.5]}\n'
        b"\xff\xfe\n[]\n" + b"[" * 100_000 + b'\n{"step": "two"}\n\n'
        b'{"step": 2, "success": 0.5, "advantages": {"edges": [0, 1], "counts": [7]}}\n'
    )
    columns, outline = Figures(path).columns(), Outline(path)
    outline.refresh()
    assert columns.series == {"list.0": [1.0, None], "list.1": [2.5, None], "success": [None, 0.5]}
    assert (columns.edges, columns.counts) == ([0, 1], [None, [7]])
    assert outline.unreadable == 4


def test_of_a_long_run_every_so_manieth_step_is_kept_and_the_last(tmp_path):
    write(tmp_path / "m", *(step(number) for number in range(1, 1000)))
    columns = Figures(tmp_path / "m", most=100).columns()
    assert columns.every == 16
    assert columns.steps == [*range(1, 994, 16), 999]
    assert columns.series["success"][-1] == 99.9


def test_a_run_is_told_by_its_files(run):
    write(
        run.metrics,
        {"step": 0, "evaluation": "base", "success": 0.25, "ci95": [0.1, 0.5], "n": 8},
        step(1, seconds={"rollout": 2.0, "train": 1.0}),
        step(2, seconds={"rollout": 3.0, "train": 1.0}),
    )
    shelf = shelf_of("runs/demo")
    (place,) = shelf.places().values()
    runs = Runs()
    entry = runs.entry(place)
    assert (shelf.chosen, entry.key) == (f"demo.{run.path.name}",) * 2
    assert (entry.model, entry.seed, entry.steps, entry.steps_done) == ("tiny-llama", 0, 9, 2)
    assert (entry.success, entry.success_ci95, entry.note) == ({"base": 0.25}, {"base": [0.1, 0.5]}, "")
    detail = runs.detail(place)
    assert detail.stages == {"rollout": 5.0, "train": 2.0}
    assert (detail.recipe["train.steps"], detail.recipe["train.objective.name"]) == ("9", '"rloo"')
    assert "leave" in detail.formula or "others" in detail.formula
    run.summary.write_text(json.dumps({"success_final": {"value": 0.5, "n": 8, "ci95": [0.2, 0.8]}, "steps": 9}))
    assert runs.entry(place).success == {"base": 0.25, "final": 0.5}


def test_a_recipe_of_another_version_takes_nothing_from_the_curves(run):
    values = yaml.safe_load(run.recipe.read_text())
    run.recipe.write_text(yaml.safe_dump(values | {"of_the_future": {"deep": [1]}}))
    write(run.metrics, step(1))
    (place,) = shelf_of(str(run.path)).places().values()
    detail = Runs().detail(place)
    assert "of_the_future" in detail.entry.note
    assert (detail.recipe["of_the_future.deep"], detail.series["success"], detail.formula) == ("[1]", [0.1], "")
    run.recipe.write_text("a: [")
    assert "recipe.yaml cannot be read" in Runs().entry(place).note


@pytest.mark.parametrize(
    ("text", "says"),
    [("a: " + "[" * 50_000, "more than 50 deep"), ("a: &a [*a]", "within itself"), ("name: " + "x" * 300_000, "longer than"),
     ("a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 9)), "more than 50000 values"),
     ("a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 99)), "more than 50 deep"),
     ("a: \xff".encode("latin-1"), "utf-8"), ("? [1]\n: 2", "recipe")],
)  # fmt: skip
def test_a_recipe_that_could_end_the_viewer_is_not_read(run, text, says):
    run.recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    (place,) = shelf_of(str(run.path)).places().values()
    detail = Runs().detail(place)
    assert says in detail.entry.note
    assert (detail.recipe, detail.formula) == ({}, "")


def test_what_is_wrong_with_the_files_of_a_run_harms_no_other(run, tmp_path):
    fine = create_run(tmp_path / "runs", "fine")
    fine.recipe.write_text("name: fine")
    deep = "[" * 100_000
    write(run.metrics, step(1))
    with run.metrics.open("a") as file:
        file.write(
            f'{{"step": 2, "deep": {deep}}}\n{{"step": 3, "kl": 1{"0" * 400}, "loss": 0.5}}\n{{"step": 1{"0" * 30}}}\n'
        )
        file.write('{"step": 4, "advantages": {"edges": "no", "counts": [1]}}\n')
    run.summary.write_text(
        f'{{"success_final": {{"value": 1{"0" * 400}}}, "success": {{"value": 0.5, "ci95": ["a", {{}}]}}}}'
    )
    run.recipe.write_text(f"seed: 1{'0' * 400}\ntrain: {{steps: [1]}}")
    (run.path / "episodes.url").write_bytes(b"\xff")
    runs, places = Runs(), shelf_of("runs").places()
    entries = {place.name.partition("/")[0]: runs.entry(place) for place in places.values()}
    msgspec.json.encode(entries)
    assert (entries["demo"].steps_done, entries["demo"].success, entries["demo"].seed) == (4, {"eval": 0.5}, None)
    assert entries["fine"].note == ""
    detail = runs.detail(next(place for place in places.values() if place.folder == run.path))
    msgspec.json.encode(detail)
    assert (detail.steps, detail.series["loss"]) == ([1, 3, 4], [None, 0.5, None])
    run.summary.write_text(deep)
    assert runs.entry(places[entries["demo"].key]).note.startswith("2 lines")
    with pytest.raises(StoreError, match=r"episodes\.url"):
        _ = places[entries["demo"].key].store


def test_a_run_runs_while_its_lock_is_held(run):
    assert state_of(run) == "stopped"
    with run.lock():
        assert state_of(run) == "running"
        with pytest.raises(ResumeError):
            run.lock()
    assert state_of(run) == "stopped"
    run.summary.write_text("{}")
    assert state_of(run) == "finished"


def test_asking_whether_a_run_runs_never_keeps_it_from_running(run):
    with run.lock():
        pass
    over = threading.Event()

    def ask():
        while not over.is_set():
            is_held(run.path / ".lock")

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(50):
            run.lock().close()
    finally:
        over.set()
        for asker in askers:
            asker.join()


def test_runs_are_found_two_deep_and_links_are_passed_over(run, tmp_path):
    other = create_run(tmp_path / "runs", "other")
    other.recipe.write_text("name: other")
    (tmp_path / "runs" / "try").mkdir()
    (tmp_path / "runs" / "try" / "episodes.db").touch()
    (tmp_path / "runs" / "notes").mkdir()
    names = {f"demo/{run.path.name}", f"other/{other.path.name}", "try"}
    for source in (None, "runs"):
        shelf = shelf_of(source)
        assert ({place.name for place in shelf.places().values()}, shelf.chosen) == (names, None)
    for source in ("demo", "runs/demo", "runs/demo/latest", str(run.path)):
        shelf = shelf_of(source)
        assert {place.name for place in shelf.places().values()} == names
        assert shelf.chosen == f"demo.{run.path.name}"
    with pytest.raises(LightningError, match="neither a run"):
        shelf_of("nothing")


def test_runs_of_one_name_have_keys_of_their_own(tmp_path):
    for folder in ("a", "b"):
        run = RunDirectory(tmp_path / folder / "demo")
        run.path.mkdir(parents=True)
        run.recipe.touch()
    keys = {place.folder: key for key, place in shelf_of(str(tmp_path)).places().items()}
    assert len(set(keys.values())) == 2
    assert "demo" not in keys.values(), "whichever is found first"
    (tmp_path / "b" / "other").mkdir()
    (tmp_path / "b" / "other" / "recipe.yaml").touch()
    shelf = shelf_of(str(tmp_path / "b" / "demo"))
    assert (shelf.chosen, list(shelf.places())) == ("demo", ["demo", "other"])


def test_a_store_of_another_version_is_said_in_the_list(run):
    header = bytearray(100)
    header[60:64] = (99).to_bytes(4, "big")
    run.store.write_bytes(bytes(header))
    (place,) = shelf_of(str(run.path)).places().values()
    assert "newer version" in Runs().entry(place).note


def test_the_list_of_many_runs_is_quick(tmp_path):
    for number in range(100):
        run = RunDirectory(tmp_path / f"r{number}" / "20260101-000000")
        run.path.mkdir(parents=True)
        run.recipe.write_text("name: r\nmodel: {name: m}\ntrain: {steps: 3}")
        write(run.metrics, *(step(i) for i in range(1, 4)))
    shelf, runs = shelf_of(str(tmp_path)), Runs()
    assert len([runs.entry(place) for place in shelf.places().values()]) == 100
    started = time.process_time()
    assert {runs.entry(place).steps_done for place in shelf.places().values()} == {3}
    assert time.process_time() - started < 0.5


def test_what_an_address_asks_of_the_list():
    text = [
        ("outcome", "timeout"),
        ("outcome", "running"),
        ("step", "3,"),
        ("reward.a b", ",0.5"),
        ("counted", "false"),
    ]
    query = episode_query([*text, ("limit", "7"), ("sort", "reward.a b"), ("descending", "false")])
    assert (query.outcome, query.step, query.reward) == (("timeout", "running"), (3.0, None), {"a b": (None, 0.5)})
    assert (query.counted, query.limit, query.sort, query.descending) == (False, 7, "reward.a b", False)


@pytest.mark.parametrize(
    ("name", "value"),
    [("what", "1"), ("step", "3"), ("step", "a,"), ("limit", "501"), ("offset", "-1"), ("counted", "perhaps"),
     ("text", "x" * 1001), ("reward", "1"), ("tokens", "nan,")],
)  # fmt: skip
def test_an_address_that_says_something_wrong_is_told_so(name, value):
    with pytest.raises(QueryError, match=name):
        episode_query([(name, value)])


def test_another_process_is_seen_to_hold_a_run(run):
    with run.lock():
        child = os.fork()
        if not child:
            os._exit(0 if is_held(run.path / ".lock") else 1)
        assert os.waitpid(child, 0)[1] == 0
