"""GAE over tokens and over calls, against its closed form and against the ways in which it is got wrong."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.credit import bind, rule_function
from lightning_rl.credit.gae import gae
from lightning_rl.credit.records import Rollout
from lightning_rl.credit.rollouts import rollout_of
from lightning_rl.credit.token_gae import token_gae
from lightning_rl.credit.turn_gae import turn_gae
from lightning_rl.episode import Reward
from lightning_rl.errors import CreditError
from tests.unit.domain import make_call, make_episode

number = st.floats(-2, 2)
rate = st.floats(0, 1)
steps = st.lists(st.tuples(number, number), min_size=1, max_size=8)


def rollout(values: Sequence[Sequence[float]], outcome: float, earned: dict[int, float], *, cut: int = 0) -> Rollout:
    """Call k has a token for each of `values[k]`; `cut` more have none at the end of the last."""
    calls = [
        make_call([1], [2] * (len(of_call) + (cut if k == len(values) - 1 else 0)), f"c{k}", "e", index=k)
        for k, of_call in enumerate(values)
    ]
    rewards = [Reward(episode_id="e", name="r", value=v, call_id=f"c{k}") for k, v in earned.items()]
    episode = structs.replace(
        make_episode("e", calls), rewards=[*rewards, Reward(episode_id="e", name="r", value=outcome)]
    )
    return rollout_of(
        episode, {}, [call.id for call in calls], values={f"c{k}": [*of_call] for k, of_call in enumerate(values)}
    )


def closed_form(rewards: Sequence[float], values: Sequence[float], discount: float, lam: float) -> np.ndarray:
    """A_t = Σ_n (γλ)^n δ_{t+n}, as a matrix product in float64."""
    v = np.asarray(values, np.float64)
    delta = np.asarray(rewards, np.float64) + discount * np.append(v[1:], 0.0) - v
    lag = np.arange(len(v))[None, :] - np.arange(len(v))[:, None]
    return np.where(lag >= 0, (discount * lam) ** np.maximum(lag, 0), 0.0) @ delta


@given(steps, rate, rate)
def test_recursion_is_the_closed_form(steps: list[tuple[float, float]], discount: float, lam: float) -> None:
    rewards, values = [r for r, _ in steps], [v for _, v in steps]
    advantages, targets = gae(rewards, values, discount, lam)
    assert advantages == pytest.approx(closed_form(rewards, values, discount, lam), abs=1e-9)
    assert targets == pytest.approx(np.add(advantages, values), abs=1e-9)


@given(steps)
def test_with_lambda_one_and_no_discount_it_is_what_is_to_come_less_the_value(
    steps: list[tuple[float, float]],
) -> None:
    rewards, values = [r for r, _ in steps], [v for _, v in steps]
    advantages, targets = gae(rewards, values, 1.0, 1.0)
    to_come = np.cumsum(rewards[::-1])[::-1]
    assert targets == pytest.approx(to_come, abs=1e-9)
    assert advantages == pytest.approx(to_come - np.array(values), abs=1e-9)


def carried_through(
    rewards: np.ndarray, values: np.ndarray, sampled: np.ndarray, discount: float, lam: float
) -> np.ndarray:
    """The backward pass over a whole row: at a token that was read, next value and advantage stay what they are."""
    advantages, next_value, next_advantage = np.zeros(len(values)), 0.0, 0.0
    for t in reversed(range(len(values))):
        if sampled[t]:
            next_advantage = rewards[t] + discount * next_value - values[t] + discount * lam * next_advantage
            next_value = values[t]
        advantages[t] = next_advantage
    return advantages


def cut_at_observations(
    rewards: np.ndarray, values: np.ndarray, sampled: np.ndarray, discount: float, lam: float
) -> np.ndarray:
    """The trap: values of what was read are set to zero, and the last token before it has nothing to come."""
    return closed_form(rewards * sampled, values * sampled, discount, lam)


@pytest.mark.parametrize(("discount", "lam"), [(1.0, 0.5), (0.9, 0.8)])
def test_tokens_go_on_behind_an_observation(discount: float, lam: float) -> None:
    one = rollout([[0.5, 0.25], [0.75, 0.125, 1.0]], 1.0, {0: 0.25})
    sampled = np.array([1, 1, 0, 0, 1, 1, 1])
    values = np.array([0.5, 0.25, 9.0, 9.0, 0.75, 0.125, 1.0])
    rewards = np.array([0.0, 0.25, 0.0, 0.0, 0.0, 0.0, 1.0])
    credits = token_gae([one], discount=discount, lam=lam)
    got = credits.token_advantages["c0"] + credits.token_advantages["c1"]
    assert got == pytest.approx(carried_through(rewards, values, sampled, discount, lam)[sampled == 1])
    trapped = cut_at_observations(rewards, values, sampled, discount, lam)
    assert abs(got[1] - trapped[1]) > 0.1
    targets = credits.value_targets["c0"] + credits.value_targets["c1"]
    assert targets == pytest.approx(np.add(got, values[sampled == 1]))
    assert credits.returns == {"c0": pytest.approx(targets[0]), "c1": pytest.approx(targets[2])}


def test_calls_are_the_steps_of_turn_gae() -> None:
    one = rollout([[0.5, 9.0], [0.75, 9.0, 9.0], [0.25]], 1.0, {0: 0.25, 2: 0.5})
    credits = turn_gae([one], discount=0.9, lam=0.8)
    first, second, third = closed_form([0.25, 0.0, 1.5], [0.5, 0.75, 0.25], 0.9, 0.8)
    assert credits.token_advantages == {
        "c0": [pytest.approx(first)] * 2,
        "c1": [pytest.approx(second)] * 3,
        "c2": [pytest.approx(third)],
    }
    assert credits.value_targets == {
        "c0": [pytest.approx(first + 0.5), None],
        "c1": [pytest.approx(second + 0.75), None, None],
        "c2": [pytest.approx(third + 0.25)],
    }
    assert credits.returns["c1"] == pytest.approx(second + 0.75)


@given(st.lists(number, min_size=1, max_size=5), number, rate, rate)
def test_where_each_call_samples_one_token_both_are_one(
    values: list[float], outcome: float, discount: float, lam: float
) -> None:
    one = rollout([[value] for value in values], outcome, {0: 0.5})
    assert turn_gae([one], discount=discount, lam=lam) == token_gae([one], discount=discount, lam=lam)


def test_tokens_without_a_value_are_no_steps() -> None:
    """Beyond the row limit, and in calls that sampled nothing, whose reward is the call's before."""
    one = rollout([[0.5], [], [0.25, 0.75]], 1.0, {1: 0.5}, cut=2)
    for rule in (bind(rule_function("token_gae"), {}, "token_gae"), bind(rule_function("turn_gae"), {}, "turn_gae")):
        credits = rule([one])
        assert "c1" not in credits.token_advantages
        assert credits.returns["c1"] == 0
        assert len(credits.token_advantages["c2"]) == len(credits.value_targets["c2"]) == 4
    credits = token_gae([one])
    assert credits.token_advantages == {"c0": [1.0], "c2": [0.75, 0.25, 0.0, 0.0]}
    assert credits.value_targets == {"c0": [1.5], "c2": [1.0, 1.0, None, None]}


@pytest.mark.parametrize("rule", [turn_gae, token_gae])
def test_a_critic_is_asked_for(rule: object) -> None:
    one = structs.replace(rollout([[0.5]], 1.0, {}), values={})
    with pytest.raises(CreditError, match="critic"):
        rule([one])  # type: ignore[operator]
    assert rule([structs.replace(one, calls=[])]).returns == {}  # type: ignore[operator]
