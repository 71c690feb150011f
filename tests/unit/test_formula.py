"""The formula that a dry run prints: true to every knob, and LaTeX that can be set."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from msgspec import structs

from lightning_rl.algorithms.advantage import estimate
from lightning_rl.algorithms.formula import Part, formula
from lightning_rl.algorithms.settings import (
    OBJECTIVES,
    AdvantageSettings,
    Correction,
    Kl,
    Overlong,
    Settings,
    settings_of,
)
from lightning_rl.credit import RULES, parameters, rule_function
from lightning_rl.credit.formula import FORMULAS, rule_formula
from lightning_rl.credit.records import compared_in_group
from lightning_rl.credit.rollouts import rollout_of
from tests.unit.domain import make_call, make_episode

BASE = Settings(
    name="base",
    advantage=AdvantageSettings(normalise="std"),
    kl=Kl(estimator="k3", place="loss", coefficient=0.1),
    correction=Correction(kind="icepop", low=0.5, high=5.0),
    overlong=Overlong(buffer=0.2, penalty=1.0),
)
"""An objective in which every part has an effect."""
CHANGES: list[tuple[str, Any]] = [
    ("credit", "final"),
    ("surrogate", "reinforce"),
    ("surrogate", "cispo"),
    ("surrogate", "dppo"),
    ("ratio", "sequence"),
    ("old", "server"),
    ("clip_low", 0.1),
    ("clip_high", 0.5),
    ("dual_clip", 3.0),
    ("aggregation", "sequence"),
    ("aggregation", "rollout"),
    ("aggregation", "fixed"),
    ("kl", None),
    ("entropy", 0.01),
    ("correction", Correction(kind="none")),
    ("overlong", None),
    ("dynamic_sampling", 1),
    ("dynamic_sampling", 2),
    ("advantage.baseline", "leave_one_out"),
    ("advantage.baseline", "none"),
    ("advantage.normalise", "none"),
    ("advantage.batch", "mean"),
    ("advantage.batch", "std"),
    ("kl.estimator", "k1"),
    ("kl.estimator", "k2"),
    ("kl.place", "reward"),
    ("kl.place", "token_reward"),
    ("kl.coefficient", 0.2),
    ("correction.kind", "truncate"),
    ("correction.kind", "sequence_mask"),
    ("correction.kind", "decoupled"),
    ("correction.level", "sequence"),
    ("correction.low", 0.7),
    ("correction.high", 7.0),
    ("overlong.buffer", 0.3),
    ("overlong.penalty", 0.5),
]


def changed(settings: Settings, name: str, value: Any) -> Settings:
    section, dot, field = name.partition(".")
    if not dot:
        return structs.replace(settings, **{name: value})
    return structs.replace(settings, **{section: structs.replace(getattr(settings, section), **{field: value})})


def text(parts: list[Part]) -> str:
    return "\n".join(f"{part.what}|{part.words}|{part.latex}" for part in parts)


@pytest.mark.parametrize(("name", "value"), CHANGES, ids=str)
def test_every_knob_shows(name: str, value: Any) -> None:
    assert text(formula(changed(BASE, name, value))) != text(formula(BASE))


def test_all_changes_differ_from_each_other_and_no_field_is_forgotten() -> None:
    texts = [text(formula(changed(BASE, name, value))) for name, value in CHANGES]
    assert len(set(texts)) == len(texts)
    fields = {name for name, _ in CHANGES}
    sections = {"advantage": AdvantageSettings, "kl": Kl, "correction": Correction, "overlong": Overlong}
    expected = set(Settings.__struct_fields__) - {"name", "advantage"}
    expected |= {f"{name}.{field}" for name, kind in sections.items() for field in kind.__struct_fields__}
    assert fields == expected


@pytest.mark.parametrize("surrogate", ["clip", "cispo", "dppo"])
@pytest.mark.parametrize(("name", "value"), [("clip_low", 0.1), ("clip_high", 0.5), ("ratio", "sequence")])
def test_bounds_show_wherever_they_bind(surrogate: Any, name: str, value: Any) -> None:
    base = structs.replace(BASE, surrogate=surrogate)
    assert text(formula(changed(base, name, value))) != text(formula(base))


@pytest.mark.parametrize(
    ("base", "name", "value"),
    [
        (structs.replace(BASE, surrogate="reinforce"), "clip_low", 0.1),
        (structs.replace(BASE, surrogate="reinforce"), "ratio", "sequence"),
        (structs.replace(BASE, old="server"), "correction", Correction(kind="truncate")),
        (structs.replace(BASE, credit="token_gae"), "advantage.baseline", "none"),
        (structs.replace(BASE, credit="tree"), "advantage.baseline", "none"),
    ],
)
def test_what_has_no_effect_does_not_show(base: Settings, name: str, value: Any) -> None:
    assert text(formula(changed(base, name, value))) == text(formula(base))


@pytest.mark.parametrize("settings", [*map(settings_of, OBJECTIVES), *(changed(BASE, *change) for change in CHANGES)])
def test_latex_is_balanced(settings: Settings) -> None:
    for part in formula(settings, "x_y.py:mine", {"a_b": 1.5, "c": "100%"}) + formula(settings, "gigpo"):
        bare = re.sub(r"\\[{}\\]", "", part.latex)
        depths = [bare[:end].count("{") - bare[:end].count("}") for end in range(len(bare) + 1)]
        assert min(depths) == 0 == depths[-1], part.latex
        assert bare.count(r"\left") - bare.count(r"\leftarrow") == bare.count(r"\right")
        assert re.findall(r"\\begin\{(\w+)\}", part.latex) == re.findall(r"\\end\{(\w+)\}", part.latex)
        assert "$" not in bare
        assert part.words


def test_every_rule_has_a_formula_with_all_its_parameters() -> None:
    assert set(FORMULAS) >= set(RULES)
    for rule in RULES:
        for name, default in parameters(rule_function(rule)).items():
            assert f"{name} = {default}" in rule_formula(rule, {}).words
            assert f"{name} = 0.25" in rule_formula(rule, {name: 0.25}).words


def part(parts: list[Part], what: str) -> Part | None:
    return next((part for part in parts if part.what == what), None)


def test_a_critic_that_is_trained_is_in_the_loss() -> None:
    ppo = settings_of("ppo")
    for rule, targets in (("token_gae", "M tokens"), ("turn_gae", "M calls"), ("my.py:rule", "value_targets")):
        parts = formula(ppo, rule, critic=0.25)
        critic, loss = part(parts, "critic"), part(parts, "loss")
        assert critic is not None
        assert targets in critic.words
        assert "0.25 times" in critic.words
        assert loss is not None
        assert loss.latex.endswith(r"+ \mathcal{V}")
    assert part(formula(ppo), "critic") is None
    assert r"\mathcal{V}" not in text(formula(ppo))


def test_values_stand_where_they_are_known() -> None:
    assert "sampling.max_tokens (L = 64)" in text(formula(settings_of("rloo"), length=64))
    assert "sampling.max_tokens (L = 64)" in text(formula(settings_of("dapo"), length=64))
    assert "1 - 1 … 1 + 4 (0 … 5)" in text(formula(settings_of("cispo")))


@pytest.mark.parametrize("rule", [None, "step_rewards", "gigpo", "mine.py:rule"])
def test_without_a_baseline_nothing_is_said_to_be_compared(rule: str | None) -> None:
    with_company, without = (text(formula(settings_of(name), rule)) for name in ("grpo", "reinforce"))
    assert "; company: " in with_company
    assert "the value itself; it is compared with nothing" in without
    assert "company" not in without


def test_the_advantage_is_the_one_that_is_printed() -> None:
    """A rule that gives calls of one rollout values of their own: (x - mean) / (sqrt(s² + v) + 1e-4)."""
    rollouts = [rollout_of(make_episode(id, [make_call([1], [2], id=f"{id}{k}", episode_id=id, index=k) for k in range(2)]), {},
                           [f"{id}0", f"{id}1"]) for id in "ab"]  # fmt: skip
    values = {"a0": 1.0, "a1": 3.0, "b0": 0.0, "b1": 0.0}
    settings = AdvantageSettings(normalise="std")
    made = estimate(compared_in_group(rollouts, values), settings, {id: id[0] for id in values})
    s_squared, v, mean = 2.0, (1.0 + 0.0) / 2, 1.0
    for id, value in values.items():
        assert made[id].advantage == pytest.approx((value - mean) / (math.sqrt(s_squared + v) + 1e-4))
    for rule in ("mine.py:rule", "gigpo"):
        said = part(formula(structs.replace(BASE, advantage=settings), rule), "advantage")
        assert said is not None
        assert said.latex.endswith(r"{\sqrt{s_x^2 + v_x} + 0.0001}")
    said = part(formula(BASE), "advantage")
    assert said is not None
    assert "v_x" not in said.latex
