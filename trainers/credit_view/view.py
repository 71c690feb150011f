"""A credit report as Rich renderables. Names and texts of agents are untrusted: they go through `tracers.commands.view.safe`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from lightning_rl.agents import root_agent
from lightning_rl.episode import Call, Episode, Span
from tracers.commands.conversation import replied
from tracers.commands.view import safe
from trainers.credit_view.report import CallCredit, CallFacts, GroupReport, RuleCredit, StepReport

REPLY_LETTERS = 60
"""Of what a call answered."""
CALL_WIDTH, RULE_WIDTH = 10, 16
"""Columns of the table of rules, its padding included."""
TASK_WIDTH, NUMBER_WIDTH = 8, 5
"""Of columns of a step, at the least: narrower ones fold names and numbers out of recognition."""
NOTHING = "–"


def step_view(report: StepReport) -> RenderableType:
    """A line for each group: its n rollouts, their returns R, the advantages A of their calls, and sampled tokens."""
    rule = safe(f"step {report.step}, credit {report.rule}, objective {report.objective}", "bold")
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("task", overflow="fold", min_width=TASK_WIDTH)
    for column in ("n", "mean R", "std R", "A from", "A to", "with a loss"):
        table.add_column(column, justify="right", overflow="fold", min_width=1 if column == "n" else NUMBER_WIDTH)
    table.add_column("without", overflow="fold")
    for group in report.groups:
        table.add_row(
            safe(group.task),
            str(len(group.episodes)),
            NOTHING if group.mean is None else f"{group.mean:.3f}",
            f"{group.spread:.3f}",
            _known(group.lowest),
            _known(group.highest),
            NOTHING if group.with_loss is None else str(group.with_loss),
            safe(", ".join(f"{count} {reason}" for reason, count in sorted(group.masked.items()))),
        )
    return Group(rule, table, *_notes(report.notes))


def _known(advantage: float | None) -> Text:
    return Text(NOTHING, "dim") if advantage is None else signed(advantage, 2)


def group_view(report: GroupReport, episode: Episode, width: int) -> RenderableType:
    """The episode's calls with their own credit, its company, and the rules beside each other. `width`: of the terminal."""
    own = next(rollout for rollout in report.rollouts if rollout.episode == episode.id)
    title = safe(f"{episode.id}: credit {report.own.rule}, objective {report.objective}", "bold")
    company = ", ".join(f"{rollout.ret:.3g}" for rollout in report.rollouts if rollout.episode != episode.id)
    facts = Text.assemble(
        f"R = {own.ret:.3g}",
        _rewards(own.outcome_rewards, ", of which for the episode: "),
        "; the others of the group: ",
    )
    others = [credit for credit in report.others if credit.rule != report.own.rule]
    tables = [_rules(own.calls, credits) for credits in _chunks(report.others, width)]
    return Group(
        title,
        facts.append_text(safe(company or "none")),
        Text(),
        _tree(episode, {call.id: call for call in own.calls}, report.own),
        *(part for table in tables for part in (Text(), table)),
        *_notes([*report.notes, *(f"{c.rule} {c.unknown}" for c in others if c.unknown)]),
    )


def _tree(episode: Episode, facts: Mapping[str, CallFacts], credit: RuleCredit) -> Tree:
    """Spans with the calls made in them; a call that parts from an earlier one hangs below it."""
    tree = Tree(Text("1 call" if len(facts) == 1 else f"{len(facts)} calls"))
    root = root_agent(episode.spans)
    nodes: dict[str | None, Tree] = {}
    place_of: dict[str, tuple[Tree, Tree]] = {}
    events: list[Span | Call] = sorted(
        [*episode.spans, *episode.calls],
        key=lambda event: (event.started_at, isinstance(event, Call), getattr(event, "index", 0)),
    )
    for event in events:
        if isinstance(event, Span):
            name = Text.assemble((f"{event.kind} ", "bold"), safe(event.name, "bold"))
            nodes[event.id] = nodes.get(event.parent_id, tree).add(name)
            continue
        around = nodes.get(event.span_id) or nodes.get(root.id if root else None, tree)
        before = place_of.get(event.parent_id or "")
        if before is not None and before[0] is around and event.relation == "fork":
            around = before[1]
        place_of[event.id] = (around, around.add(_call(event, facts, credit.calls.get(event.id))))
    return tree


