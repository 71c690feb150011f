"""Lightning RL: train the LLM agent that you already have by reinforcement learning, without changing it.

This is the face: it hands the public names on when they are first asked for, so that importing it costs an agent's
process next to nothing. It promises that the packages beside it (`tracers`, `trainers`, `rollout_server`) are its own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lightning_rl.siblings import check_siblings

if TYPE_CHECKING:
    from lightning_rl.episode import Call, Episode, EpisodeStart, Outcome, Reward, Sampling, Span, Task
    from lightning_rl.errors import LightningError
    from lightning_rl.recipe import Recipe, load_recipe
    from lightning_rl.store import Store
    from tracers.requests import base_url
    from tracers.rewards import reward
    from tracers.rollout import rollout
    from tracers.spans import span

__version__ = "0.1.0"

__all__ = [
    "Call",
    "Episode",
    "EpisodeStart",
    "LightningError",
    "Outcome",
    "Recipe",
    "Reward",
    "Sampling",
    "Span",
    "Store",
    "Task",
    "__version__",
    "base_url",
    "load_recipe",
    "reward",
    "rollout",
    "span",
]

_HOMES = {
    "lightning_rl.episode": ("Call", "Episode", "EpisodeStart", "Outcome", "Reward", "Sampling", "Span", "Task"),
    "lightning_rl.errors": ("LightningError",),
    "lightning_rl.recipe": ("Recipe", "load_recipe"),
    "lightning_rl.store": ("Store",),
    "tracers.requests": ("base_url",),
    "tracers.rewards": ("reward",),
    "tracers.rollout": ("rollout",),
    "tracers.spans": ("span",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

check_siblings()


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lightning_rl' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
