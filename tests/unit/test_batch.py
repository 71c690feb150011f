"""Advantages compared over the step, and what is masked because of what comes of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.algorithms.batch import over_batch
from lightning_rl.algorithms.settings import AdvantageSettings
from lightning_rl.credit.records import compared_in_group
from lightning_rl.credit.rollouts import rollout_of
from lightning_rl.transition import Mask, Transition, group_transitions, settle
from tests.unit.domain import make_call, make_episode

numbers = st.floats(-5, 5)


def transition(id: str, advantage: float, length: int = 1, tokens=(), masked=None) -> Transition:
    return Transition(
        episode_id=id,
        call_id=id,
        prompt_ids=[1],
        sampled_ids=[2] * (len(tokens) or length),
        logprobs=[-1.0] * (len(tokens) or length),
        versions=[0] * (len(tokens) or length),
        temperature=1.0,
        ret=advantage,
        advantage=sum(tokens) / len(tokens) if tokens else advantage,
        token_advantages=list(tokens),
        masked=masked,
    )


@st.composite
def steps(draw):
    made = []
    for number in range(draw(st.integers(1, 6))):
        masked = draw(st.sampled_from([None, None, Mask.GREEDY, Mask.GROUP_OF_ONE]))
        tokens = draw(st.just([]) | st.lists(numbers, min_size=1, max_size=4))
        made.append(transition(str(number), draw(numbers), draw(st.integers(0, 4)), tokens, masked))
    return made


@given(steps(), st.sampled_from(["mean", "std"]))
def test_the_tokens_that_are_trained_on_are_whitened(step, kind):
    made = over_batch(step, kind)
    before = torch.tensor([a for t in step if not t.masked for a in t.advantages], dtype=torch.float64)
    rollouts = [t.advantages for t in step if not t.masked and t.sampled_ids]
    after = torch.tensor([a for t in made if not t.masked for a in t.advantages], dtype=torch.float64)
    if len(before):
        middle, scale = before.mean(), (before.var(correction=0) + 1e-8).sqrt()
        if kind == "mean":
            middle, scale = sum(sum(own) / len(own) for own in rollouts) / len(rollouts), 1.0
        assert torch.allclose(after, (before - middle) / scale, atol=1e-6)
    for old, new in zip(step, made, strict=True):
        assert new == old or new.masked is None
        assert len(new.token_advantages) == len(old.token_advantages)
        if new.token_advantages:
            assert new.advantage == pytest.approx(sum(new.token_advantages) / len(new.token_advantages))


def test_a_long_call_counts_as_often_as_it_has_tokens():
    made = over_batch([transition("a", 1.0, 3), transition("b", -1.0, 1)], "std")
    assert [t.advantage for t in made] == pytest.approx([0.5 / 0.75**0.5, -1.5 / 0.75**0.5])


def test_a_rollout_is_one_point_of_the_mean_however_many_calls_it_made():
    long = [structs.replace(transition(f"b{i}", 0.0, 2), episode_id="b") for i in range(9)]
    made = over_batch([transition("a", 1.0), *long], "mean")
    assert [t.advantage for t in made] == [0.5] + [-0.5] * 9


def test_noise_of_a_penalty_stays_noise():
    made = over_batch([transition("a", 1.0 + 1e-6), transition("b", 1.0 - 1e-6), transition("c", 1.0)], "std")
    assert max(abs(t.advantage) for t in made) < 0.02


def test_tokens_that_are_cut_do_not_count():
    made = over_batch([transition("a", 1.0, 3), transition("b", -1.0, 1)], "std", kept={"a": 1, "b": 1})
    assert [t.advantage for t in made] == pytest.approx([1.0, -1.0])


def test_without_it_nothing_changes():
    step = [transition("a", 1.0), transition("b", 0.0)]
    assert over_batch(step, "none") == step


def settled(returns, settings):
    """One group for each list of returns; masks and advantages by group."""
    made, group_of = [], {}
    for g, group_returns in enumerate(returns):
        group = [
            make_episode(f"{g}-{i}", [make_call([1], [2], f"{g}-{i}", f"{g}-{i}")]) for i in range(len(group_returns))
        ]
        rollouts = [rollout_of(episode, {}, [call.id for call in episode.calls]) for episode in group]
        credits = compared_in_group(rollouts, {f"{g}-{i}": value for i, value in enumerate(group_returns)})
        made += group_transitions(group, credits, settings, {})
        group_of |= {episode.id: str(g) for episode in group}
    made = settle(over_batch(made, settings.batch), group_of)
    return [(t.masked, round(t.advantage, 6)) for t in made]


REINFORCE_PP = AdvantageSettings(baseline="none", batch="std")


def test_a_return_of_zero_is_trained_on_where_the_step_did_better():
    assert settled([[0.0, 0.0], [1.0, 1.0]], REINFORCE_PP) == [(None, -1.0)] * 2 + [(None, 1.0)] * 2


def test_nobody_is_alone_without_a_baseline():
    assert settled([[0.0], [1.0]], REINFORCE_PP) == [(None, -1.0), (None, 1.0)]


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_a_step_of_equal_returns_has_no_signal(value):
    equal = [value, value + 1e-17]
    assert settled([equal, equal[:1] * 3], REINFORCE_PP) == [(Mask.NO_SIGNAL, 0.0)] * 5


def test_a_return_that_is_the_steps_mean_has_no_advantage():
    masks = settled([[0.0, 1.0, 2.0], [1.0]], REINFORCE_PP)
    assert [mask for mask, _ in masks] == [None, Mask.ZERO_ADVANTAGE, None, Mask.NO_SIGNAL]


def test_an_objective_with_a_gradient_everywhere_masks_no_zero():
    step = [transition("a", 0.0), transition("b", 0.0, masked=Mask.GREEDY), transition("c", 2.0, masked=Mask.ABORTED)]
    group_of = dict.fromkeys("abc", "g")
    assert [t.masked for t in settle(step, group_of, asks_everywhere=True)] == [None, Mask.GREEDY, Mask.ABORTED]
    made = settle(step, group_of)
    assert [t.masked for t in made] == [Mask.ZERO_ADVANTAGE, Mask.GREEDY, Mask.ABORTED]
    assert [t.advantage for t in made] == [0.0, 0.0, 0.0]
    assert settle(made, group_of)[1:] == made[1:]


def test_a_call_that_teaches_the_critic_stays_where_all_advantages_are_zero():
    asked, unasked = (structs.replace(transition("a", 0.0), value_targets=[t]) for t in (-1.0, None))
    made = settle([asked, unasked], {"a": "g"})
    assert [(t.masked, t.advantage, t.value_targets) for t in made] == [(None, 0.0, [-1.0]), (Mask.NO_SIGNAL, 0.0, [])]


def test_masked_transitions_lose_their_token_advantages_and_targets():
    step = [structs.replace(transition("a", 0.0, tokens=[1.0, 2.0], masked=Mask.GREEDY), value_targets=[1.0, None])]
    (made,) = settle(step, {"a": "g"})
    assert (made.advantage, made.token_advantages, made.value_targets) == (0.0, [], [])
