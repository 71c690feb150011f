"""`lrl credit`: its numbers are those of training, whoever wrote the texts, however narrow the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import structs
from rich.console import Console, RenderableType

from lightning_rl.credit import RULES, WITH_CRITIC
from lightning_rl.episode import Episode, Reward, Span
from lightning_rl.recipe import Recipe, load_recipe
from tests.unit.domain import make_call, make_episode
from trainers.credit_view.report import NEEDS_CRITIC, CallCredit, credit_report, step_report
from trainers.credit_view.view import group_view, step_view
from trainers.learning import learn_from

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
HOSTILE = "[bold red]own[/]\x1b[31m\x1b]0;title\x07‮"


def recipe(*overrides: str) -> Recipe:
    return load_recipe(SMOKE, ["reward.weights={}", "reward.function=null", "evaluate.success=correct", *overrides])


def episode(id: str, group: str, correct: float, valid: float | None = None, last: list[int] | None = None) -> Episode:
    """Two calls, the second extending the first; a third one parts from the first again."""
    first = make_call([1, 2], [3, 4], id=f"{id}-0", episode_id=id, started_at=1.0, response={"content": HOSTILE})
    second = make_call([1, 2, 3, 4, 5], last or [6], id=f"{id}-1", episode_id=id, index=1, parent_id=first.id, started_at=2.0,
                       relation="extension", response={"content": "[/] done"})  # fmt: skip
    third = make_call([1, 2, 3, 4, 9], [7, 8], id=f"{id}-2", episode_id=id, index=2, parent_id=first.id, started_at=3.0,
                      relation="fork", parted_at=4, response={"content": "other"})  # fmt: skip
    made = make_episode(id, [first, second, third], {"correct": correct})
    rewards = [*made.rewards]
    if valid is not None:
        rewards.append(Reward(episode_id=id, name=HOSTILE, value=valid, call_id=first.id))
    agent = Span(id=f"{id}-s", episode_id=id, name=f"solver {HOSTILE}", kind="agent", started_at=0.5)
    return structs.replace(made, start=structs.replace(made.start, group=group), rewards=rewards, spans=[agent])


def step() -> list[Episode]:
    return [
        episode("a", "g", 1.0, valid=0.5, last=[6]),
        episode("b", "g", 0.0, valid=0.0, last=[6, 6, 6]),
        episode("c", "g", 0.0, last=[5]),
        episode("d", "even", 1.0),
        episode("e", "even", 1.0),
        episode("f", "single", 1.0),
        structs.replace(episode("lost", "g", 9.0), counted=False),
    ]


def shown(view: RenderableType, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("rule", sorted(set(RULES) - WITH_CRITIC))
@pytest.mark.parametrize("objective", ["grpo", "reinforce", "dapo"])
def test_the_numbers_are_those_of_training(rule: str, objective: str) -> None:
    own = recipe(f"train.objective={objective}", f"train.credit={rule}")
    report = credit_report(own, step(), "g", [*RULES])
    transitions = {t.call_id: t for t in learn_from(own, step()).transitions if t.episode_id in "abc"}
    assert set(report.own.calls) == set(transitions)
    for id, credit in report.own.calls.items():
        expected = transitions[id]
        assert credit == CallCredit(
            ret=expected.ret,
            advantage=expected.advantage,
            token_advantages=expected.token_advantages,
            masked=expected.masked,
            with_loss=0 if expected.masked else len(expected.sampled_ids),
        )
    by_rule = {credit.rule: credit for credit in report.others}
    assert [*by_rule] == [*RULES]
    assert by_rule[rule] == report.own
    for name in WITH_CRITIC:
        assert by_rule[name].unknown == NEEDS_CRITIC
        assert not by_rule[name].calls


def test_what_was_earned_and_where() -> None:
    report = credit_report(recipe(), step(), "g", [])
    first = report.rollouts[0]
    assert (first.episode, first.ret, first.outcome) == ("a", 1.5, 1.0)
    assert first.outcome_rewards == {"correct": 1.0}
    assert [call.earned for call in first.calls] == [0.5, 0.0, 0.0]
    assert first.calls[0].rewards == {HOSTILE: 0.5}
    shaped = credit_report(recipe("train.objective=dapo", "sampling.max_tokens=3"), step(), "g", [])
    assert shaped.rollouts[1].calls[1].rewards == {"overlong": -1.0}, "a call of three tokens, three being the limit"


def test_groups_say_who_has_signal() -> None:
    groups = {group.group: group for group in step_report(recipe(), 0, step()).groups}
    assert groups["g"].episodes == ["a", "b", "c"]
    assert groups["g"].masked == {}
    assert groups["g"].lowest < 0 < groups["g"].highest
    assert groups["even"].masked == {"no_signal": 10}
    assert groups["single"].masked == {"group_of_one": 5}
    assert (groups["even"].mean, groups["even"].spread, groups["even"].with_loss) == (1.0, 0.0, 0)


@pytest.mark.parametrize(
    "overrides", [["train.objective=reinforce++"], ["train.objective.kl={coefficient: 0.1, place: reward}"]]
)
def test_penalties_that_are_not_stored_are_left_out_and_said_to_be(overrides: list[str]) -> None:
    report = credit_report(recipe(*overrides), step(), "g", [])
    assert report.own.calls
    assert "not in these numbers" in report.notes[0]
    assert "not in these numbers" in step_report(recipe(*overrides), 0, step()).notes[0]


def test_a_run_with_a_critic_shows_the_other_rules() -> None:
    report = credit_report(recipe("train.credit=token_gae"), step(), "g", ["equal", "token_gae"])
    assert not report.own.calls
    assert "critic" in report.notes[0]
    assert report.others[0].calls
    view = shown(group_view(report, step()[0], 120))
    assert "credit not known" in view
    assert view.count(NEEDS_CRITIC) == 1
    summary = step_report(recipe("train.credit=token_gae"), 0, step())
    assert {(group.lowest, group.highest, group.with_loss) for group in summary.groups} == {(None, None, None)}
    assert "0.00" not in shown(step_view(summary)).replace("0.000", "")
    assert [group.mean for group in step_report(recipe("train.credit=token_gae"), 0, step()).groups] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("width", [30, 60, 200])
def test_hostile_texts_are_shown_and_not_obeyed_at_any_width(width: int) -> None:
    report = credit_report(recipe(), step(), "g")
    text = shown(group_view(report, step()[0], width), width) + shown(
        step_view(step_report(recipe(), 0, step())), width
    )
    assert not {"\x1b", "\x07", "‮"} & set(text)
    assert "[bold" in text, "markup is text"
    assert all(len(line) <= width for line in text.splitlines())
    if width >= 60:
        assert all(rule in text for rule in RULES)


def test_a_fork_hangs_below_the_call_that_it_parts_from() -> None:
    lines = shown(group_view(credit_report(recipe(), step(), "g", ["equal"]), step()[0], 120)).splitlines()
    places = {
        n: next(line for line in lines if f"call {n}  " in line and "── " in line).index("call") for n in range(3)
    }
    assert places[1] == places[0] < places[2]
    assert any("fork of call 0 at token 4" in line for line in lines)


def test_reports_are_plain_json() -> None:
    def plain(report: Any) -> Any:
        return json.loads(msgspec.json.encode(report))

    group = plain(credit_report(recipe(), step(), "g", ["equal"]))
    assert [*group] == ["group", "task", "objective", "rollouts", "own", "others", "notes"]
    assert group["own"]["calls"]["a-0"]["masked"] is None
    (first, *_) = plain(step_report(recipe(), 0, step()))["groups"]
    assert first["spread"] == pytest.approx(0.866, abs=1e-3)


def test_a_narrow_step_keeps_its_names_and_numbers_whole() -> None:
    report = step_report(recipe(), 0, step())
    named = structs.replace(report, groups=[structs.replace(group, task="abcd-012") for group in report.groups])
    first = next(line for line in shown(step_view(named), 60).splitlines() if line.startswith("abcd"))
    assert first.split() == ["abcd-012", "3", "0.500", "0.866", "-0.58", "+1.15", "17"]


def test_a_group_that_is_not_whole_is_said_to_be() -> None:
    own = recipe("train.samples_per_task=3")
    assert "2 of 3 groups have fewer than train.samples_per_task = 3 rollouts" in step_report(own, 0, step()).notes[0]
    assert credit_report(own, step(), "g", []).notes == []
    assert "the group has fewer" in credit_report(own, step(), "even", []).notes[0]
