"""Processes of a rollout killed at random, also the database's: nothing that was finished is lost, nothing counts twice.

A few kills for every day; `python -m tests.chaos --kills 50` is the whole of it.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos import Chaos
from tests.postgres import PostgresServer

pytestmark = pytest.mark.timeout(600)


def test_whatever_is_killed_no_finished_episode_is_lost_and_none_counts_twice(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, str(tmp_path / "episodes.db"), 100, random.Random(1))
    chaos.run(3, print)
    assert chaos.verify()["episodes"] == 100


def test_a_database_that_crashes_under_a_rollout_loses_nothing(tmp_path: Path, postgres: PostgresServer) -> None:
    chaos = Chaos(tmp_path, postgres.url(run="chaos"), 100, random.Random(2), database=postgres)
    chaos.run(3, print)
    assert chaos.killed["database"] >= 1
    assert chaos.verify()["episodes"] == 100
