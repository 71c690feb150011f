"""A recipe's YAML, with the place of every value: what a problem report needs beyond the values themselves.

Duplicate keys are problems, since YAML libraries keep one of them silently, and `1e-3` is a number, as in YAML 1.2.
What the values must be is left to `recipe`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from msgspec import Struct, field

from lightning_rl.errors import RecipeError

Place = tuple[str | int, ...]
"""The keys that lead to a value."""


class Problem(Struct, frozen=True, kw_only=True):
    where: str
    """`file:line`, or the override."""
    place: Place
    what: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, dotted(self.place), self.what) if part)


class RecipeFile(Struct, kw_only=True):
    """The values of a file and of the overrides put on top of it."""

    path: Path
    values: dict[str, Any]
    origins: dict[Place, str]
    """Where each value was written."""
    problems: list[Problem] = field(default_factory=list)

    def origin(self, place: Place) -> str:
        """Where the value was written, or the innermost section that it belongs to."""
        while place and place not in self.origins:
            place = place[:-1]
        return self.origins.get(place, f"{self.path}:1")

    def problem(self, place: Place, what: str) -> Problem:
        return Problem(where=self.origin(place), place=place, what=what)

    def lengthen(self, section: Sequence[str], name: str) -> None:
        """Where the section was written as text, make it a section whose field `name` is that text."""
        above: Any = self.values
        for key in section[:-1]:
            above = above.get(key) if isinstance(above, dict) else None
        if isinstance(above, dict) and isinstance(text := above.get(section[-1]), str):
            above[section[-1]] = {name: text}

    def rename(self, section: Sequence[str], old: str, new: str, converted: Callable[[Any], Any]) -> None:
        """A field of older recipes, given as `old`, becomes `new`, with what the value means there. Both are a problem."""
        above: Any = self.values
        for key in section:
            above = above.get(key) if isinstance(above, dict) else None
        if not isinstance(above, dict) or old not in above:
            return
        if above.get(new) is not None:
            self.problems.append(self.problem((*section, old), f"is the older name of {new}: give one of them"))
        value = above.pop(old)
        if above.get(new) is None:
            above[new] = converted(value)
        self.origins.setdefault((*section, new), self.origin((*section, old)))

    def override(self, assignments: Sequence[str]) -> None:
        """Put `a.b=value` on top. Whether there is a field a.b shows when the values are checked."""
        for assignment in assignments:
            name, equals, text = assignment.partition("=")
            where = f"override {name.strip()}"  # values may be secrets
            place = tuple(name.strip().split("."))
            if not equals or not all(place):
                self.problems.append(Problem(where=where, place=(), what="write overrides as section.field=value"))
                continue
            try:
                value = parse_value(text)
            except yaml.YAMLError as error:
                self.problems.append(Problem(where=where, place=place, what=f"not a YAML value: {_reason(error)}"))
                continue
            self._set(place, value, where)

    def _set(self, written: Sequence[str], value: Any, where: str) -> None:
        """Entries of lists go by their number, from 0."""
        section: Any = self.values
        place: Place = ()
        for name in written:
            key: str | int = name
            if isinstance(section, list) and name.isdecimal() and int(name) < len(section):
                key = int(name)
            elif not isinstance(section, dict):
                kind = f"has {len(section)} entries" if isinstance(section, list) else "is not a section"
                what = f"{kind}, so it has no {name!r}"
                self.problems.append(Problem(where=where, place=place, what=what))
                return
            place, above = (*place, key), section
            if len(place) == len(written):
                break
            if isinstance(section, dict) and section.get(key) is None:
                section[key] = {}
                self.origins[place] = where
            section = section[key]
        above[place[-1]] = value
        for known in [known for known in self.origins if known[: len(place)] == place]:
            del self.origins[known]
        self.origins[place] = where


def read_recipe_file(path: Path) -> RecipeFile:
    """Raises RecipeError if the file cannot be read, is not YAML, or is not a mapping."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}:{_line(error)}: not YAML: {_reason(error)}") from error
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{path}:1: a recipe is a mapping of sections (name, model, agent, …)")
    file = RecipeFile(path=path, values={}, origins={})
    _walk(root, (), file, ())
    try:
        file.values = loader.construct_document(root)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}:{_line(error)}: not YAML: {_reason(error)}") from error
    return file


def parse_value(text: str) -> Any:
    """What an override's text says. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def dotted(place: Place) -> str:
    return ".".join(map(str, place))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but 1e-3 is a number too."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _walk(node: yaml.Node, place: Place, file: RecipeFile, above: tuple[yaml.Node, ...]) -> None:
    """Note the line of every value, and report keys that occur twice. An alias may lead to a node that is above it."""
    if any(node is other for other in above):
        return
    above = (*above, node)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            file.origins[(*place, name)] = f"{file.path}:{line}"
            if name in lines:
                what = f"given twice, first in line {lines[name]}"
                file.problems.append(file.problem((*place, name), what))
            lines.setdefault(name, line)
            _walk(value, (*place, name), file, above)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            file.origins[(*place, index)] = f"{file.path}:{value.start_mark.line + 1}"
            _walk(value, (*place, index), file, above)


def _line(error: yaml.YAMLError) -> int:
    mark = getattr(error, "problem_mark", None)
    return mark.line + 1 if mark else 1


def _reason(error: yaml.YAMLError) -> str:
    reason = getattr(error, "problem", None) or str(error)
    return str(reason).splitlines()[0]
