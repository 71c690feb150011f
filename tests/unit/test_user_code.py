"""Loading the user's own files."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_rl.errors import RecipeError
from trainers.runner.user_code import installed_modules, load_function, third_party_imports


@pytest.fixture(autouse=True)
def unchanged_imports() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_a_file_and_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, my_agent="import my_helper\ndef f(): return my_helper.one()", my_helper="def one(): return 1")
    before = list(sys.path)
    function = load_function(tmp_path / "my_agent.py", "f")
    assert function() == 1
    assert sys.path == [*before, str(tmp_path)], "the user's folder comes last"
    assert load_function(tmp_path / "my_agent.py", "f") is function


def test_a_file_named_as_an_installed_module_shadows_nothing(tmp_path: Path) -> None:
    write(tmp_path, colorsys="def f(): return 'mine'")
    assert load_function(tmp_path / "colorsys.py", "f")() == "mine"
    import colorsys

    assert hasattr(colorsys, "rgb_to_hsv")


def test_two_files_of_one_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder, twin=f"def f(): return {folder!r}")
    assert [load_function(tmp_path / folder / "twin.py", "f")() for folder in ("a", "b", "a")] == ["a", "b", "a"]


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    write(tmp_path, some_agent="value = 1", broken_agent="import no_such_module_anywhere")
    with pytest.raises(RecipeError, match="no such file"):
        load_function(tmp_path / "other.py", "f")
    with pytest.raises(RecipeError, match="has no function 'f'"):
        load_function(tmp_path / "some_agent.py", "f")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
            load_function(tmp_path / "broken_agent.py", "f")


def test_third_party_imports_are_found_through_neighbours(tmp_path: Path) -> None:
    write(
        tmp_path,
        top="import my_part, msgspec.json\nfrom rich.text import Text\nfrom . import sibling\ndef f():\n  import late",
        my_part="import sqlalchemy\nimport top",
        msgspec="not the installed one",
    )
    assert set(third_party_imports([tmp_path / "top.py"])) == {"msgspec.json", "rich.text", "sqlalchemy"}
    (tmp_path / "bad.py").write_text("def (")
    assert third_party_imports([tmp_path / "bad.py", tmp_path / "missing.py"]) == []


def test_installed_modules_are_those_that_nobody_edits(tmp_path: Path) -> None:
    write(tmp_path, my_own="def f(): ...")
    load_function(tmp_path / "my_own.py", "f")
    assert installed_modules(["my_own", "msgspec", "json", __name__]) == ["json", "msgspec"]
