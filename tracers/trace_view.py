"""Episodes as Rich renderables for a terminal.

Whatever an agent, a model or a tool wrote is untrusted: it is never read as Rich markup, and terminal control
sequences are taken out of it. Nothing here reads or writes anything.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from lightning_rl.episode import Call, Episode, Outcome, Reward, Span

if TYPE_CHECKING:
    from lightning_rl.store import EpisodeSummary

ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x07|\x1b\\|$)|[ -/]*[0-~])", re.DOTALL)
OUTCOME_STYLE = {Outcome.COMPLETED: "green", Outcome.CANCELLED: "yellow", None: "cyan"}
ROLE_STYLE = {"system": "dim", "user": "blue", "tool": "magenta", "assistant": "green"}


def safe(value: Any, style: str = "") -> Text:
    """Untrusted text (or JSON) that shows as it reads and cannot command the terminal."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = ESCAPES.sub("", text)
    return Text("".join(map(_visible, text)), style=style)


def episode_table(summaries: Sequence[EpisodeSummary]) -> Table:
    """One line an episode; its id says phase, step, task, sample and attempt."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("episode", no_wrap=True, overflow="fold")
    for column in ("outcome", "rewards"):
        table.add_column(column, overflow="fold")
    for column in ("calls", "tokens"):
        table.add_column(column, justify="right")
    for summary in summaries:
        table.add_row(
            safe(summary.id),
            _outcome(summary.outcome, summary.counted),
            safe("  ".join(f"{name} {value:.3g}" for name, value in summary.rewards.items())),
            str(summary.calls),
            str(summary.sampled_tokens),
        )
    return table


def episode_view(episode: Episode) -> RenderableType:
    """Everything about one episode: how it ended, its rewards, and its spans and calls in order."""
    start = episode.start
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    where = f"{start.phase} step {start.step}, task {start.task.id}, sample {start.sample}, attempt {start.attempt}"
    facts.add_row("episode", safe(episode.id))
    facts.add_row("where", safe(where))
    facts.add_row("task", safe(start.task.input))
    facts.add_row("outcome", _outcome(episode.outcome, episode.counted))
    facts.add_row("answer", safe(episode.answer))
    if episode.ended_at:
        facts.add_row("seconds", f"{episode.ended_at - start.started_at:.2f}")
    for reward in episode.rewards:
        if reward.call_id is None and reward.span_id is None:
            facts.add_row("reward", _reward(reward))
    parts: list[RenderableType] = [facts, Text(), _tree(episode)]
    if episode.error:
        parts += [Text(), Panel(safe(episode.error), title="error", border_style="red", title_align="left")]
    return Group(*parts)


def _tree(episode: Episode) -> Tree:
    tree = Tree(
        Text(f"{len(episode.calls)} calls, {sum(len(call.sampled_ids) for call in episode.calls)} tokens sampled")
    )
    nodes: dict[str | None, Tree] = {None: tree}
    known = {span.id for span in episode.spans}
    events: list[Span | Call] = sorted(
        [*episode.spans, *episode.calls], key=lambda event: (event.started_at, _depth(event))
    )
    before: list[Any] = []
    for event in events:
        if isinstance(event, Span):
            parent = nodes.get(event.parent_id if event.parent_id in known else None, tree)
            nodes[event.id] = parent.add(_span(event, episode.rewards))
        else:
            place = event.span_id if event.span_id in nodes else _enclosing(episode.spans, event)
            messages = _messages(event)
            nodes[place].add(Group(*_call(event, _news(before, messages), episode.rewards)))
            before = messages
    return tree


def _depth(event: Span | Call) -> int:
    """Of what began at the same moment, spans come before the calls made in them."""
    return 0 if isinstance(event, Span) else 1


def _enclosing(spans: Iterable[Span], call: Call) -> str | None:
    """The span that began last of those that were open when the call began."""
    around = [span for span in spans if span.started_at <= call.started_at <= span.ended_at]
    return max(around, key=lambda span: span.started_at).id if around else None


def _span(span: Span, rewards: Iterable[Reward]) -> RenderableType:
    title = Text.assemble(
        (f"{span.kind} ", "bold"), safe(span.name, "bold"), f"  {span.ended_at - span.started_at:.2f} s"
    )
    lines: list[RenderableType] = [title]
    if span.attributes:
        lines.append(safe(span.attributes, "dim"))
    if span.error:
        lines.append(safe(span.error.strip().splitlines()[-1], "red"))
    return Group(*lines, *(_reward(reward) for reward in rewards if reward.span_id == span.id))


def _call(call: Call, news: Iterable[dict[str, Any]], rewards: Iterable[Reward]) -> list[RenderableType]:
    versions = sorted(set(call.versions))
    facts = [
        f"prompt {len(call.prompt_ids)} ({call.cached_tokens} cached)",
        f"sampled {len(call.sampled_ids)}",
        f"mean log-prob {sum(call.logprobs) / len(call.logprobs):.3f}" if call.logprobs else "no log-probs",
        f"policy {', '.join(map(str, versions)) or '-'}",
        f"temperature {call.temperature:g}",
        f"{call.finish_reason}",
        f"{call.ended_at - call.started_at:.2f} s",
    ]
    title = Text.assemble((f"call {call.index}", "bold cyan"), "  ", safe(" · ".join(facts), "dim"))
    lines: list[RenderableType] = [title, *(_message(message) for message in news)]
    lines.append(_message({"role": "assistant"} | call.response, sampled=True))
    return lines + [_reward(reward) for reward in rewards if reward.call_id == call.id]


def _messages(call: Call) -> list[Any]:
    if "messages" in call.request:
        return list(call.request["messages"])
    return [{"role": "user", "content": call.request.get("prompt", call.request.get("input", ""))}]


def _news(before: list[Any], messages: list[Any]) -> list[dict[str, Any]]:
    """What the agent added since its last call; the sampled reply has been shown already."""
    if before and messages[: len(before)] == before:
        messages = messages[len(before) :]
        if messages and messages[0].get("role") == "assistant":
            messages = messages[1:]
    return messages


def _message(message: dict[str, Any], *, sampled: bool = False) -> Text:
    role = str(message.get("role", "?"))
    line = Text.assemble(safe(f"{role}: ", ROLE_STYLE.get(role, "")), safe(message.get("content") or ""))
    for tool_call in message.get("tool_calls") or []:
        function = tool_call.get("function", {})
        line.append_text(safe(f"→ {function.get('name')}({function.get('arguments')})", "bold" if sampled else ""))
    return line


def _reward(reward: Reward) -> Text:
    return safe(f"{reward.name} = {reward.value:g}", "yellow")


def _outcome(outcome: Outcome | None, counted: bool) -> Text:
    note = "" if counted or outcome is None else " (not counted)"
    return Text(f"{outcome or 'running'}{note}", style=OUTCOME_STYLE.get(outcome, "red"))


def _visible(letter: str) -> str:
    if letter in "\n\t":
        return letter
    # Control and format characters, surrogates: they move the cursor, reorder the line or cannot be written at all.
    return "\N{REPLACEMENT CHARACTER}" if unicodedata.category(letter) in {"Cc", "Cf", "Cs"} else letter
