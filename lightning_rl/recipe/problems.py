"""What pydantic finds wrong with a recipe, said in the recipe's own terms: place, field, and the nearest valid name."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lightning_rl.recipe.fields import FieldError
from lightning_rl.recipe.file import Place, Problem, RecipeFile
from lightning_rl.recipe.functions import did_you_mean


def describe(error: ValidationError, file: RecipeFile, schema: type[BaseModel]) -> list[Problem]:
    """One problem an error, in the order of the schema."""
    return [file.problem((*details["loc"], *_inside(details)), _what(details, schema)) for details in error.errors()]


def _inside(details: ErrorDetails) -> Place:
    """Where in the section the error is, if it says so."""
    error = details.get("ctx", {}).get("error")
    return error.place if isinstance(error, FieldError) else ()


def annotation_at(schema: type[BaseModel], place: Place) -> Any:
    """The annotation of the field at that place, without `Annotated` and `| None`; None where there is no field."""
    annotation: Any = schema
    for key in place:
        if (each := item(annotation)) is not None:
            annotation = each
            continue
        field = annotation.model_fields.get(key) if _is_section(annotation) else None
        if field is None:
            return None
        annotation = plain(field.annotation)
    return annotation


def plain(annotation: Any) -> Any:
    if get_origin(annotation) is Annotated:
        return plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        some = [argument for argument in get_args(annotation) if argument is not type(None)]
        return plain(some[0]) if len(some) == 1 else annotation
    return annotation


def item(annotation: Any) -> Any:
    """What a list, or a mapping by names of the user's, has as entries; None for anything else."""
    return plain(get_args(annotation)[-1]) if get_origin(annotation) in (list, dict) else None


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _what(details: ErrorDetails, schema: type[BaseModel]) -> str:
    kind, place, value = details["type"], details["loc"], details["input"]
    if kind == "extra_forbidden":
        section = annotation_at(schema, place[:-1])
        return f"unknown field{did_you_mean(str(place[-1]), [*section.model_fields])}"
    if kind == "missing":
        return "is missing and has no default"
    if kind == "literal_error":
        valid = [str(name) for name in get_args(annotation_at(schema, place))]
        return f"must be one of {', '.join(valid)}, not {value!r}{did_you_mean(str(value), valid)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"must be a section with fields of its own, not {value!r}"
    if kind == "value_error":
        error = details["ctx"]["error"]
        return error.what if isinstance(error, FieldError) else str(error)
    return f"{_lower(details['msg'].removeprefix('Input '))}, not {value!r}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
