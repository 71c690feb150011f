"""A model's chat template, rendered in a sandbox with the helpers that Hugging Face templates expect. No torch, no
transformers.

Promises the text that `transformers.apply_chat_template` gives for the same messages, tools and options. Where templates
disagree about how a conversation is written down (arguments as a value or as JSON text, no content as "" or as None, ids
of calls), the template is tried out once, when it is loaded, and gets what it takes. Templates that ignore tools get
them through `tool_prompt.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightning_rl.errors import ModelError
from rollout_server.api.rendering.tool_prompt import Message, parsed_arguments, with_tools

FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""How a template fails on messages that it was not made for: it is a program that runs on what clients send."""

RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})
"""Variables that are no options: the request has fields of its own for them."""

_QUESTION: Message = {"role": "user", "content": "Hi"}
_ID_LENGTH = 9


@dataclass(frozen=True)
class Manners:
    """How a template wants to see what can be written down in several ways."""

    arguments_as_text: bool = False
    no_content: str | None = ""
    """What stands for the content of a message that is nothing but tool calls."""
    short_ids: bool = False
    """Ids of tool calls must be 9 letters and digits, as Mistral's."""
    system: bool = True
    tool_role: bool = True
    """Messages of the roles `system` and `tool` are shown. Looked at only for templates that ignore tools."""


class ChatTemplate:
    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = _environment()
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
            self.takes_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template does not parse: line {error.lineno}: {error.message}") from error
        self.manners = self._of_calls() if self.takes_tools else self._of_roles()

    def render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]],
        *,
        generation_prompt: bool,
        options: Mapping[str, Any] = {},
    ) -> str:
        """`options` are further variables of the template. Raises one of FAILURES when it refuses the conversation."""
        misplaced = RESERVED.intersection(options)
        if misplaced:
            raise ValueError(f"{min(misplaced)!r} cannot be set as an option of the chat template")
        return self._render(messages, tools, self.manners, generation_prompt, options)

    def _render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]],
        manners: Manners,
        generation_prompt: bool,
        options: Mapping[str, Any] = {},
    ) -> str:
        if self.takes_tools:
            messages = [_as_it_wants(message, manners) for message in messages]
        else:
            messages = with_tools(messages, tools, system=manners.system, tool_role=manners.tool_role)
        variables = {"documents": None, **self._special_tokens, **options}
        return self._template.render(
            {**variables, "messages": messages, "tools": tools or None, "add_generation_prompt": generation_prompt}
        )

    def _of_calls(self) -> Manners:
        """The first manners, plain ones first, in which a call and its result can be seen."""
        call = {
            "id": "call_0123456789ab",
            "type": "function",
            "function": {"name": "aName", "arguments": '{"k": "aV"}'},
        }
        result = {"role": "tool", "tool_call_id": call["id"], "name": "aName", "content": "aResult"}
        asked: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        tool = {"type": "function", "function": {"name": "aName", "description": "", "parameters": {"type": "object"}}}
        for short_ids, no_content, as_text in product((False, True), ("", None), (False, True)):
            manners = Manners(arguments_as_text=as_text, no_content=no_content, short_ids=short_ids)
            if self._shows([_QUESTION, asked, result], [tool], manners, ("aName", "aV", "aResult")):
                return manners
        return Manners()

    def _of_roles(self) -> Manners:
        told: list[Message] = [{"role": "system", "content": "aSystem"}, _QUESTION]
        answered: list[Message] = [_QUESTION, {"role": "assistant", "content": "Hello"}]
        answered.append({"role": "tool", "content": "aResult"})
        return Manners(
            system=self._shows(told, [], Manners(), ("aSystem",)),
            tool_role=self._shows(answered, [], Manners(), ("aResult",)),
        )

    def _shows(
        self, messages: list[Message], tools: list[dict[str, Any]], manners: Manners, words: tuple[str, ...]
    ) -> bool:
        """Whether all of the words are there, and `None` is not, which is never meant."""
        try:
            text = self._render(messages, tools, manners, True)
            bare = self._render([_QUESTION], tools, manners, True)
        except FAILURES:
            return False
        return all(text.count(word) > bare.count(word) for word in words) and text.count("None") == bare.count("None")


def load_template(model_dir: Path) -> ChatTemplate | None:
    """The template beside the model, or None for a model that has none."""
    config_file = model_dir / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    source = _source(model_dir, config)
    if source is None:
        return None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    found = {name: _token_text(config.get(name)) for name in names}
    return ChatTemplate(source, {name: text for name, text in found.items() if text is not None})


def _source(model_dir: Path, config: dict[str, Any]) -> str | None:
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    inline = config.get("chat_template")
    if isinstance(inline, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in inline}
        return named.get("tool_use") or named.get("default")
    return inline


def _token_text(entry: str | dict[str, Any] | None) -> str | None:
    return entry["content"] if isinstance(entry, dict) else entry


def _as_it_wants(message: Message, manners: Manners) -> Message:
    shaped = {key: value for key, value in message.items() if key != "tool_calls"}
    shaped["content"] = message.get("content") or ""
    if manners.short_ids and "tool_call_id" in message:
        shaped["tool_call_id"] = _short_id(message["tool_call_id"])
    if message.get("tool_calls"):
        shaped["content"] = shaped["content"] or manners.no_content
        shaped["tool_calls"] = [_call_as_it_wants(call, manners) for call in message["tool_calls"]]
    return shaped


def _call_as_it_wants(call: dict[str, Any], manners: Manners) -> dict[str, Any]:
    given = call["function"]["arguments"]
    if not manners.arguments_as_text:
        arguments = parsed_arguments(call)
    else:
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    shaped = {**call, "function": {**call["function"], "arguments": arguments}}
    if manners.short_ids:
        shaped["id"] = _short_id(call.get("id", ""))
    return shaped


def _short_id(call_id: str) -> str:
    if len(call_id) == _ID_LENGTH and call_id.isascii() and call_id.isalnum():
        return call_id
    return blake2b(call_id.encode("utf-8", "surrogatepass"), digest_size=_ID_LENGTH).hexdigest()[:_ID_LENGTH]


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says; for rendering it means nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Callable[[], str]) -> str:
        return caller()


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **rest: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **rest)
