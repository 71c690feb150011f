import os
from pathlib import Path

import pytest

from lightning_rl.cli import main
from lightning_rl.errors import LightningError, RecipeError, StoreError, TraceFileError
from lightning_rl.recipe import load_recipe
from lightning_rl.store import Store
from lightning_rl.store.place import settle_store, store_of
from tests.unit.domain import make_call, make_start

ROOT = Path(__file__).resolve().parents[2]


def test_a_runs_episodes_stay_where_they_began(tmp_path):
    run = tmp_path / "runs" / "my recipe" / "20260101-000000"
    run.mkdir(parents=True)
    assert settle_store(run, None) == run / "episodes.db"
    url = "postgresql://me:${SECRET}@host/db"
    place = settle_store(run, url)
    assert place == settle_store(run, None) == store_of(run) == store_of(str(run))
    assert str(place).startswith(url + "?run=my-recipe.20260101-000000-")
    (run.parent / "latest").symlink_to(run.name)
    assert store_of(run.parent) == place
    other = tmp_path / "elsewhere" / "my recipe" / "20260101-000000"
    other.mkdir(parents=True)
    assert settle_store(other, url) != place
    with pytest.raises(StoreError, match="no episode database here"):
        store_of(tmp_path)


def test_a_run_in_a_database_is_listed_exported_and_imported(tmp_path, postgres, capsys, monkeypatch):
    monkeypatch.setenv("LRL_TEST_USER", "lrl")
    url = postgres.url().partition("&run=")[0].replace("lrl@", "${LRL_TEST_USER}@")
    run = tmp_path / "calculator" / "20260101-000000"
    run.mkdir(parents=True)
    with Store.open(settle_store(run, url)) as store:
        store.begin(make_start("there", phase="train", step=3))
        store.add_call(make_call([1], [2], episode_id="there"))
        store.begin(make_start("not-there", phase="eval-base"))
    assert main(["traces", "list", str(run)]) == 0
    assert "there" in capsys.readouterr().out
    out, copy = tmp_path / "t.jsonl.gz", tmp_path / "copy.db"
    assert main(["traces", "export", str(run), "--out", str(out), "--phase", "train", "--step", "4"]) == 0
    assert capsys.readouterr().out == f"1 episode in {out}\n"
    for _ in range(2):
        assert main(["traces", "import", str(out), "--out", str(copy)]) == 0
        assert capsys.readouterr().out == f"1 episode of {out} in {copy}\n"
    with Store.open(copy) as store:
        assert [call.sampled_ids for call in store.episode("there").calls] == [[2]]
        assert store.episode_ids() == ["there"]


def test_an_import_of_nothing_makes_no_database(tmp_path):
    from tracers import cli

    def run(*arguments):
        import argparse

        parser = argparse.ArgumentParser()
        cli.configure(parser)
        return cli.run(parser.parse_args(arguments))

    with pytest.raises(TraceFileError, match="there is no file"):
        run("import", str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "new.db"))
    with pytest.raises(StoreError, match="no episode database"):
        run("export", str(tmp_path), "--out", str(tmp_path / "t.jsonl"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url",
    ["postgresql://me:hunter2@host/db", "postgresql://host/db?password=hunter2", "mysql://host/hunter2", "hunter2.db"],
)
def test_a_recipe_names_a_database_and_no_password(url):
    with pytest.raises(RecipeError) as caught:
        load_recipe(ROOT / "recipes" / "calculator.yaml", [f"recording.store={url}"])
    assert "recording.store" in str(caught.value)
    assert isinstance(caught.value, LightningError)
    assert "hunter2" not in str(caught.value).replace(f"recording.store={url}", "")


def test_a_recipe_may_name_one_by_the_environment():
    for url in ("postgresql://me:${PW}@host/db", "postgresql://me@host/db?run=x", "${DATABASE_URL}"):
        recipe = load_recipe(ROOT / "recipes" / "calculator.yaml", [f"recording.store={url}"])
        assert recipe.recording.store == url
    assert "PW" not in os.environ
