from pathlib import Path

import pytest
import yaml

from lightning_rl.errors import RecipeError
from lightning_rl.recipe import load_recipe
from lightning_rl.recipe_reference import reference

ROOT = Path(__file__).resolve().parents[2]
CODE = """\
import json as j
from os import path
constant: int = 3
if constant:
    def conditional(): ...
try:
    def solve(): ...
except ImportError:
    fallback = None
async def later(): ...
class Agent: ...
"""
RECIPE = """\
name: test
model: {name: tiny-llama}
agent:
  function: user/code.py:solve
tasks:
  function: user/code.py:solve
reward: {function: user/code.py:solve}
evaluate: {success: solved}
train:
  steps: 3
"""


@pytest.fixture
def load(tmp_path):
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "code.py").write_text(CODE)

    def load(text=RECIPE, *overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(path, overrides)

    return load


@pytest.fixture
def problems(load, tmp_path):
    """The lines of the error, without the folder of the files."""

    def problems(text=RECIPE, *overrides):
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        return str(caught.value).replace(f"{tmp_path}/", "").splitlines()

    return problems


@pytest.mark.parametrize("name", ["calculator", "smoke"])
def test_the_recipes_of_the_project_are_valid(name):
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe = load_recipe(path)
    assert recipe.name == name
    assert recipe.source == path
    written = yaml.safe_load(path.read_text())
    functions = {written[section].pop("function") for section in ("agent", "tasks", "reward")}
    assert all(recipe.resolve_function(function)[0].is_file() for function in functions)
    assert_within(written, recipe.model_dump())


def assert_within(written, loaded):
    for key, value in written.items():
        if isinstance(value, dict):
            assert_within(value, loaded[key])
        else:
            assert loaded[key] == value


def test_the_reference_is_current():
    assert (ROOT / "docs" / "recipe.md").read_text() == reference(), (
        "run python -m lightning_rl.recipe_reference > docs/recipe.md"
    )


def test_every_field_is_described():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert not [row for row in rows if row.endswith("|  |")]


def test_defaults(load):
    recipe = load()
    assert recipe.warm_start is None
    assert recipe.train.lora.rank == 16
    assert recipe.train.objective.clip_high == 0.28
    assert recipe.agent.outcomes.infrastructure_error == "retry"
    assert recipe.runs_dir == "runs"


def test_a_recipe_is_frozen(load):
    with pytest.raises(ValueError, match="frozen"):
        load().train.steps = 4


def test_the_resolved_recipe_loads_back_equal_from_elsewhere(load, tmp_path):
    recipe = load(RECIPE, "train.learning_rate=1e-5", "train.lora=null", "tasks.arguments={n: 3, é: [a, null]}")
    copy = tmp_path / "runs" / "1" / "recipe.yaml"
    copy.parent.mkdir(parents=True)
    copy.write_text(recipe.to_yaml())
    assert load_recipe(copy).model_dump() == recipe.model_dump()


def test_overrides(load):
    recipe = load(
        RECIPE,
        "train.steps=5",
        "train.learning_rate=1e-3",
        "warm_start.steps=2",
        "reward.weights.correct=0.5",
        "agent.outcomes.timeout=score",
        "sampling={max_tokens: 7}",
        "train.objective.tis_cap=",
        "tracking.wandb.mode=offline",
        "evaluate.success=correct",
    )
    assert (recipe.train.steps, recipe.train.learning_rate, recipe.warm_start.steps) == (5, 0.001, 2)
    assert recipe.reward.weights == {"correct": 0.5}
    assert recipe.agent.outcomes.timeout == "score"
    assert recipe.sampling.max_tokens == 7
    assert recipe.train.objective.tis_cap is None
    assert recipe.tracking.wandb.mode == "offline"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stps=3", "train.stps: unknown field (did you mean 'steps'?)"),
        ("trian.steps=3", "trian: unknown field (did you mean 'train'?)"),
        ("train.steps=x", "train.steps: should be a valid integer, not 'x'"),
        ("train.steps", "write overrides as section.field=value"),
        (".steps=3", "write overrides as section.field=value"),
        ("name.x=3", "name: is not a section, so it has no 'x'"),
        ("train.steps=[", "train.steps: not a YAML value: "),
        ("train=3", "train: must be a section with fields of its own, not 3"),
        ("agent.function=user/code.py:slove", "agent.function: "),
    ],
)
def test_a_wrong_override_is_named(problems, override, message):
    (problem,) = problems(RECIPE, override)
    assert problem.startswith(f"override {override!r}: {message}")


