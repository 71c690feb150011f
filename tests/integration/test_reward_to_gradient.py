"""Every kind of reward, followed from where it was given to the gradient that it makes: through real processes, over real sockets,
into the store, and out of it again."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_rl.episode import EpisodeStart, Sampling, Task
from lightning_rl.recipe import Recipe, load_recipe
from lightning_rl.store import Store
from rollout_server import messages as m
from tests.integration.learning import LORA
from tests.integration.scripted_manager import tokens
from tests.integration.served_web import Served, served
from trainers.learner import row_loss
from trainers.learning import StepData, learn_from
from trainers.policy import load_policy, row_tensors
from trainers.runner.pool import RunnerPool, episode_id
from trainers.serving import running

RECIPE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
SAMPLES = 4
LUCKY = 2
"""The one of four episodes that earns something."""
AGENTS = """
import json, os, urllib.request
import lightning_rl as lrl

SAMPLE = int(os.environ.get("LRL_EPISODE", "0.0.0.0").split(".")[3])
EARNED = float(SAMPLE == 2)

def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request))

def ask():
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
    return post(url, {"model": "policy", "messages": [{"role": "user", "content": "Hello"}]})

def only_asks(task):
    ask()

def returns(task):
    ask()
    return EARNED

def emits_at_a_span(task):
    ask()
    with lrl.span("check", kind="tool"):
        lrl.reward(EARNED, "return")

def sends_by_opentelemetry(task):
    ask()
    attributes = [{"key": "name", "value": {"stringValue": "return"}}, {"key": "value", "value": {"doubleValue": EARNED}}]
    event = {"timeUnixNano": "1500000000", "name": "lrl.reward", "attributes": attributes}
    span = {"traceId": "0" * 31 + "1", "spanId": "0" * 15 + "1", "name": "check", "kind": 1,
            "startTimeUnixNano": "1000000000", "endTimeUnixNano": "2000000000", "events": [event]}
    post(os.environ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"],
         {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]})

def asks_twice_if_lucky(task):
    ask()
    if EARNED:
        ask()

def at_a_call(task, episode):
    return [lrl.Reward(episode_id=episode.id, name="return", value=EARNED, call_id=episode.calls[0].id)]
"""
KINDS = {
    "returned": ("returns", [], "returned", "episode"),
    "emitted at a span": ("emits_at_a_span", [], "", "span"),
    "sent by OpenTelemetry": ("sends_by_opentelemetry", [], "", "span"),
    "reward function at a call": ("only_asks", ["reward.function=FILE:at_a_call"], "function", "call"),
    "automatic": ("asks_twice_if_lucky", ["reward.automatic.turns={limit: 1, value: 1.0}"], "automatic", "call"),
}


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rewards") / "episodes.db"


@pytest.fixture(scope="module")
def web(tiny_llama: Path, store_path: Path) -> Iterator[Served]:
    drawn = itertools.count()

    def script(submit: m.Submit) -> list[m.FromManager]:
        first = next(drawn)
        return [tokens(submit, [100 + first, 200 + first, 300 + first], "stop", index=at) for at in range(submit.n)]

    with served(tiny_llama, store=str(store_path), aliases=["*"]) as running:
        running.manager.script = script
        yield running


def recipe_of(folder: Path, agent: str, overrides: list[str], weight: float) -> Recipe:
    file = folder / "agents.py"
    file.write_text(AGENTS)
    name = "turns" if any("automatic" in override for override in overrides) else "return"
    rewarded = ["reward.function=null", *[override.replace("FILE", str(file)) for override in overrides]]
    weights = [f"reward.weights={{{name}: {weight}}}", f"evaluate.success={name}"]
    return load_recipe(RECIPE, [f"agent.function={file}:{agent}", *rewarded, *weights])


def gradient(recipe: Recipe, data: StepData, model_dir: Path) -> dict[str, torch.Tensor]:
    policy = load_policy(model_dir, "float32", LORA, seed=0)
    for row in data.packed.rows:
        loss, _ = row_loss(policy(**row_tensors(row)), row, recipe.train.objective.settings())
        loss.backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("step", "kind"), list(enumerate(KINDS)), ids=list(KINDS))
def test_a_reward_reaches_the_gradient(
    step: int, kind: str, web: Served, store_path: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    agent, overrides, source, place = KINDS[kind]
    recipe = recipe_of(tmp_path, agent, overrides, weight=1.0)
    starts = [
        EpisodeStart(
            id=episode_id("train", step, "t", sample), task=Task(id="t", input={}), phase="train", step=step,
            sample=sample, group="g", sampling=Sampling(temperature=1.0, seed=sample),
        )
        for sample in range(SAMPLES)
    ]  # fmt: skip
    with Store.open(store_path) as store:
        with RunnerPool(store=store, server_url=web.url, **running(recipe, os.environ)) as pool:
            results = pool.run(starts)
        assert all(result.counted for result in results), next(result.error for result in results if result.error)
        episodes = store.episodes(phase="train", step=step)

    (given,) = [reward for reward in episodes[LUCKY].rewards if reward.value]
    assert (given.value, given.source) == (1.0, source)
    places = {"call": [call.id for call in episodes[LUCKY].calls], "span": [span.id for span in episodes[LUCKY].spans]}
    assert (given.call_id, given.span_id).count(None) == (2 if place == "episode" else 1)
    assert place == "episode" or (given.call_id or given.span_id) in places[place]

    data = learn_from(recipe, episodes)
    data.ledger.check("step")
    for transition in data.transitions:
        lucky = transition.episode_id == episodes[LUCKY].id
        assert transition.ret == float(lucky)
        assert transition.advantage > 0 if lucky else transition.advantage < 0
    assert sum(float(g.abs().sum()) for g in gradient(recipe, data, tiny_llama).values()) > 0

    unweighted = learn_from(recipe_of(tmp_path, agent, overrides, weight=0.0), episodes)
    assert unweighted.packed.rows == [], "the gradient came from this reward and from nothing else"
    assert unweighted.ledger.masked == {"no_signal": unweighted.ledger.sampled}
