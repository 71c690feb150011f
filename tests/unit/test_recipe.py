import re
from pathlib import Path

import pytest
import yaml
from msgspec import structs

from lightning_rl.algorithms.settings import OBJECTIVES
from lightning_rl.credit import RULES
from lightning_rl.errors import RecipeError
from lightning_rl.recipe import load_recipe
from lightning_rl.recipe.functions import resolve_reference
from lightning_rl.recipe.reference import reference

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
        elif isinstance(loaded[key], dict):  # a section written as its first field
            assert next(iter(loaded[key].values())) == value
        else:
            assert loaded[key] == value


def test_the_reference_is_current():
    assert (ROOT / "docs" / "recipe.md").read_text() == reference(), (
        "run python -m lightning_rl.recipe.reference > docs/recipe.md"
    )


def test_every_field_is_described():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert not [row for row in rows if row.endswith("|  |")]


def test_defaults(load):
    recipe = load()
    assert recipe.warm_start is None
    assert recipe.train.lora.rank == 16
    assert recipe.train.objective.settings().clip_high == 0.28
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
        "train.objective.correction={kind: none}",
        "tracking.wandb.mode=offline",
        "evaluate.success=correct",
    )
    assert (recipe.train.steps, recipe.train.learning_rate, recipe.warm_start.steps) == (5, 0.001, 2)
    assert recipe.reward.weights == {"correct": 0.5}
    assert recipe.agent.outcomes.timeout == "score"
    assert recipe.sampling.max_tokens == 7
    assert recipe.train.objective.settings().correction.kind == "none"
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
    assert problem.startswith(f"override {override.partition('=')[0]}: {message}")


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("{name: reinforce, clip_high: 0.3}", "clip_high: has no effect: reinforce has no ratio that is clipped so"),
        ("{name: rloo, ratio: sequence}", "ratio: has no effect: rloo has no ratio that is clipped so"),
        ("{name: cispo, dual_clip: 3}", "dual_clip: has no effect: cispo has no ratio that is clipped so"),
        ("{name: dppo, correction: {kind: mask}}", "correction: has no effect: with `old: server`"),
        ("{correction: {kind: icepop, high: 0.3}}", "correction.low: no w is from 0.5 to 0.3"),
        ("{kl: {coefficient: 0.1, estimator: k1}}", "kl.estimator: k1 in the loss has no gradient on average"),
    ],
)
def test_a_part_of_an_objective_that_does_nothing_is_a_problem(problems, objective, message):
    (problem,) = problems(RECIPE, f"train.objective={objective}")
    assert f"train.objective.{message}" in problem


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
  samples_per_task: 0
  objective: {name: grppo}
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
        "recipe.yaml:16: train.credit.rule: there is no rule 'eqal'; choose from "
        f"{', '.join(RULES)} (did you mean 'equal'?)",
        "recipe.yaml:17: train.samples_per_task: should be greater than or equal to 1, not 0",
        "recipe.yaml:18: train.objective.name: there is no objective 'grppo'; choose from "
        f"{', '.join(OBJECTIVES)} (did you mean 'grpo'?)",
        "recipe.yaml:19: server: kv_tokens (3) must be at least page_size (16)",
        "recipe.yaml:20: trian: unknown field (did you mean 'train'?)",
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("agent: {routes: [{match: a, to: polcy}]}", "1: agent.routes.0.to: 'polcy' is neither 'policy' nor in model"),
        ("agent: {learns: ['']}", "1: agent.learns.0: must not be empty"),
        ("agent: {learns: ['[ab]*', '[a']}", "1: agent.learns.1: '[a' has a [ without its ]"),
        ("upstreams: {policy: {base_url: 'https://x'}}", "1: upstreams.policy: 'policy' names two of"),
        ("upstreams: {x: {base_url: 'https://'}}", "1: upstreams.x.base_url: it must be a URL with a host"),
        ("upstreams: {x: {base_url: 'https://a:SECRET@x/v1'}}", "1: upstreams.x.base_url: a user or password must not"),
        ("upstreams: {x: {base_url: 'https://x', api_key_env: sk-SECRET}}", "1: upstreams.x.api_key_env: it must be the name"),
        ("tracking: {otlp: {endpoint: 'http://SECRET@x'}}", "1: tracking.otlp.endpoint: a user or password must not"),
        ("tracking: {otlp: {endpoint: 'http://x', headers_env: 'k=SECRET'}}", "1: tracking.otlp.headers_env: it must be"),
        ("evaluate: {success: retrun}\nreward: {weights: {return: 1}}", "1: evaluate.success: 'retrun' is not in"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_at_its_line_without_secrets(problems, more, message):
    base = yaml.safe_load(RECIPE)
    sections = yaml.safe_load(more)
    top = more.splitlines()
    if "agent" in sections:
        top = [f"{top[0][:-1]}, function: user/code.py:solve}}"]
    for name in sections:
        base.pop(name, None)
    (problem,) = problems("\n".join(top) + "\n" + yaml.safe_dump(base))
    assert problem.startswith(f"recipe.yaml:{message}")
    assert "SECRET" not in problem


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("{objective: ppo, restricted: mask}", ""),
        ("{objective: {name: ppo, baseline: none}}", "train.objective.baseline: has no effect: the advantages of token_gae"),
        ("{objective: {name: grpo, normalise: std}, credit: turn_gae}", "train.objective.normalise: has no effect"),
        ("{objective: {name: grpo, baseline: none}, credit: tree}", "train.objective.baseline: has no effect: tree"),
        ("{objective: reinforce++, credit: token_gae}", "train.objective: token_reward is not seen by token_gae"),
        ("{objective: {name: grpo, correction: {kind: none, high: 2.0}}}", "train.objective.correction.high: has no effect"),
        ("{objective: {name: reinforce++, kl: {coefficient: 0.1, place: loss}}}", "train.objective.kl.estimator: k1 in the loss"),
        ("{critic: {hidden: 8}}", "train.critic: has no effect: equal reads no critic"),
        ("{objective: {name: grpo, tis_cap: 2.0, correction: {kind: none}}}", "train.objective.tis_cap: is the older name of"),
    ],
)  # fmt: skip
def test_what_has_no_effect_in_training_is_said(problems, train, message):
    base = yaml.safe_load(RECIPE)
    base["train"] |= yaml.safe_load(train)
    found = problems(yaml.safe_dump(base)) if message else []
    assert [line.partition(": ")[2][: len(message)] for line in found] == ([message] if message else [])
    if not message:
        base["sampling"] = {"top_p": 0.9}
        assert "train.restricted: mask leaves every call out" in problems(yaml.safe_dump(base))[0]


