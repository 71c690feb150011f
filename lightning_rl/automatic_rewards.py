"""Intermediate rewards read from an episode's calls and tool spans, by the rules of a recipe (`reward.automatic`).

Each stands at the call that it is about: the one that asked for the tool, or that went beyond a limit; at the tool's span where
nobody knows which call asked for it. Only what the policy did counts: calls that another adapter or a provider answered earn
nothing. A pure function: the same records give the same rewards, in whatever order they are (but see `PATTERN_SECONDS`). The
names are reserved.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from msgspec import Struct

from lightning_rl.episode import Call, Episode, Reward
from lightning_rl.errors import MissingExtra, RewardError
from lightning_rl.tool_uses import ToolUse, same_call, tool_uses


class Excess(Struct, frozen=True, kw_only=True):
    """`value` for each one beyond `limit`."""

    limit: int
    value: float


class AutomaticRules(Struct, frozen=True, kw_only=True):
    """The value of each reward, by its name; None gives none. What they mean stands in `recipe.AutomaticRewards`."""

    tool_error: float | None = None
    tool_success: float | None = None
    valid_arguments: float | None = None
    invalid_arguments: float | None = None
    repeated_call: float | None = None
    turns: Excess | None = None
    tokens: Excess | None = None

    @property
    def given(self) -> list[str]:
        """The names of the rewards that these rules give."""
        return [name for name in NAMES if getattr(self, name) is not None]


NAMES = AutomaticRules.__struct_fields__
SOURCE = "automatic"
"""`Reward.source` of these rewards."""
PATTERN_SECONDS = 1.0
"""How long the regular expressions of a schema may take with the arguments of one tool call."""


def automatic_rewards(episode: Episode, rules: AutomaticRules, *, adapters: Collection[str] = ()) -> list[Reward]:
    """The rewards that the rules give for the episode. `adapters` are the names of those that are not the policy.

    Raises:
        RewardError: if a tool's schema, as a request gave it, is no JSON Schema, and arguments are to be checked by it.
        MissingExtra: if they are, and jsonschema is not installed.
    """
    if not rules.given:
        return []
    calls = sorted(episode.calls, key=lambda call: (call.index, call.id))
    others = {call.id for call in calls if call.upstream or call.model in adapters}
    own = [call for call in calls if call.id not in others]
    uses = [use for use in tool_uses(episode) if use.call_id not in others]
    return [
        *_tool_rewards(episode, uses, rules),
        *_argument_rewards(own, uses, rules),
        *_repeated(episode, uses, rules),
        *_turns(own, rules),
        *_tokens(own, rules),
    ]


def _at_use(episode: Episode, use: ToolUse, name: str, value: float) -> Reward:
    span_id = use.span_id if use.call_id is None else None
    return Reward(
        episode_id=episode.id,
        name=name,
        value=value,
        time=use.ended_at,
        call_id=use.call_id,
        span_id=span_id,
        source=SOURCE,
    )


def _at_call(call: Call, name: str, value: float) -> Reward:
    return Reward(
        episode_id=call.episode_id, name=name, value=value, time=call.ended_at, call_id=call.id, source=SOURCE
    )


def _tool_rewards(episode: Episode, uses: Iterable[ToolUse], rules: AutomaticRules) -> Iterator[Reward]:
    """A tool that never ran neither failed nor succeeded."""
    for use in uses:
        name, value = ("tool_error", rules.tool_error) if use.failed else ("tool_success", rules.tool_success)
        if use.ran and value is not None:
            yield _at_use(episode, use, name, value)


def _argument_rewards(own: Iterable[Call], uses: Iterable[ToolUse], rules: AutomaticRules) -> Iterator[Reward]:
    """Only for tool calls whose request is known: it has the schema."""
    if rules.valid_arguments is None and rules.invalid_arguments is None:
        return
    calls = {call.id: call for call in own}
    for use in uses:
        call = calls.get(use.call_id or "")
        if call is None:
            continue
        fit = _arguments_fit(call, use)
        if fit is None:
            continue
        name, value = (
            ("valid_arguments", rules.valid_arguments) if fit else ("invalid_arguments", rules.invalid_arguments)
        )
        if value is not None:
            yield _at_call(call, name, value)


def _arguments_fit(call: Call, use: ToolUse) -> bool | None:
    """None if that is not found out in time."""
    schemas = offered_tools(call.request)
    if use.name not in schemas or not isinstance(use.arguments, dict):
        return False
    return _valid(use.arguments, schemas[use.name], use.name)


def offered_tools(request: dict[str, Any]) -> dict[str, Any]:
    """The schema of each tool's arguments by its name, from a request in any dialect: chat (with `tools`, or `functions` as it was
    before), responses or messages. Tools that have no name are the provider's own."""
    schemas = {}
    for field in ("functions", "tools"):
        offered = request.get(field)
        for tool in offered if isinstance(offered, list) else []:
            inner = tool.get("function") if isinstance(tool, dict) else None
            function = inner if isinstance(inner, dict) else tool
            if isinstance(function, dict) and isinstance(function.get("name"), str):
                schemas[function["name"]] = function.get("parameters") or function.get("input_schema") or {}
    return schemas


