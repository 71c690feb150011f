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
from lightning_rl.episode_tree import episode_tree
from lightning_rl.tool_uses import ToolUse
from tracers.commands.conversation import Message, all_said, replied

if TYPE_CHECKING:
    from lightning_rl.store import EpisodeSummary

ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x07|\x1b\\|$)|[ -/]*[0-~])", re.DOTALL)
TRACEBACK = re.compile(r"(Traceback|  \+ Exception Group Traceback) \(most recent call last\):")
GROUP_MARGIN = re.compile(r"^  \| ?")
LONGEST = 4000
"""Characters of one text that are shown; `lrl traces export` has all of them."""
OUTCOME_STYLE = {Outcome.COMPLETED: "green", Outcome.CANCELLED: "yellow", None: "cyan"}
ROLE_STYLE = {
    "system": "dim",
    "developer": "dim",
    "reasoning": "dim",
    "user": "blue",
    "tool": "magenta",
    "assistant": "green",
}


def safe(value: Any, style: str = "") -> Text:
    """Untrusted text (or JSON) that shows as it reads, cut where it is long, and cannot command the terminal."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}… ({len(text)} characters)"
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
    step = f" step {start.step + 1}" if start.phase == "train" else ""
    where = f"{start.phase}{step}, task {start.task.id}, sample {start.sample}, attempt {start.attempt}"
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
        parts += [Text(), Panel(safe(episode.error[-LONGEST:]), title="error", border_style="red", title_align="left")]
    return Group(*parts)


def _tree(episode: Episode) -> Tree:
    tree = Tree(Text(_totals(episode.calls)))
    number = {call.id: call.index for call in episode.calls}
    places: dict[str | None, Tree] = {None: tree}
    said = all_said(episode.calls)
    for node in episode_tree(episode):
        place = places[node.parent]
        if isinstance(node.event, Call):
            call = node.event
            place.add(Group(*_call(call, number.get(call.parent_id or ""), said[call.id].news, episode.rewards)))
        else:
            places[node.event.id] = place.add(_span(node.event, node.use, episode.rewards))
    return tree


def _span(span: Span, use: ToolUse | None, rewards: Iterable[Reward]) -> RenderableType:
    title = Text.assemble(
        (f"{span.kind} ", "bold"), safe(span.name, "bold"), f"  {span.ended_at - span.started_at:.2f} s"
    )
    attributes, error = span.attributes, span.error
    seen_by: tuple[str, ...] = (span.id,)
    if use is not None:  # who asked for it can be seen, and its id says nothing to a reader
        facts = {"arguments": use.arguments, "result": use.result}
        attributes = {name: value for name, value in attributes.items() if name not in ("call_id", "tool_call_id")}
        attributes |= {name: value for name, value in facts.items() if value is not None}
        error, seen_by = use.error, use.seen_by
    lines: list[RenderableType] = [title]
    if attributes:
        lines.append(safe(attributes, "dim"))
    if error:
        lines.append(safe(_own_line(error), "red"))
    return Group(*lines, *(_reward(reward) for reward in rewards if reward.span_id in seen_by))


def _own_line(error: str) -> str:
    """Of a traceback, the line that says what was raised; of any other text the first."""
    lines = error.strip().splitlines()
    starts = [place for place, line in enumerate(lines) if TRACEBACK.fullmatch(line)]
    after = [GROUP_MARGIN.sub("", line) for line in lines[starts[-1] + 1 :]] if starts else lines
    return next((line for line in after if line and not line[0].isspace()), lines[0])


def _totals(calls: Sequence[Call]) -> str:
    prompt, cached = sum(len(call.prompt_ids) for call in calls), sum(call.cached_tokens for call in calls)
    sampled = sum(len(call.sampled_ids) for call in calls)
    return f"{len(calls)} calls, {sampled} tokens sampled, {prompt} in prompts ({cached} cached)"


def _relation(call: Call, parent: int | None) -> str:
    """How the call continues the conversation, and where it parted from it."""
    of = f" of call {parent}" if parent is not None else ""
    at = f" at token {call.parted_at}" if call.parted_at is not None else ""
    match call.relation:
        case "edit":
            return f"history edited{at}"
        case "fork":
            return f"fork{of}{at}"
        case "extension":
            return f"extension{of}"
        case relation:
            return relation


def _call(call: Call, parent: int | None, news: Iterable[Message], rewards: Iterable[Reward]) -> list[RenderableType]:
    if call.upstream:
        facts = [f"answered by {call.upstream}, no tokens known"]
    else:
        facts = _token_facts(call, parent)
    facts += [f"{call.finish_reason}", f"{call.ended_at - call.started_at:.2f} s"]
    if call.redacted:
        facts.append("redacted")
    if call.restricted:
        facts.append(f"restricted by {', '.join(call.restricted)}")
    title = Text.assemble((f"call {call.index}", "bold cyan"), "  ", safe(" · ".join(facts), "dim"))
    lines: list[RenderableType] = [title, *(_message(message) for message in news)]
    lines.append(_message(replied(call), sampled=True))
    return lines + [_reward(reward) for reward in rewards if reward.call_id == call.id]


def _token_facts(call: Call, parent: int | None) -> list[str]:
    versions = sorted(set(call.versions))
    return [
        _relation(call, parent),
        f"prompt {len(call.prompt_ids)} ({call.cached_tokens} cached)",
        f"sampled {len(call.sampled_ids)}",
        f"mean log-prob {sum(call.logprobs) / len(call.logprobs):.3f}" if call.logprobs else "no log-probs",
        f"policy {', '.join(map(str, versions)) or '-'}",
        f"temperature {call.temperature:g}",
    ]


def _message(message: Message, *, sampled: bool = False) -> Text:
    line = Text.assemble(safe(f"{message.role}: ", ROLE_STYLE.get(message.role, "")), safe(message.text))
    for name, arguments in message.tools:
        line.append_text(safe(f"→ {name}({arguments})", "bold" if sampled else ""))
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