def test_what_is_left_out_of_a_penalty_is_the_objectives_own(load):
    def of(objective):
        return load(RECIPE, f"train.objective={objective}").train.objective.settings()

    own = of("reinforce++").kl
    assert of("{name: reinforce++, kl: {coefficient: 0.02}}").kl == structs.replace(own, coefficient=0.02)
    assert of("{name: grpo, kl: {coefficient: 0.02}}").kl.place == "loss"
    assert of("{name: dapo, overlong: {penalty: 0.5}}").overlong.buffer == of("dapo").overlong.buffer
    assert of("{name: dppo, old: trainer}").correction == of("grpo").correction
    assert of("dppo").correction.kind == "none"


def test_runs_of_before_corrections_had_a_name_load(load):
    then = "{name: grpo, normalise: std, aggregation: token, clip_low: 0.2, clip_high: 0.28, tis_cap: %s}"
    capped, plain = (load(RECIPE, f"train.objective={then % cap}").train.objective for cap in ("3.0", "null"))
    assert (capped.correction.kind, capped.correction.high, capped.aggregation) == ("truncate", 3.0, "token")
    assert plain.correction.kind == "none"
    text = RECIPE.replace("train:", f"train:\n  objective: {then % 3.0}")
    assert load(text, "train.objective.correction.high=4.0").train.objective.correction.high == 4.0
    text = RECIPE.replace(
        "train:", f"train:\n  objective: {then % 3.0}".replace("tis_cap", "correction: null, tis_cap")
    )
    assert load(text).train.objective.correction.high == 3.0


