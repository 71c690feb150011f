"""From messages to token ids, and from where a conversation was left to where it goes on.

`Renderer.prompt` renders a conversation whole. `Renderer.continuation` gives only the ids that the template puts after
an assistant message that the engine sampled: the end of the turn if it was not sampled, separators, what was said
since, and the opening of the next reply. Sampled tokens are never decoded and encoded again. Some templates rewrite
what was said earlier; for those `append_only` is False and conversations are rendered whole at each turn.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer

from lightning_rl.errors import ModelError
from rollout_server.api.template import load_template
from rollout_server.api.tool_prompt import Message

log = logging.getLogger("lrl.web")

_REPLY = "What a reply says is of no account here."
_PROBE_TOOL = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}


class RenderError(Exception):
    """The template refuses the conversation; the message says why."""


class Renderer:
    def __init__(self, model_dir: Path) -> None:
        try:
            self.tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise ModelError(f"{model_dir / 'tokenizer.json'} cannot be read: {error}") from error
        self._template = load_template(model_dir)
        self._added = set(self.tokenizer.get_added_tokens_decoder())
        self.turn_end_id = self._find_turn_end() if self._template else None
        eos = _eos_ids(model_dir)
        self.stop_ids = tuple(sorted(eos | ({self.turn_end_id} if self.turn_end_id is not None else set())))
        self.append_only = self._template is not None and self._probe()
        if self._template is not None and not self.append_only:
            log.warning("the chat template rewrites earlier turns: follow-up prompts are rendered whole, not extended")

    def text(self, messages: list[Message], tools: list[dict[str, Any]], *, generation_prompt: bool = True) -> str:
        if self._template is None:
            raise RenderError("the model has no chat template; use /v1/completions")
        try:
            return self._template.render(messages, tools, generation_prompt=generation_prompt)
        except (jinja2.TemplateError, TypeError, KeyError) as error:  # templates fail in both ways on odd messages
            raise RenderError(f"the chat template refuses these messages: {error}") from error

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=not special)

    def prompt(self, messages: list[Message], tools: list[dict[str, Any]]) -> list[int]:
        return self.encode(self.text(messages, tools))

    def continuation(
        self, messages: list[Message], tools: list[dict[str, Any]], at: int, last_id: int
    ) -> list[int] | None:
        """Ids that follow the sampled reply `messages[at]`, whose last sampled id was `last_id`.

        None when the template does not leave what was said before the reply as it was.
        """
        head = self.text(messages[:at], tools) + _REPLY
        try:
            whole = self.text([*messages[:at], _reply(_REPLY), *messages[at + 1 :]], tools)
        except RenderError:  # a template that wants to see the tool calls which the stand-in lacks
            return None
        if not whole.startswith(head):
            return None
        ids = self.encode(whole[len(head) :])
        return ids[1:] if ids and ids[0] == last_id and last_id in self._added else ids

    def spoken(self, messages: list[Message], tools: list[dict[str, Any]], at: int) -> list[int]:
        """Ids that the model would have sampled had it said `messages[at]`, the end of its turn included."""
        head = self.text(messages[:at], tools)
        whole = self.text(messages[: at + 1], tools, generation_prompt=False)
        closing = self._closing(messages[:at], tools)
        if not whole.startswith(head) or not whole.endswith(closing):
            raise ModelError("the chat template renders a reply otherwise than it opens one: no demonstration possible")
        said = self.encode(whole[len(head) : len(whole) - len(closing)])
        return said if self.turn_end_id is None else [*said, self.turn_end_id]

    def _closing(self, before: list[Message], tools: list[dict[str, Any]]) -> str:
        whole = self.text([*before, _reply(_REPLY)], tools, generation_prompt=False)
        _, found, closing = whole.rpartition(_REPLY)
        if not found:
            raise RenderError("the chat template leaves out what the assistant said")
        return closing

    def _find_turn_end(self) -> int | None:
        try:
            ids = self.encode(self._closing([{"role": "user", "content": "Hi"}], []))
        except RenderError:  # an odd template; conversations that it can render will do without
            return None
        return ids[0] if ids and ids[0] in self._added else None

    def _probe(self) -> bool:
        question: Message = {"role": "user", "content": "Hi"}
        call = {"id": "probe12345", "type": "function", "function": {"name": "probe", "arguments": "{}"}}
        result = {"role": "tool", "tool_call_id": "probe12345", "name": "probe", "content": "1"}
        with_tool = [question, {**_reply(""), "tool_calls": [call]}, result]
        plain = [question, _reply("Hello"), question]
        try:
            probes = [self.continuation(plain, [], 1, -1), self.continuation(with_tool, [_PROBE_TOOL], 1, -1)]
        except RenderError:
            return False
        return None not in probes


def render_demonstration(
    renderer: Renderer, messages: list[Message], tools: list[dict[str, Any]]
) -> tuple[list[int], list[int]]:
    """A conversation as the server would see it turn by turn: ids, and a mask that is 1 on what the assistant says.

    The end-of-turn token belongs to what it says. The conversation must end with the assistant's last reply.
    """
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not replies or replies[-1] != len(messages) - 1:
        raise ValueError("a demonstration must end with a message of the assistant")
    ids: list[int] = []
    mask: list[int] = []
    for previous, at in zip([None, *replies], replies, strict=False):
        if previous is None:
            heard: list[int] | None = renderer.prompt(messages[:at], tools)
        else:
            heard = renderer.continuation(messages[:at], tools, previous, ids[-1])
        if heard is None:
            raise ModelError(
                "the chat template rewrites earlier turns, so that several replies do not fit one sequence",
                hint="split the demonstration into one per reply",
            )
        said = renderer.spoken(messages, tools, at)
        ids += heard + said
        mask += [0] * len(heard) + [1] * len(said)
    return ids, mask


def _reply(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _eos_ids(model_dir: Path) -> set[int]:
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        file = model_dir / name
        value = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return found
