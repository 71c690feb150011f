"""The credit rule `gigpo`, by hand and by what must hold."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.algorithms.advantage import estimate
from lightning_rl.algorithms.settings import AdvantageSettings
from lightning_rl.credit.equal import equal
from lightning_rl.credit.gigpo import gigpo
from lightning_rl.credit.records import Credits, Rollout
from lightning_rl.credit.rollouts import rollout_of
from lightning_rl.episode import Call, Reward
from tests.unit.domain import make_call, make_episode


def walk(id: str, seen: Sequence[int], outcome: float, earned: Sequence[float] = (), action: int = 50) -> Rollout:
    """A conversation whose k-th call is asked after the observation `seen[k]`; `earned` at its calls, in order."""
    calls: list[Call] = []
    ids: list[int] = []
    for k, observation in enumerate(seen):
        ids = [*ids, observation]
        parent = calls[-1].id if calls else None
        calls.append(make_call(ids, [action + k], f"{id}.{k}", id, index=k, parent_id=parent))
        ids = [*ids, action + k]
    episode = make_episode(id, calls, {"r": outcome})
    rewards = [Reward(episode_id=id, name="r", value=v, call_id=f"{id}.{k}") for k, v in enumerate(earned)]
    whole = structs.replace(episode, rewards=[*episode.rewards, *rewards])
    return rollout_of(whole, {}, [call.id for call in calls])


def advantages(group: Sequence[Rollout], credits: Credits, settings: AdvantageSettings) -> dict[str, float]:
    found = estimate(credits, settings, {call.id: one.id for one in group for call in one.calls})
    return {id: one.advantage for id, one in found.items()}


def test_by_hand() -> None:
    """Both rollouts see 7 after different histories; nobody else sees 8 or 9, and all begin with 1."""
    group = [walk("a", [1, 7, 8], 1.0, action=50), walk("b", [1, 9, 9, 7], 0.0, [0.0, 0.5], action=60)]
    credits = gigpo(group, discount=0.5, weight=2.0)
    to_go = {"a.0": 0.25, "a.1": 0.5, "a.2": 1.0, "b.0": 0.25, "b.1": 0.5, "b.2": 0.0, "b.3": 0.0}
    assert credits.returns == pytest.approx(
        {id: (1.0 if id[0] == "a" else 0.5) + 2 * value for id, value in to_go.items()}
    )
    got = advantages(group, credits, AdvantageSettings())
    assert got == pytest.approx(
        {"a.0": 0.25, "a.1": 0.25 + 2 * 0.25, "a.2": 0.25, "b.0": -0.25, "b.1": -0.25, "b.2": -0.25, "b.3": -0.25 - 0.5}
    )
    scaled = advantages(group, credits, AdvantageSettings(normalise="std"))
    assert scaled["a.1"] == pytest.approx(0.25 / (0.125**0.5 + 1e-4) + 2 * 0.25 / (0.125**0.5 + 1e-4))


def test_a_rollout_is_one_point_of_its_anchor_however_often_it_is_there() -> None:
    group = [walk("a", [1, 7, 7, 7], 1.0), walk("b", [2, 7], 0.0)]
    points = {scope: points for scope, points in gigpo(group, discount=0.5).scopes.items() if len(points) > 1}
    assert points == {
        "group": {"a": 1.0, "b": 0.0},
        next(scope for scope in points if scope != "group"): {"a": pytest.approx(1.75 / 3), "b": 0.0},
    }


def test_agents_of_other_names_have_other_anchors() -> None:
    calls = [make_call([1], [2], id, id, agent=agent) for id, agent in (("a", "planner"), ("b", "helper"))]
    group = [rollout_of(make_episode(call.id, [call], {"r": 1.0}), {}, [call.id]) for call in calls]
    assert sorted(len(points) for points in gigpo(group).scopes.values()) == [1, 1, 2]


rollouts = st.lists(
    st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.floats(-2, 2)), min_size=2, max_size=4
)


@given(rollouts, st.sampled_from(["group_mean", "leave_one_out"]), st.sampled_from(["none", "std"]))
def test_without_weight_it_is_equal_assignment(
    rollouts: list[tuple[list[int], float]], baseline: str, normalise: str
) -> None:
    settings = AdvantageSettings(baseline=baseline, normalise=normalise)  # type: ignore[arg-type]
    group = [walk(f"e{i}", seen, outcome) for i, (seen, outcome) in enumerate(rollouts)]
    expected = advantages(group, equal(group), settings)
    assert advantages(group, gigpo(group, weight=0.0), settings) == pytest.approx(expected, abs=1e-9)


@given(rollouts, st.randoms())
def test_the_order_of_rollouts_does_not_matter(rollouts: list[tuple[list[int], float]], chance: object) -> None:
    group = [walk(f"e{i}", seen, outcome) for i, (seen, outcome) in enumerate(rollouts)]
    shuffled = [*group]
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    settings = AdvantageSettings(baseline="leave_one_out")
    assert advantages(shuffled, gigpo(shuffled), settings) == pytest.approx(
        advantages(group, gigpo(group), settings), abs=1e-12
    )
