"""The parts of the build that pyproject.toml cannot express: C kernels that may fail to compile, and the viewer's page.

Without a compiler the package installs all the same and the server says once that its CPU path is the slower one. A source
archive has the page compiled in it, or is not made; so has every wheel made of one. `pip install` from a checkout goes on without
a page where npm cannot make it, and `lrl ui` says how to come by it. A page older than its sources goes into neither.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import SetupError

_KERNELS = "rollout_server/kernels/cpu"
_WEB, _PAGE = Path("trainers/viewer/web"), Path("trainers/viewer/page")
_NPM_STEPS = (["install", "--no-save", "--silent", "--no-progress"], ["run", "--silent", "build"])
_NODE = "Node.js 20.19 or 22.12, or newer, with npm"


class BuildWithPage(build_py):
    def run(self):
        fault = None if self.editable_mode else _page_fault()  # a checkout's page is made by `make page`
        super().run()
        if fault:
            shutil.rmtree(Path(self.build_lib) / _PAGE, ignore_errors=True)
            print(f"warning: `lrl ui` will have no page: {fault}", file=sys.stderr)


class ArchiveWithPage(sdist):
    def run(self):
        if fault := _page_fault():
            raise SetupError(f"a source archive needs the viewer's page: {fault}")
        super().run()


def _page_fault():
    """Builds the page if it has to be. Why there is none that fits its sources; None if there is one."""
    if _is_up_to_date():
        return None
    npm = shutil.which("npm")
    if npm is None:
        return f"it is not built, or is older than its sources, and npm is not here ({_NODE}, builds it)"
    try:
        for words in _NPM_STEPS:
            subprocess.run([npm, *words], cwd=_WEB, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{error} ({_NODE}, builds it)"
    return None


def _is_up_to_date():
    """In an unpacked source archive it is whatever the files' times say."""
    index = _PAGE / "index.html"
    if not index.is_file():
        return False
    sources = [*_WEB.glob("*.*"), _WEB / "src", *(_WEB / "src").rglob("*")]  # folders' times tell of what was deleted
    return Path("PKG-INFO").is_file() or index.stat().st_mtime >= max(path.stat().st_mtime for path in sources)


setup(
    cmdclass={"build_py": BuildWithPage, "sdist": ArchiveWithPage},
    ext_modules=[
        Extension(
            "rollout_server.kernels.cpu._kernels",
            [f"{_KERNELS}/kernels.c"],
            depends=[f"{_KERNELS}/{name}.h" for name in ("attention", "bodies", "linear", "rows", "sample", "vector")],
            extra_compile_args=[
                "-O3",
                "-fopenmp",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-Wno-psabi",
                "-fno-strict-aliasing",
            ],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ],
)