def test_overrides_reach_into_lists_and_never_show_their_values(load, problems):
    text = RECIPE.replace("agent:\n", "agent:\n  routes:\n  - {match: a, to: policy}\n  - {match: b, to: policy}\n")
    recipe = load(text, "agent.routes.1.match=c", "agent.learns=[x]", "agent.learns.0=y")
    assert [route.match for route in recipe.agent.routes] == ["a", "c"]
    assert recipe.agent.learns == ["y"]
    expected = ["override agent.routes.1.to: agent.routes.1.to: 'polcy' is neither 'policy' nor in model.adapters nor in "
                "upstreams (did you mean 'policy'?)"]  # fmt: skip
    assert problems(text, "agent.routes.1.to=polcy") == expected
    assert problems(text, "agent.routes.2.to=policy") == [
        "override agent.routes.2.to: agent.routes: has 2 entries, so it has no '2'"
    ]
    for override in ("recording.store=postgresql://u:SECRET@h/db", "upstreams.x={base_url: 'https://SECRET@x'}"):
        assert "SECRET" not in "".join(problems(text, override))


def test_where_episodes_are_recorded_the_agent_need_not_be_there(load):
    gone = ["agent.function=null", "agent.command=nowhere/agent", "agent.folder=nowhere", "tasks.function=gone.py:tasks",
            "model.adapters.critic=nowhere"]  # fmt: skip
    with pytest.raises(RecipeError):
        load(RECIPE, *gone)
    recipe = load_recipe(load(RECIPE).source, gone, recorded=True)
    assert (recipe.agent.command, recipe.tasks.function) == ("nowhere/agent", "gone.py:tasks")
    with pytest.raises(RecipeError, match=r"reward\.function: there is no file"):
        load_recipe(recipe.source, [*gone, "reward.function=gone.py:score"], recorded=True)


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
    assert recipe.resolve_function(recipe.agent.function) == (tmp_path / "user" / "code.py", name, "")
    assert recipe.resolve_function(f"user/code.py:{name}") == (tmp_path / "user" / "code.py", name, "")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("user/code.py", "must be written as path/to/file.py:function or package.module:function, not 'user/code.py'"),
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


def test_functions_in_modules(load, problems, tmp_path):
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import *")
    (package / "inner.py").write_text("def solve(task): ...")
    recipe = load(RECIPE, "agent.function=pack.inner:solve", "reward.function=json.decoder:JSONDecoder")
    assert recipe.agent.function == f"{tmp_path}/pack.inner:solve"
    assert recipe.reward.function == "json.decoder:JSONDecoder", "what is installed is found from anywhere"
    reference = recipe.resolve_function(recipe.agent.function)
    assert (reference.path, reference.name, reference.module) == (package / "inner.py", "solve", "pack.inner")
    assert reference.root == tmp_path
    assert load(RECIPE, "agent.function=pack:solve").resolve_function("pack:solve").root == tmp_path
    (tmp_path / "sub").mkdir()
    assert str(resolve_reference("../pack.inner:solve", tmp_path / "sub")) == recipe.agent.function
    for wrong, said in (
        ("pack.iner:solve", f"there is no module pack.iner installed, nor in {tmp_path} (did you mean 'inner'?)"),
        ("pack.inner:slove", "pack/inner.py defines no 'slove' at its top level (did you mean 'solve'?)"),
        ("msgspec._core:Struct", "msgspec._core is not a Python file"),
        ("user/code:solve", ""),
        ("a-b:solve", "neither a file ending in .py nor the dotted name of a module"),
    ):
        if said:
            (problem,) = problems(RECIPE, f"agent.function={wrong}")
            assert said.replace(f"{tmp_path}", "") in problem.replace(f"{tmp_path}", "")
        else:
            assert load(RECIPE, f"agent.function={wrong}").agent.function == f"{tmp_path}/user/code:solve"


