"""What AutoGen's OpenTelemetry spans mean where the conventions do not say it.

An agent in a team is invoked in the handling of a message, in a span that is only about the message. A team in a team has no
span but that one, nor has a manager that asks a model who speaks next: such a span counts if anything happens directly in it,
and an agent's own takes its place. Handoffs are tools by name. The construction of an agent is no run of it. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_rl.errors import LightningError
from lightning_rl.otlp.names import AGENT_NAME, OPERATION, SYSTEM, TOOL_NAME

AGENT_ID = "gen_ai.agent.id"
MESSAGING = "messaging.operation"
DESTINATION = "messaging.destination"
HANDOFF = "transfer_to_"
"""How the tools begin that AutoGen makes of handoffs, unless the user named them otherwise."""
_TEAM_ID = re.compile(r"_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
_RECIPIENT = re.compile(r"(?P<type>.*)\.\((?P<key>.*)\)-A")


@dataclass(frozen=True)
class Form:
    """What becomes of a span: its name and kind, None for no span of its own."""

    name: str
    kind: str | None
    unsettled: bool = False
    """Whether it is a span only if something happens directly in it."""
    stands_for: str | None = None
    """The message handling around it, by its destination, that is the same thing."""


def install() -> None:
    """Raises LightningError where AutoGen's spans cannot be made."""
    import importlib.util

    if importlib.util.find_spec("opentelemetry.sdk") is None:
        raise LightningError("AutoGen's spans need OpenTelemetry's SDK", hint="pip install opentelemetry-sdk")


def form(attributes: Mapping[str, Any]) -> Form | None:
    """None for a span that is none of AutoGen's, or means what the conventions say."""
    if MESSAGING in attributes:
        recipient = _RECIPIENT.fullmatch(str(attributes.get(DESTINATION)))
        if attributes[MESSAGING] != "process" or recipient is None:
            return Form("", None)
        return Form(_TEAM_ID.sub("", recipient["type"]), "chain", unsettled=True)
    if attributes.get(SYSTEM) != "autogen":
        return None
    name = str(attributes.get(AGENT_NAME) or attributes.get(TOOL_NAME) or "")
    match attributes.get(OPERATION):
        case "create_agent":
            return Form(name, None)
        case "invoke_agent":
            return Form(name, "agent", stands_for=_as_destination(attributes.get(AGENT_ID)))
        case "execute_tool" if name.startswith(HANDOFF):
            return Form(name, "handoff")
    return None


def _as_destination(agent_id: Any) -> str | None:
    """`type/key`, as messages are addressed."""
    kind, slash, key = str(agent_id).rpartition("/")
    return f"{kind}.({key})-A" if slash else None
