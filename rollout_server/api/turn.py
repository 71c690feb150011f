"""What a client asks for, whatever its dialect: how to sample, and the next message of a conversation.

Dialects translate their own request bodies into these records and nothing else; everything behind them (rendering,
grammars, sampling, recording) knows only these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]
"""`{"role": system | user | assistant | tool, "content": str | None, "tool_calls"?: [...], "tool_call_id"?: str, "name"?: str,
"reasoning_content"?: str}`, tool calls as in OpenAI's chat API with arguments as JSON text."""

Tool = dict[str, Any]
"""`{"type": "function", "function": {"name", "description"?, "parameters"?, "strict"?}}`, as in OpenAI's chat API."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The client's wishes. The defaults sample from the model's own distribution."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """None draws one."""
    n: int = 1
    """Choices for each prompt."""
    max_tokens: int | None = None
    """None: as many as fit."""
    min_tokens: int = 0
    """Before so many, no id ends a reply, neither the model's own nor one of `stop_ids`."""
    stops: tuple[str, ...] = ()
    """Texts that end a reply and are cut off."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end a reply, beside the model's own."""
    ignore_eos: bool = False
    top_logprobs: int = 0
    priority: int = 0
    """Lower goes first."""


@dataclass(frozen=True)
class JsonSchema:
    """The reply is JSON that fits `schema`; `{}` admits any JSON value, `{"type": "object"}` any object."""

    schema: Mapping[str, Any] | bool


@dataclass(frozen=True)
class Regex:
    pattern: str


@dataclass(frozen=True)
class OneOf:
    texts: Sequence[str]


Constraint = JsonSchema | Regex | OneOf
"""What the text of a reply must be; its tokens are masked accordingly while they are sampled."""


@dataclass(frozen=True)
class ToolChoice:
    mode: Literal["auto", "none", "required"] = "auto"
    """`required` constrains the reply to calls, `none` leaves calls in the text as text."""
    names: tuple[str, ...] = ()
    """The only tools that may be called; empty allows all. A named choice is `required` with one name."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The next message of a conversation."""

    model: str
    messages: list[Message]
    sampling: SamplingOptions
    tools: list[Tool] = field(default_factory=list)
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    """False ends a reply at its first tool call."""
    constraint: Constraint | None = None
    constraint_param: str = "response_format"
    """The field that it was read from, for errors."""
    template_options: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, as `enable_thinking`."""
    continues: bool = False
    """The last message is the assistant's and unfinished: the reply goes on with it."""

    @property
    def reads_tools(self) -> bool:
        """Whether calls in the reply are looked for."""
        return bool(self.tools) and self.tool_choice.mode != "none"