def test_the_agent_is_a_function_or_a_command(load, problems, tmp_path):
    (tmp_path / "user" / "agent.sh").write_text("#!/bin/sh\n")
    command = RECIPE.replace("function: user/code.py:solve\ntasks", "command: sh -c 'echo hello'\ntasks", 1)
    recipe = load(command)
    assert (recipe.agent.command, recipe.agent.folder) == ("sh -c 'echo hello'", str(tmp_path))
    copy = tmp_path / "elsewhere.d" / "recipe.yaml"
    copy.parent.mkdir()
    copy.write_text(recipe.to_yaml())
    assert load_recipe(copy).agent == recipe.agent, "the folder is kept"
    for override, said in (
        ("agent.function=user/code.py:solve", "agent: give either function or command, not both"),
        ("agent.command=", "agent: give either function or command, not neither"),
        ("agent.command=nodee x.js", "there is no program 'nodee' on PATH"),
        ('agent.command="\'"', "cannot be split into words"),
        ("agent.command=' '", "the command is empty"),
        ("agent.command=user/agent.sh", "agent.sh is not executable"),
        ("agent.command=user/none.sh", "there is no program"),
        ("agent.folder=nowhere", "agent.folder: there is no folder nowhere"),
    ):
        (problem,) = problems(command, override)
        assert said in problem


def test_without_a_reward_function_success_is_what_the_agent_returns(load):
    own = RECIPE.replace("reward: {function: user/code.py:solve}", "reward: {}")
    assert load(own, "evaluate.success=").success_reward == "return"
    assert load(own).success_reward == "solved"
    assert load(own, "evaluate.success=", "reward.weights.good=2").success_reward == "good"


def test_success_must_be_a_reward_that_the_recipe_knows(load):
    with pytest.raises(RecipeError, match=r"evaluate\.success: must name the reward"):
        load(RECIPE, "evaluate.success=null")
    with pytest.raises(RecipeError, match="did you mean 'solved'"):
        load(RECIPE, "reward.weights={solved: 1.0}", "evaluate.success=solve")
    assert load(RECIPE, "reward.weights={right: 1.0}", "evaluate.success=null").success_reward == "right"


def test_a_reward_function_alone_needs_no_section(load, problems):
    short = RECIPE.replace("{function: user/code.py:solve}", "user/code.py:solve")
    assert load(short, "reward.weights={solved: 2.0}").reward == load(RECIPE, "reward.weights={solved: 2.0}").reward
    (line,) = problems(short.replace("reward: user/code.py:solve", "reward: user/code.py:slove"))
    assert line.startswith("recipe.yaml:7: reward.function: ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.credit={rule: gigpo, arguments: {discount: .nan}}"], "discount: must be a finite number, not nan"),
        (["train.credit={rule: gigpo, arguments: {weight: .inf}}"], "weight: must be a finite number, not inf"),
        (["train.credit={rule: gigpo, arguments: {discount: -3}}"], "discount: must be from 0 to 1, not -3"),
        (["train.credit={rule: token_gae, arguments: {lam: 2.0}}"], "lam: must be from 0 to 1, not 2.0"),
        (["train.samples_per_task=1"], "grpo, baseline group_mean, compares the episodes of a task"),
        (
            ["train.samples_per_task=1", "train.objective={name: ppo, dynamic_sampling: 1}"],
            "dynamic_sampling looks for tasks",
        ),
        (
            [
                "train.credit=agents/smoke_reward.py:score",
                "train.critic={}",
                "train.objective.kl={coefficient: 1.0, place: token_reward}",
            ],
            "token_reward is not seen by",
        ),
    ],
)
def test_what_can_only_fail_is_found_in_the_recipe(overrides, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(ROOT / "recipes" / "smoke.yaml", overrides)


@pytest.mark.parametrize("more", [["train.objective=reinforce"], ["train.objective=reinforce++"],
                                  ["train.objective=ppo"], ["train.credit=tree"]])  # fmt: skip
def test_an_episode_of_a_task_may_be_alone_where_nothing_is_compared(more):
    assert load_recipe(ROOT / "recipes" / "smoke.yaml", ["train.samples_per_task=1", *more]).train.samples_per_task == 1
