"""A model's chat template, rendered in a sandbox with the helpers that Hugging Face templates expect. No torch, no
transformers.

Promises the text that `transformers.apply_chat_template` gives for the same messages and tools. Templates that ignore
tools get them through `tool_prompt.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightning_rl.errors import ModelError
from rollout_server.api.tool_prompt import Message, parsed_arguments, with_tools


class ChatTemplate:
    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = _environment()
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
            self.takes_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template does not parse: line {error.lineno}: {error.message}") from error

    def render(self, messages: list[Message], tools: list[dict[str, Any]], *, generation_prompt: bool) -> str:
        """Raises jinja2.TemplateError when the template refuses the conversation."""
        if self.takes_tools:
            messages = [_with_parsed_arguments(message) for message in messages]
        else:
            messages = with_tools(messages, tools)
        return self._template.render(
            messages=messages,
            tools=tools or None,
            documents=None,
            add_generation_prompt=generation_prompt,
            **self._special_tokens,
        )


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


def _with_parsed_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [{**c, "function": {**c["function"], "arguments": parsed_arguments(c)}} for c in message["tool_calls"]]
    return {**message, "tool_calls": calls}


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

    tags = {"generation"}  # noqa: RUF012

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
