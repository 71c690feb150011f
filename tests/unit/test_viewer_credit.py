"""The viewer's credit is that of `credit_report`, whatever was asked before; and no name in an address runs code."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs

from lightning_rl.credit import RULES
from lightning_rl.store import Store
from lightning_rl.store.outlines import load_for_credit, load_step_tokens
from tests.unit.domain import make_start
from tests.unit.test_credit_view import recipe, step
from trainers.credit_view.report import credit_report
from trainers.viewer import credit
from trainers.viewer.credit import NoCredit, group_credit
from trainers.viewer.library import NotThere
from trainers.viewer.opened import OpenRun


@pytest.fixture
def run(tmp_path: Path):
    with Store.open(tmp_path / "episodes.db") as store:
        for episode in step():
            store.add_episode(episode)
        store.begin(make_start("running", group="alone"))
        store.begin(make_start("judged", group="held", phase="eval-base"))
        yield OpenRun("k", store, None, recipe())


def test_it_is_that_of_the_report(run: OpenRun, monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = run.store.episodes(phase="train", step=0)
    for rules in ([], ["tree"], ["gigpo", "tree", "final"], [*RULES]):
        assert group_credit(run, "g", rules) == credit_report(run.recipe, episodes, "g", rules)
    assert group_credit(run, "even", ["final"]) == credit_report(run.recipe, episodes, "even", ["final"])
    monkeypatch.setattr(credit, "credit_by", None)  # all of it is known
    assert len(group_credit(run, "single", [*RULES]).others) == len(RULES)


def test_another_episode_that_counts_changes_it(run: OpenRun) -> None:
    before = group_credit(run, "single", [])
    late = step()[0]
    calls = [structs.replace(call, id=f"late-{call.index}", episode_id="late", parent_id=None) for call in late.calls]
    start = structs.replace(late.start, id="late", sample=9, group="single")
    run.store.add_episode(structs.replace(late, start=start, calls=calls, spans=[], rewards=[]))
    assert len(group_credit(run, "single", []).rollouts) == len(before.rollouts) + 1


def test_what_has_no_credit_says_why(run: OpenRun) -> None:
    with pytest.raises(NoCredit, match="did you mean 'tree'"):
        group_credit(run, "g", ["tre"])
    with pytest.raises(NoCredit, match="no credit rule"):
        group_credit(run, "g", ["os.py:system"])
    with pytest.raises(NoCredit, match="no episode of group alone counts"):
        group_credit(run, "alone", [])
    with pytest.raises(NoCredit, match="in training only"):
        group_credit(run, "held", [])
    with pytest.raises(NotThere):
        group_credit(run, "nobody's", [])
    with pytest.raises(NoCredit, match="by which recipe"):
        group_credit(OpenRun("k", run.store, None, None), "g", [])
    with pytest.raises(NoCredit, match="this version cannot"):
        group_credit(OpenRun("k", run.store, None, None, "this version cannot read the recipe: x"), "g", [])


def test_a_rule_that_ends_the_program_ends_nothing(run: OpenRun, tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("def rule(group):\n    raise SystemExit(3)\n")
    ends = recipe(f"train.credit.rule={tmp_path}/ends.py:rule")
    with pytest.raises(NoCredit, match="ends the program"):
        group_credit(OpenRun("k", run.store, None, ends), "g", [])


def test_tokens_are_counted_before_a_step_is_loaded(run: OpenRun, monkeypatch: pytest.MonkeyPatch) -> None:
    late = structs.replace(step()[0], start=make_start("late", group="late", step=1), rewards=[], spans=[])
    calls = [
        structs.replace(call, id=f"late-{call.index}", episode_id="late", parent_id=None,
                        experts=b"xx" * 99, entropies=[0.5 for _ in call.sampled_ids])
        for call in late.calls
    ]  # fmt: skip
    run.store.add_episode(structs.replace(late, calls=calls))
    expected = sum(len(call.prompt_ids) + len(call.sampled_ids) for call in calls)
    assert run.store.read(lambda connection: load_step_tokens(connection, "train", 1)) == expected
    (read,) = run.store.read(lambda connection: load_for_credit(connection, "train", 1))
    assert [(call.experts, call.entropies, call.alternatives) for call in read.calls] == [(None, [], [])] * 3
    assert [call.prompt_ids for call in read.calls] == [call.prompt_ids for call in calls]
    monkeypatch.setattr(credit, "MOST_TOKENS", expected)
    assert len(group_credit(run, "late", []).rollouts) == 1
    monkeypatch.setattr(credit, "MOST_TOKENS", expected - 1)
    monkeypatch.setattr(credit, "_STEPS", credit._Steps())
    with pytest.raises(NoCredit, match="step 2 has") as refused:
        group_credit(run, "late", [])
    assert "lrl credit" in (refused.value.hint or "")
