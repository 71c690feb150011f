from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

from tests.postgres import postgres as postgres

# In CI the same examples every time: what fails there fails for everybody. Elsewhere new ones are looked for. How long one
# takes is never a failure.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("elsewhere", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "elsewhere")

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GOMP_SPINCOUNT"] = "10000"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    from rollout_server.models.catalog import resolve_model

    return resolve_model("tiny-llama")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    from rollout_server.models.catalog import resolve_model

    return resolve_model("smollm2-135m")


@pytest.fixture(params=["sqlite", "postgres"])
def store_place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where an episode store can be made, once of each kind."""
    if request.param == "sqlite":
        return str(tmp_path / "episodes.db")
    return request.getfixturevalue("postgres").url()
