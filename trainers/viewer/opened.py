"""A run, or a database of episodes, that the viewer has open: for reading only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_rl.recipe import Recipe
    from lightning_rl.store import Store
    from trainers.run_directory import RunDirectory


@dataclass(frozen=True)
class OpenRun:
    key: str
    """Names it in addresses."""
    store: Store
    directory: RunDirectory | None
    """None for a database or a trace file, as `recipe`."""
    recipe: Recipe | None
    recipe_note: str = ""
    """Why it has none, where there is one that cannot be read."""
