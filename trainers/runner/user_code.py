"""The user's own Python: loading a function from it, and what it imports.

A file is loaded as `python file.py` would find its neighbours, and a module as `import` would in the folder that it is in, except
that the folder comes last on `sys.path`: it can never shadow an installed package, ours included.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import crc32

from lightning_rl.errors import RecipeError
from lightning_rl.recipe.functions import Reference


def load_function(path: Path, name: str, module: str = "") -> Callable[..., Any]:
    """The function `name` of the file, or of the module that the file is: see `recipe.functions.Reference`.

    What the file raises on import is raised as it is.
    """
    path = path.resolve()
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    loaded = _import(Reference(path, name, module)) if module else _load(path)
    function = getattr(loaded, name, None)
    if not callable(function):
        raise RecipeError(f"{path}: has no function {name!r}")
    return function


def third_party_imports(paths: Iterable[Path]) -> list[str]:
    """Modules that the files, and their neighbours which they import, import at top level from elsewhere."""
    found: dict[str, None] = {}
    todo = [path.resolve() for path in paths]
    seen = set(todo)
    while todo:
        path = todo.pop()
        for name in _top_level_imports(path):
            local = _neighbour(path.parent, name)
            if local is None:
                found.setdefault(name)
            elif local not in seen:
                seen.add(local)
                todo.append(local)
    return list(found)


def installed_modules(names: Iterable[str]) -> list[str]:
    """Those of the loaded modules that belong to Python or to an installed package: they never change during a run."""
    places = [Path(sysconfig.get_path(place)) for place in ("stdlib", "purelib", "platlib")]

    def is_installed(name: str) -> bool:
        origin = str(getattr(getattr(sys.modules[name], "__spec__", None), "origin", None))
        return any(Path(origin).is_relative_to(place) for place in places)

    return sorted(filter(is_installed, names))


def _import(reference: Reference) -> ModuleType:
    _search(reference.root)
    loaded = importlib.import_module(reference.module)
    found = Path(getattr(loaded, "__file__", None) or "").resolve()
    if found != reference.path:
        raise RecipeError(
            f"{reference.module} is {found} here, not {reference.path}",
            hint=f"name it by its file: {reference.path}:{reference.name}",
        )
    return loaded


def _search(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _load(path: Path) -> ModuleType:
    _search(path.parent)
    name = _module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_name(path: Path) -> str:
    """The name by which neighbours import the file, unless an installed module has it."""
    module = sys.modules.get(path.stem)
    if module is not None:
        origin = getattr(module, "__file__", None)
    else:
        spec = importlib.util.find_spec(path.stem) if path.stem.isidentifier() else None
        origin = spec.origin if spec else None
    return path.stem if origin and Path(origin) == path else f"_recipe_{path.stem}_{crc32(bytes(path)):08x}"


def _top_level_imports(path: Path) -> list[str]:
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, OSError):
        return []  # running the file will say what is wrong with it
    names = []
    for node in body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return names


def _neighbour(folder: Path, name: str) -> Path | None:
    """The file beside the importing one that `import name` finds, if no installed module comes first."""
    base = folder.joinpath(*name.split("."))
    local = next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
    if local is None:
        return None
    spec = importlib.util.find_spec(name.split(".")[0])
    installed = spec is not None and spec.origin is not None and not Path(spec.origin).is_relative_to(folder)
    return None if installed else local