def test_every_problem_is_told_at_once_with_its_place(problems):
    text = """\
name: "bad name"
seed: 1
seed: yes
model:
  name: x
  dtpye: float32
  dtype: bfloat
agent:
  function: user/code.py:slove
  timeout_s: .inf
  outcomes: {timeout: drp}
tasks:
  function: user/cod.py:solve
reward: 3
train:
  credit: eqal
  samples_per_task: 1
  objective: {name: gpro}
server: {kv_tokens: 3}
trian: {}
"""
    assert sorted(problems(text), key=lambda line: (int(line.split(":")[1]), line)) == [
        "recipe.yaml:1: name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$', not 'bad name'",
        "recipe.yaml:3: seed: given twice, first in line 2",
        "recipe.yaml:3: seed: should be a valid integer, not True",
        "recipe.yaml:6: model.dtpye: unknown field (did you mean 'dtype'?)",
        "recipe.yaml:7: model.dtype: must be one of float32, bfloat16, not 'bfloat' (did you mean 'bfloat16'?)",
        "recipe.yaml:9: agent.function: user/code.py defines no 'slove' at its top level (did you mean 'solve'?)",
        "recipe.yaml:10: agent.timeout_s: should be a finite number, not inf",
        "recipe.yaml:11: agent.outcomes.timeout: must be one of score, retry, drop, not 'drp' (did you mean 'drop'?)",
        "recipe.yaml:13: tasks.function: there is no file user/cod.py (did you mean 'code.py'?)",
        "recipe.yaml:14: reward: must be a section with fields of its own, not 3",
        "recipe.yaml:15: train.steps: is missing and has no default",
        "recipe.yaml:16: train.credit: there is no rule 'eqal'; choose from equal (did you mean 'equal'?)",
        "recipe.yaml:17: train.samples_per_task: should be greater than or equal to 2, not 1",
        "recipe.yaml:18: train.objective.name: must be one of grpo, not 'gpro' (did you mean 'grpo'?)",
        "recipe.yaml:19: server: kv_tokens (3) must be at least page_size (16)",
        "recipe.yaml:20: trian: unknown field (did you mean 'train'?)",
    ]


def test_files_that_are_no_recipes(problems, tmp_path):
    assert problems("a: [1\nb: 2\n")[0].startswith("recipe.yaml:2: not YAML: ")
    assert problems("")[0].startswith("recipe.yaml:1: a recipe is a mapping of sections")
    assert problems("- 1")[0].startswith("recipe.yaml:1: a recipe is a mapping of sections")
    assert problems("a: !!python/object:os.system {}")[0].startswith("recipe.yaml:1: not YAML: could not determine")
    assert "recipe.yaml:1: 3: keys should be strings, not 3" in "\n".join(problems("3: 4"))
    with pytest.raises(RecipeError, match=r"nowhere.yaml: No such file"):
        load_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


def test_anchors_and_merges_keep_their_lines(load, problems):
    text = RECIPE + "publish: &empty {}\nserver:\n  <<: *empty\n  kv_tokens: 32\n"
    assert load(text).server.kv_tokens == 32
    assert problems(text.replace("32", "x")) == ["recipe.yaml:14: server.kv_tokens: should be a valid integer, not 'x'"]


@pytest.mark.parametrize("name", ["solve", "later", "Agent", "constant", "conditional", "fallback", "path", "j"])
def test_functions_are_found_without_running_the_file(load, tmp_path, name):
    recipe = load(RECIPE, f"agent.function=user/code.py:{name}")
    assert recipe.agent.function == f"{tmp_path}/user/code.py:{name}"
    assert recipe.resolve_function(recipe.agent.function) == (tmp_path / "user" / "code.py", name)
    assert recipe.resolve_function(f"user/code.py:{name}") == (tmp_path / "user" / "code.py", name)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("user/code.py", "must be written as path/to/file.py:function, not 'user/code.py'"),
        ("user/code.py:", "must be written as"),
        ("nowhere/code.py:solve", "there is no file nowhere/code.py"),
        ("user/code.py:json", "user/code.py defines no 'json' at its top level"),
        ("user/broken.py:solve", "user/broken.py is not valid Python: line 2: "),
    ],
)
def test_functions_that_are_not_there(load, tmp_path, reference, message):
    recipe = load()
    (tmp_path / "user" / "broken.py").write_text("x = 1\ndef solve(:\n")
    with pytest.raises(RecipeError) as caught:
        recipe.resolve_function(reference)
    assert message in str(caught.value).replace(f"{tmp_path}/", "")


def test_success_must_be_a_reward_that_the_recipe_knows(load):
    with pytest.raises(RecipeError, match=r"evaluate\.success must name the reward"):
        load(RECIPE, "evaluate.success=null")
    with pytest.raises(RecipeError, match="did you mean 'solved'"):
        load(RECIPE, "reward.weights={solved: 1.0}", "evaluate.success=solve")
    assert load(RECIPE, "reward.weights={right: 1.0}", "evaluate.success=null").success_reward == "right"