def _call(call: Call, facts: Mapping[str, CallFacts], credit: CallCredit | None) -> RenderableType:
    fact = facts[call.id]
    title = Text.assemble((f"call {call.index}", "bold cyan"), "  ", safe(_parted(fact, facts), "dim"))
    if fact.earned or fact.rewards:
        title.append(f"  earned {fact.earned:+.3g}", "yellow").append_text(_rewards(fact.rewards, ": "))
    said = replied(call)
    words = " ".join([said.text, *(f"→ {name}({arguments})" for name, arguments in said.tools)]).split()
    text = " ".join(words)
    reply = safe(text if len(text) <= REPLY_LETTERS else f"{text[:REPLY_LETTERS]}…", "green")
    return Group(title, reply, _own(fact, credit))


def _own(fact: CallFacts, credit: CallCredit | None) -> Text:
    if credit is None:
        return Text("credit not known", "dim")
    if not fact.learns:
        return Text(f"not trained: {credit.masked}, {fact.sampled} tokens", "dim")
    line = Text.assemble(f"return {credit.ret:.3g}", "  advantage ", _advantage(credit))
    if credit.masked is None:
        cut = fact.sampled - credit.with_loss
        line.append(f"  {credit.with_loss} tokens with a loss" + (f", {cut} beyond the row limit" if cut else ""))
    else:
        line.append(f"  {fact.sampled} tokens not trained: {credit.masked}", "dim")
    return line


def _parted(fact: CallFacts, facts: Mapping[str, CallFacts]) -> str:
    parent = facts.get(fact.parent_id or "")
    of = f" of call {parent.index}" if parent else ""
    at = f" at token {fact.parted_at}" if fact.parted_at is not None else ""
    agent = f"{fact.agent}  " if fact.agent else ""
    match fact.relation:
        case "edit":
            return f"{agent}history edited{at}"
        case "fork":
            return f"{agent}fork{of}{at}"
        case relation:
            return f"{agent}{relation}{of}"


def _rules(calls: Sequence[CallFacts], credits: Sequence[RuleCredit]) -> Table:
    """A line for each call, a column for each rule: return, advantage, and below them why it is not trained on."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("call", no_wrap=True)
    for credit in credits:
        below = Text("\nreturn  adv." if credit.calls else "\nneeds critic", "dim")
        table.add_column(safe(_short(credit.rule)).append_text(below), justify="right", overflow="fold")
    for call in calls:
        if call.learns:
            table.add_row(f"call {call.index}", *(_cell(credit.calls.get(call.id)) for credit in credits))
    return table


def _cell(credit: CallCredit | None) -> Text:
    if credit is None:
        return Text(NOTHING, "dim")
    cell = Text.assemble(f"{credit.ret:.2f}  ", _advantage(credit, digits=2))
    return cell if credit.masked is None else cell.append(f"\n{credit.masked}", "dim")


def _advantage(credit: CallCredit, digits: int = 3) -> Text:
    if credit.masked is not None and not credit.advantage:
        return Text(NOTHING, "dim")
    return signed(credit.advantage, digits)


def signed(value: float, digits: int = 3) -> Text:
    if not value:
        return Text(f"{0:.{digits}f}", "dim")
    return Text(f"{value:+.{digits}f}", style="green" if value > 0 else "red")


def _rewards(rewards: Mapping[str, float], before: str) -> Text:
    if not rewards:
        return Text()
    parts = ", ".join(f"{name} {value:.3g}" for name, value in rewards.items())
    return Text(before).append_text(safe(parts, "yellow"))


def _short(rule: str) -> str:
    """Of a reference the function's name: the file's is too long for a column."""
    return rule.rpartition(":")[2]


def _chunks(credits: Sequence[RuleCredit], width: int) -> Iterator[Sequence[RuleCredit]]:
    """As many rules as fit beside each other."""
    size = max(1, (width - CALL_WIDTH) // RULE_WIDTH)
    for start in range(0, len(credits), size):
        yield credits[start : start + size]


def _notes(notes: Sequence[str]) -> list[RenderableType]:
    return [Text(), *(safe(f"note: {note}", "dim") for note in notes)] if notes else []
