"""`file.py:function`: how a recipe names the user's own Python. Checked by reading the file, without running it."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from pathlib import Path


def resolve_reference(reference: str, folder: Path) -> tuple[Path, str]:
    """The file, relative to `folder`, and the name. ValueError says what is wrong, with the nearest valid name."""
    file, colon, name = reference.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise ValueError(f"must be written as path/to/file.py:function, not {reference!r}")
    path = (folder / Path(file).expanduser()).resolve()
    if not path.is_file():
        neighbours = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ValueError(f"there is no file {path}{did_you_mean(path.name, neighbours)}")
    try:
        module = ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise ValueError(f"{path} is not valid Python: line {error.lineno}: {error.msg}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    names = list(_defined(module.body))
    if name not in names:
        raise ValueError(f"{path} defines no {name!r} at its top level{did_you_mean(name, names)}")
    return path, name


def did_you_mean(name: str, valid: list[str]) -> str:
    """` (did you mean 'x'?)`, or nothing if no valid name is near."""
    near = difflib.get_close_matches(name, valid, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


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
