"""How a recipe names the user's own Python: `file.py:function`, or `[folder/]package.module:function`.

A file is taken relative to the recipe. A module is looked for among the installed ones first, then in the recipe's folder (or in
the folder that is named, and there only). References are checked by reading the file, without running it.
"""

from __future__ import annotations

import ast
import difflib
import re
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


class Reference(NamedTuple):
    """Where a function of the user's is."""

    path: Path
    """The file that defines it."""
    name: str
    module: str = ""
    """The module's dotted name; "" for a file that is loaded by its path."""

    @property
    def root(self) -> Path:
        """The folder in which the module's first part is found; the file's own where there is no module."""
        levels = self.module.count(".") + (self.path.name == "__init__.py") if self.module else 0
        return self.path.parents[levels]

    def __str__(self) -> str:
        """As it is found again from any folder."""
        if not self.module:
            return f"{self.path}:{self.name}"
        return f"{self.module}:{self.name}" if _is_installed(self.root) else f"{self.root / self.module}:{self.name}"


def resolve_reference(reference: str, folder: Path) -> Reference:
    """Find the function, relative to `folder`. ValueError says what is wrong, with the nearest valid name."""
    place, colon, name = reference.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise ValueError(f"must be written as path/to/file.py:function or package.module:function, not {reference!r}")
    if place.endswith(".py"):
        path, module = _file(folder / Path(place).expanduser()), ""
    else:
        path, module = _module(place, folder)
    names = _names(path)
    if name not in names and not {"*", "__getattr__"} & set(names):
        raise ValueError(f"{path} defines no {name!r} at its top level{did_you_mean(name, names)}")
    return Reference(path, name, module)


def did_you_mean(name: str, valid: list[str]) -> str:
    """` (did you mean 'x'?)`, or nothing if no valid name is near."""
    near = difflib.get_close_matches(name, valid, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _file(path: Path) -> Path:
    path = path.resolve()
    if not path.is_file():
        neighbours = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ValueError(f"there is no file {path}{did_you_mean(path.name, neighbours)}")
    return path


def _module(place: str, folder: Path) -> tuple[Path, str]:
    """The file of `[folder/]package.module`, and the module's name."""
    inside, slash, module = place.rpartition("/")
    if not _MODULE.fullmatch(module):
        raise ValueError(f"{place!r} is neither a file ending in .py nor the dotted name of a module")
    folder = (folder / Path(inside).expanduser() if slash else folder).resolve()
    search = [str(folder)] if slash else [*sys.path, str(folder)]
    found = ""
    for part in module.split("."):
        found = f"{found}.{part}" if found else part
        spec = PathFinder.find_spec(found, search)
        if spec is None and found == part and not slash:
            spec = find_spec(part)  # an editable installation; nothing is run for a module without a parent
        if spec is None:
            known = [entry.stem for root in search if Path(root).is_dir() for entry in Path(root).iterdir()]
            where = f"in {folder}" if slash else f"installed, nor in {folder}"
            raise ValueError(f"there is no module {found} {where}{did_you_mean(part, known)}")
        search = list(spec.submodule_search_locations or [])
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"{module} is not a Python file: name a module in it that is one")
    return Path(spec.origin).resolve(), module


def _names(path: Path) -> list[str]:
    try:
        return list(_defined(ast.parse(path.read_bytes()).body))
    except SyntaxError as error:
        raise ValueError(f"{path} is not valid Python: line {error.lineno}: {error.msg}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _is_installed(folder: Path) -> bool:
    """Whether modules there are found from anywhere by this Python."""
    return folder in {Path(sysconfig.get_path(place)).resolve() for place in ("stdlib", "purelib", "platlib")}


def _defined(body: list[ast.stmt]) -> Iterator[str]:
    """Names that the statements may bind: definitions, imports, assignments, also under `if`, `try` and `with`."""
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                yield from ((alias.asname or alias.name).split(".")[0] for alias in aliases)
            case ast.Assign(targets=targets):
                yield from (target.id for target in targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
                yield name
            case ast.If() | ast.Try() | ast.With():
                for part in ("body", "orelse", "finalbody"):
                    yield from _defined(getattr(statement, part, []))
                for handler in getattr(statement, "handlers", []):
                    yield from _defined(handler.body)
