"""The schema of `recipe.yaml`: everything that a run depends on, checked whole before anything starts.

A recipe is frozen and complete: every field has a value once it is loaded, and functions are named by absolute paths,
so that it can be written to the run directory and read again from there. `docs/recipe.md` is generated from this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from lightning_rl.credit import RULES
from lightning_rl.errors import RecipeError
from lightning_rl.recipe_file import read_recipe_file
from lightning_rl.recipe_functions import did_you_mean, resolve_reference
from lightning_rl.recipe_problems import describe


def _reference(value: str, info: ValidationInfo) -> str:
    path, name = resolve_reference(value, info.context["folder"] if info.context else Path())
    return f"{path}:{name}"


def _credit(value: str) -> str:
    if value not in RULES:
        raise ValueError(f"there is no rule {value!r}; choose from {', '.join(RULES)}{did_you_mean(value, [*RULES])}")
    return value


FunctionName = Annotated[str, AfterValidator(_reference)]
"""`file.py:function`, relative to the recipe."""
CreditName = Annotated[str, AfterValidator(_credit)]
Count = Annotated[int, Field(ge=1)]
Policy = Literal["score", "retry", "drop"]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Model(Section):
    """The policy's starting point."""

    name: Annotated[str, Field(min_length=1)]
    """A built-in model (`smollm2-135m`, `smollm2-moe`, `tiny-llama`, `tiny-moe`), a local checkpoint directory, or a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass, in the server and in the trainer."""
    adapters: dict[str, str] = {}
    """Frozen LoRA adapters that are served beside the policy, for `agent.routes`: directories by name, relative to the recipe."""


class Outcomes(Section):
    """What becomes of an episode, by how it ended. `score`: it counts, with its rewards. `retry`: the same task and
    sample are attempted again, up to `agent.max_attempts`, and then dropped. `drop`: it is recorded, not trained on."""

    completed: Policy = "score"
    """The agent returned."""
    agent_error: Policy = "drop"
    """The agent raised an exception, or returned something that is not JSON."""
    timeout: Policy = "drop"
    """The agent was still running after `agent.timeout_s`."""
    infrastructure_error: Policy = "retry"
    """The server failed, or the agent's process died."""
    cancelled: Policy = "retry"
    """The run was interrupted."""


class Route(Section):
    """Who answers some of the agent's calls."""

    match: Annotated[str, Field(min_length=1)]
    """Glob (`*`, `?`, `[…]`) for the name of the agent, of the graph's node, or of the model that is asked for. The first route
    that fits counts; what fits none goes to the policy."""
    to: Annotated[str, Field(min_length=1)]
    """`policy`, the name of one of `model.adapters`, or the name of one of `upstreams`."""


class Upstream(Section):
    """A provider elsewhere that speaks the same API."""

    base_url: Annotated[str, Field(pattern=r"^https?://")]
    """As its SDK takes it: `https://api.openai.com/v1`; for Anthropic's without `/v1`."""
    api_key_env: str | None = None
    """Environment variable that holds its key, which is never stored; null sends none."""
    model: str | None = None
    """The model to ask it for; null passes the agent's own word on."""


class Agent(Section):
    """The agent that is trained, unchanged."""

    function: FunctionName | None = None
    """The agent, as `file.py:function`, relative to the recipe, or `package.module:function`. It is called with a task's fields and
    finds the policy at `OPENAI_BASE_URL`; what it returns is the episode's answer."""
    command: str | None = None
    """An agent of any language instead, as `node agent.js`: started in the recipe's folder, without a shell. It gets the task as a
    line of JSON on its standard input, and in the file that `LRL_TASK` names; it writes JSON lines, `{"answer": …}` and `{"reward": 0.5,
    "name": "valid"}`; other lines are its log."""
    learns: list[str] = ["*"]
    """Globs for the name of the agent, of the graph's node, or of the model asked for: calls that fit one are trained on."""
    routes: list[Route] = []
    """Calls that another adapter or provider answers. They are recorded and never trained on."""
    heartbeat_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds without a sign of life from an episode's process, after which it is killed (stopped, or stuck in native code)."""
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds after which an episode is ended with the outcome `timeout`."""
    concurrency: Count = 16
    """Episodes that run at the same time, each in a process of its own."""
    max_attempts: Count = 2
    """How often a (task, sample) is attempted where the outcome says `retry`."""
    outcomes: Outcomes = Outcomes()


class Tasks(Section):
    """Where the tasks come from."""

    function: FunctionName
    """Called once as `function(seed=…, **arguments)`; returns a `datasets.Dataset` by split: `train`, `eval` and, for a
    warm start, `warm_start`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the function."""


class Excess(Section):
    """A reward for what goes beyond a limit."""

    limit: Annotated[int, Field(ge=0)]
    """What is still free."""
    value: float
    """The reward of each one beyond it."""


class AutomaticRewards(Section):
    """Intermediate rewards read from an episode's calls and tool spans. null gives none. Each is a reward of this name and value."""

    tool_error: float | None = None
    """At each tool call that failed."""
    tool_success: float | None = None
    """At each tool call that did not fail."""
    valid_arguments: float | None = None
    """At each tool call whose arguments fit the tool's schema, as the request gave it."""
    invalid_arguments: float | None = None
    """At each tool call whose arguments do not, or that names no tool."""
    repeated_call: float | None = None
    """At each tool call with the name and arguments of an earlier one."""
    turns: Excess | None = None
    """At each call of the policy beyond so many in the episode."""
    tokens: Excess | None = None
    """At each call, for every token that it sampled beyond so many in the episode."""


