"""What a model says to itself before it answers, told apart from the answer: `<think>…</think>` and its like.

A reply begins inside the reasoning if its prompt ends there (`ReasoningFormat.opened_by`), else reasoning begins with
the opening text, first thing in the reply but for white space, and is passed on piece by piece as it comes. It ends
at the first closing text; if there is none, the whole reply is reasoning. White space before the opening and right
behind the closing text is dropped, reasoning itself is passed on as sampled. Without an opening the whole reply is
the answer, and a closing text in it is text. The answer goes through a reader of its own, which finds its beginning
where the answer begins.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from rollout_server.api.rendering.template import FAILURES, ChatTemplate
from rollout_server.api.replies.detokenize import Detokenizer
from rollout_server.api.replies.reply import Reader, Reasoning, ReplyEvent
from rollout_server.api.replies.tool_formats.scan import overlap
from rollout_server.api.turn import Message


@dataclass(frozen=True)
class ReasoningFormat:
    open: str
    close: str

    @property
    def special(self) -> tuple[str, ...]:
        """Texts that must be in the text that a reader gets, also where a tokenizer has them as special tokens."""
        return self.open, self.close

    def opened_by(self, prompt: str) -> bool:
        """Whether a reply to this prompt begins inside the reasoning."""
        return prompt.rstrip().endswith(self.open)


REASONING_FORMATS = {
    "think": ReasoningFormat("<think>", "</think>"),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
}


def may_reason(template_options: Mapping[str, Any]) -> bool:
    """False where the client turned reasoning off, as templates that can do that are told."""
    return template_options.get("enable_thinking", True) is not False


def detect_reasoning(template: ChatTemplate | None) -> ReasoningFormat | None:
    """The form in which the template's model reasons: its prompts end inside it, or it writes `reasoning_content` in
    that form, or takes it out of earlier turns. None for a model that does not reason."""
    if template is None:
        return None
    for form in REASONING_FORMATS.values():
        if _asks(template, form) or _writes(template, form) or _forgets(template, form):
            return form
    return None


def _asks(template: ChatTemplate, form: ReasoningFormat) -> bool:
    prompt = _rendered(template, [{"role": "user", "content": "Probe?"}], generation_prompt=True)
    return form.opened_by(prompt)


def _writes(template: ChatTemplate, form: ReasoningFormat) -> bool:
    said: Message = {"role": "assistant", "content": "Answer.", "reasoning_content": "Reasoning."}
    text = _rendered(template, [{"role": "user", "content": "Probe?"}, said], generation_prompt=False)
    opened, _, rest = text.partition("Reasoning.")
    return opened.rstrip().endswith(form.open) and rest.lstrip().startswith(form.close)


def _forgets(template: ChatTemplate, form: ReasoningFormat) -> bool:
    earlier: Message = {"role": "assistant", "content": f"{form.open}Reasoning.{form.close}Answer."}
    text = _rendered(
        template,
        [{"role": "user", "content": "Probe?"}, earlier, {"role": "user", "content": "Again?"}],
        generation_prompt=False,
    )
    return "Answer." in text and "Reasoning." not in text


def _rendered(template: ChatTemplate, messages: list[Message], *, generation_prompt: bool) -> str:
    try:
        return template.render(messages, [], generation_prompt=generation_prompt)
    except FAILURES:
        return ""


class ReasoningReader:
    """`inner` reads the answer."""

    def __init__(self, inner: Reader, form: ReasoningFormat, opened: bool) -> None:
        self._inner = inner
        self._form = form
        self._state = "reasoning" if opened else "start"
        self._spaces: list[str] = []  # at the start, before what may be an opening
        self._held = ""  # may be the beginning of an opening or closing text

    def feed(self, text: str) -> list[ReplyEvent]:
        events: list[ReplyEvent] = []
        if self._state == "start":
            text = self._look_for_opening(self._held + text)
        if self._state == "reasoning":
            text = self._look_for_closing(self._held + text, events)
        if self._state == "gap":
            text = text.lstrip()
            if text:
                self._state = "answer"
        if self._state == "answer":
            events += self._inner.feed(text)
        return events

    def finish(self) -> list[ReplyEvent]:
        held, self._held = "".join([*self._spaces, self._held]), ""
        self._spaces.clear()
        events: list[ReplyEvent] = []
        if self._state == "reasoning" and held:
            events.append(Reasoning(held))
        elif self._state == "start":
            events += self._inner.feed(held)
        return events + self._inner.finish()

    def _look_for_opening(self, text: str) -> str:
        """Returns what is to be read in the state that this leads to."""
        self._held = ""
        body = text.lstrip()
        self._spaces.append(text[: len(text) - len(body)])
        if body.startswith(self._form.open):
            self._state = "reasoning"
            self._spaces.clear()
            return body[len(self._form.open) :]
        if self._form.open.startswith(body):
            self._held = body
            return ""
        self._state = "answer"
        text = "".join([*self._spaces, body])
        self._spaces.clear()
        return text

    def _look_for_closing(self, text: str, events: list[ReplyEvent]) -> str:
        self._held = ""
        thought, closing, rest = text.partition(self._form.close)
        if closing:
            self._state = "gap"
        else:
            cut = len(text) - overlap(text, (self._form.close,))
            thought, self._held = text[:cut], text[cut:]
        if thought:
            events.append(Reasoning(thought))
        return rest


class ReasoningCount:
    """How many of a reply's first tokens are reasoning, its opening and closing texts included; counts on as ids come."""

    def __init__(self, tokenizer: Tokenizer, form: ReasoningFormat, opened: bool, shown: Collection[int]) -> None:
        self._form = form
        self._decoder = Detokenizer(tokenizer, shown)
        self._text = ""
        """What may hold the opening text, or the beginning of the closing one."""
        self._inside: bool | None = True if opened else None
        """None: not known yet."""
        self._seen = 0
        self._counted = 0

    def of(self, ids: Sequence[int]) -> int:
        """`ids` are all of the reply so far."""
        while self._inside is not False and self._seen < len(ids):
            self._text += self._decoder.feed(ids[self._seen])
            self._seen += 1
            if self._inside is None:
                self._look_for_opening()
            if self._inside:
                self._counted = self._seen
                if self._form.close in self._text:
                    self._inside = False
                self._text = self._text[-len(self._form.close) :]
        return self._counted

    def _look_for_opening(self) -> None:
        begun = self._text.lstrip()
        if begun.startswith(self._form.open):
            self._inside, self._text = True, begun[len(self._form.open) :]
        elif not self._form.open.startswith(begun):
            self._inside = False
