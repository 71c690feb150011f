"""docs/credit.md against the program: its tables have what the code has, and its examples run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from pydantic import TypeAdapter

from lightning_rl.algorithms.correction import BOUNDS
from lightning_rl.algorithms.formula import formula, number
from lightning_rl.algorithms.settings import OBJECTIVES, Settings, settings_of
from lightning_rl.credit import RULES, WITH_CRITIC, bind, parameters, rule_function
from lightning_rl.credit.rollouts import rollout_of
from lightning_rl.episode import Reward
from lightning_rl.recipe import Objective, load_recipe
from tests.unit.domain import make_call, make_episode

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "credit.md").read_text()


def rows(heading: str) -> dict[str, list[str]]:
    """Of the first table below the heading: cells by the name in the first one."""
    section = DOCS.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines]
    return {row[0].strip("` "): row[1:] for row in cells}


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)


def group() -> list[Any]:
    """Three rollouts of one, two and three calls; rewards at calls and for the episode."""
    rollouts = []
    for count in (1, 2, 3):
        id = f"e{count}"
        calls = [
            make_call([1, *range(2 * k)], [2 * k, k], id=f"{id}-{k}", episode_id=id, index=k) for k in range(count)
        ]
        made = make_episode(id, calls, {"outcome": float(count)})
        rewards = [Reward(episode_id=id, name="step", value=0.5 * count, call_id=calls[0].id)]
        made = msgspec.structs.replace(made, rewards=[*made.rewards, *rewards])
        rollouts.append(rollout_of(made, {}, [call.id for call in calls]))
    return rollouts


def test_the_rules_are_all_there_with_their_parameters() -> None:
    table = rows("Choose a rule")
    assert [*table] == [*RULES]
    for rule, cells in table.items():
        expected = [f"`{name}: {str(value).lower()}`" for name, value in parameters(rule_function(rule)).items()]
        assert cells[2] == (", ".join(expected) or "–"), rule


def test_whether_a_rule_preserves_sums_is_so() -> None:
    for rule, cells in rows("Choose a rule").items():
        if rule in WITH_CRITIC:
            assert cells[3] == "no"
            continue
        credits = bind(rule_function(rule), {}, rule)(group())
        preserved = all(
            sum(credits.returns[call.id] for call in rollout.calls) == pytest.approx(rollout.ret) for rollout in group()
        )
        assert cells[3] == ("yes" if preserved else "no"), rule


def knobs(settings: Settings) -> str:
    """The fields of a recipe that would make of the defaults what the objective is."""
    plain, defaults = msgspec.to_builtins(settings), msgspec.to_builtins(Settings(name=""))
    own = {"credit": settings.credit} if settings.credit != defaults["credit"] else {}
    own |= {k: v for k, v in plain["advantage"].items() if v != defaults["advantage"][k]}
    own |= {
        k: plain[k]
        for k in ("ratio", "old", "clip_low", "clip_high", "aggregation", "dynamic_sampling")
        if plain[k] != defaults[k]
    }
    own |= {k: plain[k] for k in ("kl", "overlong") if plain[k] is not None}
    if settings.correction != Settings(name="").correction:
        own["correction"] = {"kind": settings.correction.kind}

    def written(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {written(part)}" for key, part in value.items()) + "}"
        return number(value) if isinstance(value, float) else str(value)

    return ", ".join(f"`{key}: {written(value)}`" for key, value in own.items()) or "–"


def test_the_objectives_are_all_there_with_their_formulas() -> None:
    table = rows("Choose an objective")
    assert [*table] == [*OBJECTIVES]
    for name, cells in table.items():
        settings = settings_of(name)
        parts = {part.what: part.latex for part in formula(settings)}
        for cell, what in zip(cells, ("surrogate", "weights"), strict=False):
            assert cell == f"$`{parts[what]}`$", name
        assert cells[2] == knobs(settings), name

        assert cells[3], "the paper"


def test_the_corrections_are_all_there_with_their_bounds() -> None:
    table = rows("Trainer and server differ")
    assert [*table] == [*BOUNDS]
    for kind, cells in table.items():
        low, high = BOUNDS[kind]
        assert cells[1] == ("–" if kind == "none" else f"{number(low)}, {number(high)}"), kind


def test_the_rules_of_the_page_run() -> None:
    names: dict[str, Any] = {}
    for block in python_blocks():
        exec(block, names)  # as a user's file would be run
    for function in (names["mostly_last"], names["long_ones_aside"]):
        credits = bind(function, {}, function.__name__)(group())
        assert {call.id for rollout in group() for call in rollout.calls} == set(credits.returns)
    shared = bind(names["mostly_last"], {"share": 0.5}, "mostly_last")(group())
    for rollout in group():
        assert sum(shared.returns[call.id] for call in rollout.calls) == pytest.approx(rollout.ret)
    aside = bind(names["long_ones_aside"], {"most": 2}, "long_ones_aside")(group())
    assert {call_id.split("-")[0] for call_id in aside.terms} == {"e1", "e2"}


def test_the_recipes_of_the_page_load(tmp_path: Path) -> None:
    (tmp_path / "my_rules.py").write_text(next(block for block in python_blocks() if "def mostly_last" in block))
    blocks = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    assert blocks
    base = yaml.safe_load(load_recipe(ROOT / "recipes" / "smoke.yaml").to_yaml())
    for place, block in enumerate(blocks):
        values = yaml.safe_load(block)
        path = tmp_path / f"recipe{place}.yaml"
        path.write_text(yaml.safe_dump(base | {key: base[key] | values[key] for key in values}))
        load_recipe(path)
    assert TypeAdapter(Objective).validate_python("dapo").name == "dapo"
