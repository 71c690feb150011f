"""What a recipe says about who answers which agent and what is kept of it, as the server and the runners take it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_rl.episode import Outcome
from lightning_rl.recipe import Recipe
from lightning_rl.recipe.command import check_command
from lightning_rl.redact import Redactor, environment_keys, header_keys, store_passwords
from rollout_server.api.model_names import AgentRoute
from rollout_server.api.upstreams.provider import Provider, key_from
from trainers.runner.words import Command


def providers(recipe: Recipe, environment: Mapping[str, str]) -> dict[str, Provider]:
    """The upstreams that a route leads to, with their keys. Raises RecipeError for a key that is not there."""
    led_to = {route.to for route in recipe.agent.routes}
    return {
        name: Provider(
            base_url=upstream.base_url,
            api_key=key_from(environment, upstream.api_key_env, f"upstreams.{name}") if upstream.api_key_env else None,
            model=upstream.model,
        )
        for name, upstream in recipe.upstreams.items()
        if name in led_to
    }


def answering(recipe: Recipe, environment: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of `RolloutServer`. Raises RecipeError before anything is loaded or started."""
    return {
        "adapters": recipe.model.adapters,
        "routes": [AgentRoute(match=route.match, to=route.to) for route in recipe.agent.routes],
        "upstreams": providers(recipe, environment),
        "redact": recipe.recording.redact,
        "known_keys": collector_keys(recipe, environment),
    }


def running(recipe: Recipe, environment: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of `RunnerPool`: the recipe's agent, and what its episodes earn. Raises RecipeError."""
    agent, reward, rules = recipe.agent, recipe.reward, recipe.reward.automatic.rules()
    words = check_command(agent.command, Path(agent.folder)) if agent.command else []
    return {
        "agent_function": recipe.resolve_function(agent.function) if agent.function else None,
        "agent_command": Command(words=words, folder=agent.folder) if words else None,
        "reward_function": recipe.resolve_function(reward.function) if reward.function else None,
        "automatic": rules,
        "adapters": recipe.model.adapters,
        "must_reward": not rules.given,
        "reward_names": recipe.reward_names,
        "concurrency": agent.concurrency,
        "timeout_s": agent.timeout_s,
        "heartbeat_s": agent.heartbeat_s,
        "max_attempts": agent.max_attempts,
        "outcome_policy": {outcome: getattr(agent.outcomes, outcome.value) for outcome in Outcome},
        "redactor": redactor(recipe, environment),
    }


def redactor(recipe: Recipe, environment: Mapping[str, str]) -> Redactor:
    """For what the runners store: the recipe's patterns, and the keys that an agent may know."""
    keys = (provider.api_key for provider in providers(recipe, environment).values())
    passwords = store_passwords(recipe.recording.store, environment)
    known = [*keys, *collector_keys(recipe, environment), *passwords, *environment_keys(environment)]
    return Redactor(recipe.recording.redact, known)


def collector_keys(recipe: Recipe, environment: Mapping[str, str]) -> list[str]:
    """What the headers of `tracking.otlp` hold."""
    otlp = recipe.tracking.otlp
    return header_keys(environment.get(otlp.headers_env, "")) if otlp is not None and otlp.headers_env else []
