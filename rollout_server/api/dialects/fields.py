"""What request bodies have in common: strict fields, the sampling parameters that all dialects know, and refusals by name.

Every field is honoured, harmless, or refused by its name; none is silently ignored. Null means absent, as in OpenAI's
API, at any depth but inside what is the user's own (schemas, arguments, metadata). A field that is not served may still be
there with a value that means "off" (`Strict.off`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from rollout_server.api.errors import ApiError
from rollout_server.api.turn import SamplingOptions

LIMIT = 2**31
"""Of whole numbers: what the engine's 32-bit fields hold."""
MAX_CHOICES = 256
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 4096
"""Of all stop strings of a request together: each is looked for in every reply."""

Natural = Annotated[int, Field(ge=1, lt=LIMIT)]
TokenNumber = Annotated[int, Field(ge=0, lt=LIMIT)]
TokenIds = Annotated[list[TokenNumber], Field(fail_fast=True)]
"""Refused at the first entry that is none: a long list is tried as several things, and millions of errors take seconds."""
TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]

_TYPES = {"str", "int", "float", "bool", "dict", "list"}
"""What pydantic puts into the path of an error inside a union."""


def _bounded(stops: list[str]) -> list[str]:
    if sum(map(len, stops)) > MAX_STOP_CHARACTERS:
        raise PydanticCustomError("too_long", f"all together may have {MAX_STOP_CHARACTERS} characters")
    return stops


StopList = Annotated[list[str], Field(max_length=MAX_STOPS), AfterValidator(_bounded)]
Stops = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)] | StopList


def stop_texts(stops: str | list[str]) -> tuple[str, ...]:
    """An empty text stops nothing."""
    return tuple(text for text in ([stops] if isinstance(stops, str) else stops) if text)


class _Given(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)

    off: ClassVar[Mapping[str, Sequence[Any]]] = {}
    """Fields that are not served, each with the values that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _what_asks_for_something(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None and not (name in cls.off and value in cls.off[name])
        }


class Strict(_Given):
    """No unknown fields, no conversions."""

    model_config = ConfigDict(extra="forbid")


class Lenient(_Given):
    """Parts of a request that clients echo from replies: what they carry beyond this is of no use in a prompt."""

    model_config = ConfigDict(extra="ignore")


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's: usage in every chunk."""
    include_obfuscation: Literal[False] = False


class DistributionFields(Strict):
    """What a token is drawn from and what ends a reply, under the names on which all dialects agree."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=LIMIT)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] = {}
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: Stops = []
    stop_token_ids: Annotated[list[TokenNumber], Field(max_length=1024)] = []
    ignore_eos: bool = False

    def drawn(self, **others: Any) -> SamplingOptions:
        """`others` are what the dialects call by other names."""
        return SamplingOptions(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token_id): bias for token_id, bias in self.logit_bias.items()},
            n=self.n,
            stops=stop_texts(self.stop),
            stop_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            **others,
        )


class SampledFields(DistributionFields):
    """The sampling parameters that vLLM and SGLang know beside OpenAI's own, and what every dialect of OpenAI's has."""

    off: ClassVar[Mapping[str, Sequence[Any]]] = {
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True, False),  # there are none to put spaces between
        "include_stop_str_in_output": (False,),
        "length_penalty": (1.0,),
        "early_stopping": (False,),
        "use_beam_search": (False,),
        "bad_words": ([],),
    }

    model: Annotated[str, Field(max_length=512)]
    priority: Annotated[int, Field(ge=-8, le=8)] = 0
    """Lower goes first."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=LIMIT)] = 0
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    def sampling(self, *, max_tokens: int | None, top_logprobs: int) -> SamplingOptions:
        """Raises ApiError for more `min_tokens` than `max_tokens`."""
        if max_tokens is not None and self.min_tokens > max_tokens:
            raise invalid("min_tokens", f"min_tokens is {self.min_tokens}, and the reply may have {max_tokens} tokens")
        return self.drawn(
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            top_logprobs=top_logprobs,
            priority=self.priority,
        )


R = TypeVar("R", bound=BaseModel)


def parse(kind: type[R], body: Mapping[str, Any], *, at: str = "") -> R:
    """`at` is where `body` stands in the request. Raises ApiError 400 that names the field."""
    try:
        return kind.model_validate(body)
    except pydantic.ValidationError as error:
        raise _refusal(error, at, kind) from error


def invalid(param: str, message: str) -> ApiError:
    """`param` is the field at fault."""
    return ApiError(400, message if param in message else f"{param}: {message}", param=param, code="invalid_value")


def unsupported(param: str, kind: Any, served: str = "") -> ApiError:
    """For a part of a request, at `param`, whose `kind` is not served; `served` says what is."""
    only = f", only {served}" if served else ""
    message = f"{param}: {repr(kind)[:100]} is not supported{only}"
    return ApiError(400, message, param=param, code="unsupported_value")


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The same error for a dialect whose fields have other names: `names` are regular expressions of parts of the chat API's
    paths, and what these parts are there."""
    if error.param is None:
        return error
    param = error.param
    for pattern, name in names.items():
        param = re.sub(pattern, name, param)
    message = error.message.replace(repr(error.param), repr(param))
    return ApiError(error.status, message, param=param, code=error.code, retry_after=error.retry_after)


def _refusal(error: pydantic.ValidationError, at: str, kind: type[BaseModel]) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [part for part in first["loc"] if isinstance(part, int) or (part.isidentifier() and part not in _TYPES)]
    param = ".".join([at, *map(str, path)] if at else map(str, path))
    match first["type"]:
        case "extra_forbidden":
            known = kind.model_fields if len(first["loc"]) == 1 else ()
            near = get_close_matches(str(first["loc"][-1])[:100], known, n=1, cutoff=0.75)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            return ApiError(400, f"unsupported parameter: {param!r}{meant}", param=param, code="unsupported_parameter")
        case "missing":
            return ApiError(400, f"missing required parameter: {param!r}", param=param, code="missing_parameter")
        case _:
            message = f"invalid value for {param!r}: {first['msg']}"
            return ApiError(400, message, param=param, code="invalid_value")
