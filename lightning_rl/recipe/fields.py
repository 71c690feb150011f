"""What fields of a recipe are made of: names that are resolved, values that are checked, sections."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from lightning_rl.algorithms.settings import OBJECTIVES
from lightning_rl.credit import RULES
from lightning_rl.errors import RecipeError
from lightning_rl.recipe.functions import did_you_mean, resolve_reference
from lightning_rl.redact import check_pattern


class FieldError(ValueError):
    """A value error of a section that is about one of its fields, at `place` in it."""

    def __init__(self, place: tuple[str | int, ...], what: str) -> None:
        super().__init__(f"{'.'.join(map(str, place))}: {what}")
        self.place, self.what = place, what


def agent_is_needed(info: ValidationInfo) -> bool:
    """Whether the agent's programs and files must be on this machine; they need not be where only its records are used."""
    return not (info.context or {}).get("recorded")


def _reference(value: str, info: ValidationInfo) -> str:
    return str(resolve_reference(value, _folder_of(info)))


def _agents_reference(value: str, info: ValidationInfo) -> str:
    try:
        return _reference(value, info)
    except ValueError:
        if agent_is_needed(info):
            raise
        return value


def _folder(value: str, info: ValidationInfo) -> str:
    path = (_folder_of(info) / Path(value).expanduser()).resolve()
    if not path.is_dir() and agent_is_needed(info):
        raise ValueError(f"there is no folder {path}")
    return str(path)


def _adapter(value: str, info: ValidationInfo) -> str:
    path = Path(_folder(value, info))
    if not (path / "adapter_config.json").is_file() and agent_is_needed(info):
        raise ValueError(f"{path} holds no LoRA adapter: there is no adapter_config.json in it")
    return str(path)


def _pattern(value: str) -> str:
    try:
        check_pattern(value)
    except RecipeError as error:
        raise ValueError(f"{error}{f'; {error.hint}' if error.hint else ''}") from error
    return value


def _database(value: str) -> str:
    if not value.startswith(("postgresql://", "postgres://", "${")):
        raise ValueError("it must be the URL of a PostgreSQL database, postgresql://USER@HOST/DATABASE")
    user, at, _ = value.partition("://")[2].rpartition("@")
    password = user.partition(":")[2]
    if (at and password and not re.fullmatch(r"\$\{\w+\}", password)) or "password=" in value:
        raise ValueError("a password must not stand in a recipe: put ${NAME} there, for an environment variable")
    return value


def _glob(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty: * fits everybody")
    at = value.find("[")
    while at >= 0:
        first = at + 2 if value.startswith("!", at + 1) else at + 1
        end = value.find("]", first + 1)
        if end < 0:
            raise ValueError(f"{value!r} has a [ without its ]: write [[] for the character itself")
        at = value.find("[", end + 1)
    return value


def _http_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        secret = "@" in parts.netloc
    except ValueError:
        usable = secret = False
    if not usable or any(character.isspace() for character in value):
        raise ValueError("it must be a URL with a host, as https://example.com/v1")
    if secret:
        raise ValueError(
            "a user or password must not stand in a recipe: name an environment variable that holds the key"
        )
    return value


def _variable(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", value, re.ASCII):
        raise ValueError("it must be the name of an environment variable, not what is in it")
    return value


def _folder_of(info: ValidationInfo) -> Path:
    """The folder of the recipe that is being checked."""
    return info.context["folder"] if info.context else Path()


def _credit(value: str, info: ValidationInfo) -> str:
    if ":" in value:
        return _reference(value, info)
    return _one_of(value, "rule", [*RULES])


def _objective(value: str) -> str:
    return _one_of(value, "objective", [*OBJECTIVES])


def _one_of(value: str, kind: str, valid: list[str]) -> str:
    if value not in valid:
        raise ValueError(f"there is no {kind} {value!r}; choose from {', '.join(valid)}{did_you_mean(value, valid)}")
    return value


FunctionName = Annotated[str, AfterValidator(_reference)]
"""`file.py:function` or `package.module:function`, relative to the recipe."""
AgentFunctionName = Annotated[str, AfterValidator(_agents_reference)]
"""The same, of what only new episodes need."""
Folder = Annotated[str, AfterValidator(_folder), Field(validate_default=True)]
AdapterFolder = Annotated[str, AfterValidator(_adapter)]
Glob = Annotated[str, AfterValidator(_glob)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
VariableName = Annotated[str, AfterValidator(_variable)]
Pattern = Annotated[str, AfterValidator(_pattern)]
DatabaseUrl = Annotated[str, AfterValidator(_database)]
CreditName = Annotated[str, AfterValidator(_credit)]
"""A rule's name, or `file.py:function` or `package.module:function` relative to the recipe."""
ObjectiveName = Annotated[str, AfterValidator(_objective)]
Count = Annotated[int, Field(ge=1)]
POLICY = "policy"
"""What a route calls the policy; nothing else may have this name."""
RETURNED = "return"
"""Name of the reward that an agent gives by returning a number."""
Policy = Literal["score", "retry", "drop"]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
