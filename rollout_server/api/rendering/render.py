"""From messages to token ids, and from where a conversation was left to where it goes on.

`Renderer.prompt` renders a conversation whole. `Renderer.around` gives only the texts that the template puts around
replies that the engine sampled: stand-ins are rendered in their place, and what lies between is cut out and tokenised.
Sampled tokens are never decoded and encoded again, and what a template makes of a reply once something follows it
(reasoning dropped, white space trimmed, a mark put before it) does not matter. `template_probes.py` finds out at the start
whether stand-ins can be trusted.

Text that reads like a special token becomes one wherever it comes from, as with transformers, vLLM and SGLang: a user or a
tool's result that says `<|im_end|>` ends a turn. Who renders what strangers write should take such texts out before.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lightning_rl.errors import ModelError
from rollout_server.api.rendering.stand_ins import StandIns, said, without_calls
from rollout_server.api.rendering.template import FAILURES, load_template
from rollout_server.api.rendering.template_probes import probe
from rollout_server.api.rendering.tool_prompt import Message

log = logging.getLogger("lrl.web")

_HI: Message = {"role": "user", "content": "Hi"}
_REPLY = "What a reply says is of no account here."


class RenderError(Exception):
    """The template refuses the conversation; the message says why."""


class Renderer:
    def __init__(self, model_dir: Path) -> None:
        try:
            self.tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise ModelError(f"{model_dir / 'tokenizer.json'} cannot be read: {error}") from error
        self.template = load_template(model_dir)
        self._added = {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items()}
        self.turn_end_id = self._find_turn_end() if self.template else None
        eos = _eos_ids(model_dir)
        self.stop_ids = tuple(sorted(eos | ({self.turn_end_id} if self.turn_end_id is not None else set())))
        turn_end = None if self.turn_end_id is None else self._added[self.turn_end_id]
        self._stand_ins = StandIns(f"Reply{secrets.token_hex(8)}N", turn_end)
        findings = probe(self._text_or_none, self._stand_ins) if self.template else None
        self._for_calls = findings.for_calls if findings else ()
        self.append_only = findings is not None and findings.append_only
        if findings is not None and not findings.append_only:
            log.warning("%s", findings.in_words())

    def text(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]],
        *,
        generation_prompt: bool = True,
        options: Mapping[str, Any] = {},
        continues: bool = False,
    ) -> str:
        """`continues`: the last message is unfinished, the text ends where it ends. Raises RenderError."""
        if self.template is None:
            raise RenderError("the model has no chat template; use /v1/completions")
        if continues:
            messages = [*messages[:-1], self._unfinished(messages[-1])]
        try:
            text = self.template.render(
                messages, tools, generation_prompt=generation_prompt and not continues, options=options
            )
        except FAILURES as error:
            raise RenderError(f"the chat template refuses these messages: {error}") from error
        if not continues:
            return text
        before, found, _ = text.rpartition(self._stand_ins.mark)
        if not found:
            raise RenderError("the chat template leaves out what the last message says: it cannot be continued")
        return before

    def encode(self, text: str) -> list[int]:
        """Raises RenderError for text that is no Unicode (half of a surrogate pair)."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise RenderError("the text is not valid Unicode: it holds half of a surrogate pair") from error

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)

    def ends_with(self, ids: Sequence[int], text: str) -> bool:
        """Whether a prompt ends with this text, white space at the end of both aside (`<think>`, for instance)."""
        tail = ids[-len(text.encode()) - 8 :]
        return self.decode(tail, special=True).rstrip().endswith(text.rstrip())

    def prompt(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]],
        options: Mapping[str, Any] = {},
        continues: bool = False,
    ) -> list[int]:
        """The whole conversation as ids. Raises RenderError."""
        return self.encode(self.text(messages, tools, options=options, continues=continues))

    def around(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]],
        replies: Sequence[int],
        options: Mapping[str, Any] = {},
        continues: bool = False,
        *,
        head: bool = True,
    ) -> list[str] | None:
        """The texts before, between and after the assistant's messages at these places, in ascending order.

        Without `head` the text before the first is not asked for: it is "", and how messages before it are shown is of
        no account. A template that moves something (tools to the last question, for instance) shows it where it is now;
        an extended prompt has it in its old place too. A reply is opened as it was when it was sampled. None when the
        replies' places in the text cannot be told.
        """
        calls = [bool(messages[at].get("tool_calls")) for at in replies]
        histories = [messages] if head else [messages, without_calls(messages, replies[0])]
        for history, with_calls in product(histories, self._for_calls if any(calls) else (False,)):
            shown = self._stand_ins.place(history, replies, with_calls=with_calls, head=head)
            try:
                text = self.text(shown, tools, options=options, continues=continues)
            except RenderError:  # a template that wants to see the calls, or that refuses several in one reply
                continue
            pieces = self._stand_ins.cut(text, [with_calls and calling for calling in calls], head=head)
            if pieces is not None:
                return [*self._opened(pieces[:-1], options), pieces[-1]]
        return None

    def encode_after(self, text: str, last_id: int) -> list[int]:
        """Ids of the text that follows a reply: an end of the turn that was sampled does not come twice."""
        end = self._added.get(last_id)
        stripped = text.lstrip()
        if end is not None and stripped.startswith(end):
            return self.encode(stripped)[1:]
        return self.encode(text)

    def continuation(
        self, messages: list[Message], tools: list[dict[str, Any]], at: int, last_id: int
    ) -> list[int] | None:
        """Ids that follow the sampled reply `messages[at]`, whose last sampled id was `last_id`; None as in `around`."""
        pieces = self.around(messages, tools, [at], head=False)
        return None if pieces is None else self.encode_after(pieces[1], last_id)

    def spoken(self, messages: list[Message], tools: list[dict[str, Any]], at: int) -> list[int]:
        """Ids that the model would have sampled had it said `messages[at]`, the end of its turn included."""
        head = self.text(messages[:at], tools)
        whole = self.text(messages[: at + 1], tools, generation_prompt=False)
        closing = self._closing(messages[:at], tools)
        if not whole.startswith(head) or not whole.endswith(closing):
            raise ModelError("the chat template renders a reply otherwise than it opens one: no demonstration possible")
        ids = self.encode(whole[len(head) : len(whole) - len(closing)])
        return ids if self.turn_end_id is None else [*ids, self.turn_end_id]

    def _opened(self, before: list[str], options: Mapping[str, Any]) -> list[str]:
        """Texts before replies, each ending as when the reply was asked for.

        Templates open a reply in one way and show it later in another: with reasoning cut off, or behind a space.
        """
        if not any(before):
            return before
        try:
            asked = self.text([_HI], [], generation_prompt=False, options=options)
            opened = self.text([_HI], [], options=options)
            shown, found, _ = self.text([_HI, said(_REPLY), _HI], [], options=options).partition(_REPLY)
        except RenderError:  # a template that takes only longer conversations
            return before
        if not found or not opened.startswith(asked) or not shown.startswith(asked):
            return before
        showing, opening = shown.removeprefix(asked), opened.removeprefix(asked)
        return [text.removesuffix(showing) + opening if text and text.endswith(showing) else text for text in before]

    def _text_or_none(self, messages: list[Message], tools: list[dict[str, Any]]) -> str | None:
        try:
            return self.text(messages, tools)
        except RenderError:
            return None

    def _unfinished(self, message: Message) -> Message:
        if message["role"] != "assistant":
            raise RenderError("only a message of the assistant can be continued, and the last one is none")
        if message.get("tool_calls"):
            raise RenderError("a message that calls tools cannot be continued")
        return {**message, "content": (message.get("content") or "") + self._stand_ins.mark}

    def _closing(self, before: list[Message], tools: list[dict[str, Any]]) -> str:
        whole = self.text([*before, said(_REPLY)], tools, generation_prompt=False)
        _, found, closing = whole.rpartition(_REPLY)
        if not found:
            raise RenderError("the chat template leaves out what the assistant said")
        return closing

    def _find_turn_end(self) -> int | None:
        try:
            ids = self.encode(self._closing([_HI], []).lstrip())
        except RenderError:  # an odd template; conversations that it can render will do without
            return None
        return ids[0] if ids and ids[0] in self._added else None


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
        spoken = renderer.spoken(messages, tools, at)
        ids += heard + spoken
        mask += [0] * len(heard) + [1] * len(spoken)
    return ids, mask


def _eos_ids(model_dir: Path) -> set[int]:
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        file = model_dir / name
        value = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return found
