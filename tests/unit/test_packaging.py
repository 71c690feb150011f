"""What goes into a source archive and into a wheel, with the viewer's page and without; what an installation lacks is named."""

from __future__ import annotations

import _ctypes
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from lightning_rl.doctor import EXTRAS
from lightning_rl.errors import ServerError
from rollout_server.kernels import native
from trainers.viewer.command import NEEDED
from trainers.viewer.page_files import KINDS

ROOT = Path(__file__).parents[2]
PAGE = {f"trainers/viewer/page/{name}" for name in KINDS}


class Checkout:
    """Of the build's own files and the viewer's, with npm or without."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.programs, self.said = folder / "checkout", folder / "programs", ""
        self.programs.mkdir()
        viewer = self.folder / "trainers" / "viewer"
        (viewer / "web" / "src" / "shared").mkdir(parents=True)
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.folder)
        for name in (".npmrc", "index.html", "package.json", "package-lock.json", "src/main.tsx"):
            shutil.copyfile(ROOT / "trainers/viewer/web" / name, viewer / "web" / name)
        for package in (viewer.parent, viewer):
            (package / "__init__.py").touch()
        (viewer / "web" / "node_modules" / "react").mkdir(parents=True)
        (viewer / "web" / "node_modules" / "react" / "package.json").touch()

    def add_page(self) -> None:
        for name in PAGE:
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).write_text("built")

    def add_npm(self, does: str) -> None:
        (self.programs / "npm").write_text(f"#!/bin/sh\n{does}\n")
        (self.programs / "npm").chmod(0o755)

    def setup(self, *words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "setup.py", "--quiet", *words],
            cwd=folder or self.folder,
            env={**os.environ, "PATH": str(self.programs)},
            capture_output=True,
            text=True,
        )

    def built(self) -> set[str]:
        """What a wheel would hold that is made now."""
        made = self.setup("build_py", "--build-lib", "built")
        assert made.returncode == 0, made.stderr
        self.said = made.stderr
        return files(self.folder / "built")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    pytest.importorskip("setuptools", "77")
    return Checkout(tmp_path)


def test_a_source_archive_has_page_and_sources_and_its_wheel_the_page(checkout: Checkout, tmp_path: Path) -> None:
    checkout.add_page()
    made = checkout.setup("sdist")
    assert made.returncode == 0, made.stderr
    assert "absent from the `packages` configuration" not in made.stderr
    (archive,) = (checkout.folder / "dist").iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    held = files(unpacked)
    web = {f"trainers/viewer/web/{name}" for name in (".npmrc", "index.html", "package-lock.json", "src/main.tsx")}
    assert held >= PAGE | web
    assert not [name for name in held if "node_modules" in name]
    (unpacked / "trainers/viewer/web/package.json").touch()  # who unpacks an archive need not keep its files' times
    made = checkout.setup("build_py", "--build-lib", str(tmp_path / "wheel"), folder=unpacked)
    assert made.returncode == 0, made.stderr
    assert files(tmp_path / "wheel") == PAGE | {"trainers/__init__.py", "trainers/viewer/__init__.py"}


def test_a_page_that_cannot_be_built_goes_into_nothing(checkout: Checkout) -> None:
    """Nor does an old one, or what an earlier build left."""
    assert not checkout.built() & PAGE
    assert "warning: `lrl ui` will have no page: it is not built" in checkout.said
    assert "Node.js 20.19" in checkout.said
    checkout.add_page()
    assert checkout.built() > PAGE
    (checkout.folder / "trainers/viewer/web/src/shared").rmdir()
    checkout.add_npm("exit 3")
    assert not checkout.built() & PAGE
    assert "exit status 3" in checkout.said
    made = checkout.setup("sdist")
    assert made.returncode != 0
    assert "a source archive needs the viewer's page" in made.stderr
    assert not (checkout.folder / "dist").exists()
    checkout.add_npm(f"/bin/mkdir -p ../page; for f in {' '.join(KINDS)}; do echo new >../page/$f; done")
    assert checkout.built() > PAGE


def test_what_the_viewer_needs_is_the_same_in_all_three_places() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["ui"]
    assert list(NEEDED) == EXTRAS["ui"] == [requirement.partition(">=")[0] for requirement in declared]


def test_kernels_of_another_version_are_named() -> None:
    with pytest.raises(ServerError, match="do not fit this version") as caught:
        native.opened(_ctypes.__file__)
    assert "build them anew" in (caught.value.hint or "")
