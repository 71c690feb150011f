import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lightning_rl
from lightning_rl.siblings import ShadowedPackageError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "sqlalchemy", "pydantic", "yaml", "numpy", "openai", "transformers", "tracers", "trainers")


def run(code, cwd=ROOT):
    """Python with the repository last on its path, after the working directory."""
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r}); {code}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)


def test_every_public_name_is_there():
    for name in lightning_rl.__all__:
        assert getattr(lightning_rl, name) is not None
        assert name in dir(lightning_rl)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'rolout'"):
        lightning_rl.rolout  # noqa: B018


def test_the_version_is_the_distributions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert lightning_rl.__version__ == project["version"]


def test_importing_it_imports_nothing_heavy():
    done = run("import lightning_rl, json; print(json.dumps(sorted(sys.modules)))")
    assert not set(json.loads(done.stdout)) & set(HEAVY)


def test_importing_it_takes_well_under_a_tenth_of_a_second():
    code = "import time; t = time.process_time(); import lightning_rl; print(time.process_time() - t)"
    assert min(float(run(code).stdout) for _ in range(5)) < 0.1


@pytest.mark.parametrize("shadow", ["tracers.py", "trainers/__init__.py"])
def test_a_folder_that_shadows_a_sibling_is_named(tmp_path, shadow):
    place = tmp_path / shadow
    place.parent.mkdir(exist_ok=True)
    place.touch()
    done = run("import lightning_rl", cwd=tmp_path)
    assert "ShadowedPackageError" in done.stderr
    named = place.parent if place.name == "__init__.py" else place
    assert f"{named} shadows the package {named.stem!r}" in done.stderr


def test_a_folder_without_init_does_not_shadow(tmp_path):
    (tmp_path / "trainers").mkdir()
    assert run("import lightning_rl", cwd=tmp_path).returncode == 0


def test_the_error_is_an_import_error():
    error = ShadowedPackageError("m", hint="h")
    assert isinstance(error, ImportError)
    assert isinstance(error, lightning_rl.LightningError)
    assert (str(error), error.hint) == ("m", "h")