def _valid(arguments: dict[str, Any], schema: Any, tool: str) -> bool | None:
    try:
        from jsonschema import Draft202012Validator, validators
        from referencing import Registry
    except ImportError as error:
        raise MissingExtra(
            "reward.automatic: checking arguments needs jsonschema", hint="pip install 'lightning-rl[train]'"
        ) from error
    try:
        if not isinstance(schema, dict) or not isinstance(schema.get("$schema", ""), str):
            raise ValueError("it must be an object, and its $schema text")
        validator = validators.validator_for(schema, default=Draft202012Validator)
        validator.check_schema(schema)
        if "unevaluatedProperties" in (written := str(schema)) and "patternProperties" in written:
            raise ValueError("unevaluatedProperties beside patternProperties is not supported")
        # A registry of its own: references are never looked up elsewhere.
        bounded = _bounded(validator)(
            {name: part for name, part in schema.items() if name != "$schema"}, registry=Registry()
        )
        _until.at = time.monotonic() + PATTERN_SECONDS
        return bool(bounded.is_valid(arguments))
    except RecursionError:
        return False
    except TimeoutError:
        return None
    except Exception as error:  # whatever a schema that nobody has checked makes jsonschema raise
        what = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        raise RewardError(
            f"reward.automatic: the arguments of the tool {tool!r} cannot be checked, its schema is wrong: {what}",
            hint="mend the schema that the agent sends with its requests, or set valid_arguments and invalid_arguments to null",
        ) from error


class _Until(threading.local):
    at = 0.0
    """When the check in this thread must be done; `time.monotonic()`."""


_until = _Until()


def _search(pattern: str, text: str) -> bool:
    """Raises TimeoutError: models write texts on which a backtracking pattern goes on for years."""
    import regex

    return regex.search(pattern, text, timeout=max(_until.at - time.monotonic(), 1e-3)) is not None


@functools.cache
def _bounded(validator: Any) -> Any:
    """The validator, with every regular expression in bounded time."""
    from jsonschema import validators
    from jsonschema.exceptions import ValidationError

    def pattern(checked: Any, expression: str, instance: Any, schema: Any) -> Iterator[Any]:
        if checked.is_type(instance, "string") and not _search(expression, instance):
            yield ValidationError(f"{instance!r} does not match {expression!r}")

    def pattern_properties(checked: Any, patterns: dict[str, Any], instance: Any, schema: Any) -> Iterator[Any]:
        for expression, inner in patterns.items() if checked.is_type(instance, "object") else ():
            for name, value in instance.items():
                if _search(expression, name):
                    yield from checked.descend(value, inner, path=name, schema_path=expression)

    def additional_properties(checked: Any, inner: Any, instance: Any, schema: Any) -> Iterator[Any]:
        for name, value in instance.items() if checked.is_type(instance, "object") else ():
            known = name in schema.get("properties", {})
            if not known and not any(_search(expression, name) for expression in schema.get("patternProperties", {})):
                yield from checked.descend(value, inner, path=name)

    ours = {
        "pattern": pattern,
        "patternProperties": pattern_properties,
        "additionalProperties": additional_properties,
    }
    return validators.extend(validator, {name: check for name, check in ours.items() if name in validator.VALIDATORS})


def _repeated(episode: Episode, uses: Iterable[ToolUse], rules: AutomaticRules) -> Iterator[Reward]:
    if rules.repeated_call is None:
        return
    seen: set[str] = set()
    for use in uses:
        key = same_call(use.name, use.arguments)
        if key in seen:
            yield _at_use(episode, use, "repeated_call", rules.repeated_call)
        seen.add(key)


def _turns(own: list[Call], rules: AutomaticRules) -> Iterator[Reward]:
    """Choices of one request are one turn; its first call has the reward."""
    if rules.turns is None:
        return
    turns: dict[str, Call] = {}
    for call in own:
        turns.setdefault(call.response_id or call.id, call)
    for call in list(turns.values())[rules.turns.limit :]:
        yield _at_call(call, "turns", rules.turns.value)


def _tokens(own: list[Call], rules: AutomaticRules) -> Iterator[Reward]:
    if rules.tokens is None:
        return
    left = rules.tokens.limit
    for call in own:
        surplus = len(call.sampled_ids) - max(left, 0)
        if surplus > 0:
            yield _at_call(call, "tokens", rules.tokens.value * surplus)
        left -= len(call.sampled_ids)


def require_free_names(rewards: Iterable[Reward]) -> None:
    """Raises RewardError if one that is not automatic is named like those that are."""
    taken = sorted({reward.name for reward in rewards if reward.source != SOURCE} & set(NAMES))
    if taken:
        raise RewardError(
            f"the agent or the reward function gave a reward named {', '.join(taken)}, a name that is reserved for automatic "
            "rewards (reward.automatic in the recipe)",
            hint="give it another name",
        )
