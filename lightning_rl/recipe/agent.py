"""The sections of a recipe about the agent: what it is, what it starts from, who answers it, its tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from lightning_rl.recipe.command import check_command
from lightning_rl.recipe.fields import (
    AdapterFolder,
    AgentFunctionName,
    Count,
    FieldError,
    Folder,
    Glob,
    HttpUrl,
    Policy,
    Section,
    VariableName,
    agent_is_needed,
)


class Model(Section):
    """The policy's starting point."""

    name: Annotated[str, Field(min_length=1)]
    """A built-in model (`smollm2-135m`, `smollm2-moe`, `tiny-llama`, `tiny-moe`), a local checkpoint directory, or a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass, in the server and in the trainer."""
    adapters: dict[str, AdapterFolder] = {}
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

    match: Glob
    """Glob (`*`, `?`, `[…]`) for the name of the agent, of the graph's node, or of the model that is asked for. The first route
    that fits counts; what fits none goes to the policy."""
    to: Annotated[str, Field(min_length=1)]
    """`policy`, the name of one of `model.adapters`, or the name of one of `upstreams`."""


class Upstream(Section):
    """A provider elsewhere that speaks the same API."""

    base_url: HttpUrl
    """As its SDK takes it: `https://api.openai.com/v1`; for Anthropic's without `/v1`."""
    api_key_env: VariableName | None = None
    """Environment variable that holds its key, which is never stored; null sends none."""
    model: str | None = None
    """The model to ask it for; null passes the agent's own word on."""


class Agent(Section):
    """The agent that is trained, unchanged."""

    function: AgentFunctionName | None = None
    """The agent, as `file.py:function`, relative to the recipe, or `package.module:function`. It is called with a task's fields and
    finds the policy at `OPENAI_BASE_URL`; what it returns is the episode's answer."""
    command: str | None = None
    """An agent of any language instead, as `node agent.js`: started in `folder`, without a shell. It gets the task as a
    line of JSON on its standard input, and in the file that `LRL_TASK` names; it writes JSON lines, `{"answer": …}` and
    `{"reward": 0.5, "name": "valid"}`; other lines are its log."""
    folder: Folder = "."
    """Folder that the command is started in, relative to the recipe."""
    learns: Annotated[list[Glob], Field(min_length=1)] = ["*"]
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

    @model_validator(mode="after")
    def _one_agent(self, info: ValidationInfo) -> Self:
        if (self.function is None) == (self.command is None):
            given = "neither" if self.function is None else "both"
            raise ValueError(f"give either function or command, not {given}: one of them is the agent")
        if self.command is not None and agent_is_needed(info):
            try:
                check_command(self.command, Path(self.folder))
            except ValueError as error:
                raise FieldError(("command",), str(error)) from error
        return self


class Tasks(Section):
    """Where the tasks come from."""

    function: AgentFunctionName
    """Called once as `function(seed=…, **arguments)`; returns a `datasets.Dataset` by split: `train`, `eval` and, for a
    warm start, `warm_start`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the function."""