class Rewards(Section):
    """How an episode is judged."""

    function: FunctionName | None = None
    """Called as `function(task, episode)` when an episode has ended; returns numbers by name, or a list of rewards, at the episode,
    at calls or at spans. null: the agent returns its reward, a number (named `return`) or numbers by name, or emits it."""
    automatic: AutomaticRewards = AutomaticRewards()
    weights: dict[str, float] = {}
    """What each reward counts in the return, by its name; 0 only records it. If any weight is given, each reward's name
    must have one; automatic rewards count as they are unless they are named. Without weights, every reward counts as it is."""


class SamplingSection(Section):
    """How the policy is sampled in training. Evaluation is greedy."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Imposed on every call, whatever the agent asks for."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Imposed on every call. Below 1, log-probs are those of the distribution that was sampled from."""
    max_tokens: Count = 256
    """Bound on the sampled tokens of a call; an agent may ask for fewer."""


class WarmStart(Section):
    """Supervised fine-tuning on the split `warm_start`, before the reinforcement learning."""

    steps: Count
    """Optimiser steps."""
    batch_size: Count = 16
    """Demonstrations a step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak of the learning rate."""


class LoraConfig(Section):
    """A low-rank adapter on the linear layers; the rest of the model is frozen."""

    rank: Count = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""


class Objective(Section):
    """What is minimised."""

    name: Literal["grpo"] = "grpo"
    """`grpo`: group-relative advantages and a clipped probability ratio."""
    normalise: Literal["std", "none"] = "std"
    """What advantages are divided by: the standard deviation of the group's returns (GRPO), or nothing (Dr. GRPO)."""
    aggregation: Literal["token", "sequence", "rollout"] = "token"
    """What weighs the same in the step's mean: each token, each call, or each rollout."""
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: Annotated[float, Field(ge=0)] = 0.28
    """The ratio is clipped above 1 + clip_high."""
    tis_cap: Annotated[float, Field(gt=0)] | None = 2.0
    """Cap of the importance weight that corrects for the difference between trainer and server (truncated importance
    sampling); null turns the correction off."""


class Train(Section):
    """The reinforcement learning."""

    steps: Count
    """Optimiser steps. In each, new episodes are run, trained on once, and the new policy is published."""
    tasks_per_step: Count = 8
    """Tasks a step."""
    samples_per_task: Annotated[int, Field(ge=2)] = 8
    """Episodes of each task: the group that a return is compared within."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """AdamW's learning rate, at its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """How the learning rate goes on after the warm-up: as it is, or linearly towards 0 at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate rises linearly to its peak."""
    lora: LoraConfig | None = LoraConfig()
    """null trains all weights."""
    credit: CreditName = "equal"
    """How an episode's rewards are assigned to its calls. `equal`: each call gets the whole return."""
    objective: Objective = Objective()
    world_size: Count = 1
    """Trainer processes."""
    max_row_tokens: Count = 4096
    """Tokens that are computed at once in a micro-batch. What a call sampled beyond it is not trained on."""
    gradient_clipping: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    checkpoint_every: Count = 1
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """How many of the latest checkpoints are kept."""


class Evaluate(Section):
    """Greedy evaluation on the split `eval`: of the base model, after the warm start, and at the end."""

    tasks: Count = 64
    """Number of tasks."""
    every: Count | None = None
    """Evaluate every so many steps as well; null does not."""
    success: str | None = None
    """Name of the reward that says whether a task was solved. null: the first in `reward.weights`."""


class Publish(Section):
    """Handing a new policy to the server, and checking that both sides agree on it."""

    max_logprob_gap: Annotated[float, Field(gt=0)] | None = None
    """Largest mean absolute difference between trainer's and server's log-probs of the same tokens; the run stops above
    it. null: 0.001 for float32, 0.15 for bfloat16."""


class Server(Section):
    """The rollout server."""

    kv_tokens: Count = 65536
    """Tokens whose keys and values fit in the cache."""
    max_batch: Count = 64
    """Sequences that decode at once."""
    page_size: Count = 16
    """Tokens in a page of the cache."""
    threads: Count | None = None
    """CPU threads of the worker; null leaves the choice to torch."""
    batch_invariant: bool = False
    """Same seed, same tokens and log-probs bit for bit, whatever else is in the batch. Slower; it makes a resumed run
    equal an uninterrupted one in every bit."""

    @model_validator(mode="after")
    def _cache_holds_a_page(self) -> Self:
        if self.kv_tokens < self.page_size:
            raise ValueError(f"kv_tokens ({self.kv_tokens}) must be at least page_size ({self.page_size})")
        return self


class Wandb(Section):
    """Weights & Biases."""

    project: Annotated[str, Field(min_length=1)] = "lightning-rl"
    """Project that the run is logged to."""
    mode: Literal["auto", "offline", "online", "disabled"] = "auto"
    """`auto`: online if a key is configured, else offline. It never asks."""


class Otlp(Section):
    """Episodes as OpenTelemetry traces, sent by OTLP/HTTP when they have ended."""

    endpoint: Annotated[str, Field(pattern=r"^https?://")]
    """Base URL of the collector, as in OTEL_EXPORTER_OTLP_ENDPOINT: `/v1/traces` is appended."""
    headers_env: str | None = None
    """Environment variable with headers, as OTEL_EXPORTER_OTLP_HEADERS has them: `key=value,key=value`."""
    content: bool = False
    """Whether prompts, replies and tool results are sent, too."""


class Recording(Section):
    """What is stored of the agent's calls."""

    redact: list[str] = []
    """Regular expressions for secrets: what fits is taken out of every text before it is stored. A call whose tokens held one loses
    these tokens, and is not trained on."""
    store: str | None = None
    """SQLAlchemy URL of a PostgreSQL database; null keeps episodes in the run's own SQLite file. The password may stand in an
    environment variable: `postgresql://user:${NAME}@host/db`."""


class Tracking(Section):
    """Where metrics go besides the run directory."""

    wandb: Wandb | None = None
    """null does not use W&B."""
    otlp: Otlp | None = None
    """null does not send traces."""


class Recipe(Section):
    """A run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run's folder: letters, digits, `.`, `_` and `-`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of everything random: tasks, their order, sampling, initial adapters."""
    model: Model
    agent: Agent
    tasks: Tasks
    reward: Rewards
    sampling: SamplingSection = SamplingSection()
    warm_start: WarmStart | None = None
    """null starts from the model as it is."""
    train: Train
    evaluate: Evaluate = Evaluate()
    publish: Publish = Publish()
    server: Server = Server()
    upstreams: dict[str, Upstream] = {}
    """Providers that `agent.routes` may name."""
    recording: Recording = Recording()
    tracking: Tracking = Tracking()
    runs_dir: Annotated[str, Field(min_length=1)] = "runs"
    """Folder of the run directories, relative to where `lrl` is started."""

    _source: Path = PrivateAttr()

    @model_validator(mode="after")
    def _success_is_a_reward(self) -> Self:
        weights, success = self.reward.weights, self.evaluate.success
        if success is None and not weights:
            raise ValueError(
                "evaluate.success must name the reward that says a task was solved, or reward.weights be given"
            )
        if success is not None and weights and success not in weights:
            raise ValueError(
                f"evaluate.success: {success!r} is not in reward.weights{did_you_mean(success, [*weights])}"
            )
        return self

    @property
    def success_reward(self) -> str:
        """Name of the reward that says whether a task was solved."""
        return self.evaluate.success or next(iter(self.reward.weights))

    @property
    def source(self) -> Path:
        """The file that the recipe was loaded from."""
        return self._source

    def resolve_function(self, reference: str) -> tuple[Path, str]:
        """`file.py:function`, relative to the recipe, as path and name; RecipeError if there is none."""
        try:
            return resolve_reference(reference, self.source.parent)
        except ValueError as error:
            raise RecipeError(f"{self.source}: {error}") from error

    def to_yaml(self) -> str:
        """The whole recipe, defaults included; loads back as an equal one from any folder."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe, with `section.field=value` put on top.

    Raises:
        RecipeError: with one line for each problem: `file:line: field: what is wrong (did you mean 'x'?)`.
    """
    file = read_recipe_file(path)
    file.override(overrides)
    problems = list(file.problems)
    try:
        recipe = Recipe.model_validate(file.values, context={"folder": path.resolve().parent})
    except ValidationError as error:
        problems += describe(error, file, Recipe)
    if problems:
        raise RecipeError("\n".join(map(str, problems)), hint="docs/recipe.md lists every field")
    recipe._source = path.resolve()
    return recipe
