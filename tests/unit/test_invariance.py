"""How a step is laid out does not change its gradient: the order of its episodes and calls, rows, shared prefixes, padding, ranks.

The policy is tiny and exact: in float64, the logits at a node are a function of all that the node sees, ids and positions. So a
mask or a position that is wrong in any layout shows as another gradient.
"""

import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec import structs

from lightning_rl.algorithms.objective import TokenBatch, objective_loss
from lightning_rl.algorithms.settings import OBJECTIVES, settings_of
from lightning_rl.credit import RULES, WITH_CRITIC
from lightning_rl.episode import Reward
from lightning_rl.scores import CallScores
from tests.unit.domain import make_call, make_episode, make_recipe
from trainers.learning import learn_from
from trainers.packing import PADDING, pack, share_out

VOCAB, WIDTH = 7, 4
GENERATOR = torch.Generator().manual_seed(5)
EMBEDDINGS = torch.randn(VOCAB, WIDTH, generator=GENERATOR, dtype=torch.float64)
HEAD = torch.randn(WIDTH, VOCAB, generator=GENERATOR, dtype=torch.float64)
FREQUENCIES = torch.tensor([0.1, 0.7, 1.3, 2.9], dtype=torch.float64)


def gradient(rows, objective):
    """Of the summed loss of the rows, flat."""
    parameters = [EMBEDDINGS.clone().requires_grad_(), HEAD.clone().requires_grad_()]
    total = sum((row_loss(row, objective, *parameters) for row in rows), torch.zeros((), dtype=torch.float64))
    made = torch.autograd.grad(total, parameters, allow_unused=True) if total.requires_grad else [None, None]
    return torch.cat(
        [(p.new_zeros(p.shape) if g is None else g).flatten() for p, g in zip(parameters, made, strict=True)]
    )


def row_loss(row, objective, embeddings, head):
    number = torch.arange(len(row.ids))
    sees = (number[None, :] <= number[:, None]) & (number[:, None] < torch.tensor(row.ends)[None, :])
    depths = torch.tensor(row.depths, dtype=torch.float64)
    inputs = embeddings[torch.tensor(row.ids)] * torch.cos(depths[:, None] * FREQUENCIES)
    logits = torch.tanh(sees.to(torch.float64) @ inputs) @ head
    if not row.nodes:
        return 0 * logits.sum()
    scaled = logits[torch.tensor(row.nodes)] / doubles(row.temperatures)[:, None]
    logprobs = scaled.log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(row.targets)[:, None])[:, 0]
    batch = TokenBatch(
        logprobs=chosen,
        entropies=-(logprobs.exp() * logprobs).sum(-1),
        old=doubles(row.old) if row.old else chosen.detach(),
        behaviour=doubles(row.behaviour),
        advantages=doubles(row.advantages),
        weights=doubles(row.weights),
        sequences=torch.tensor(row.sequences),
        correctable=torch.tensor(row.correctable),
        reference=doubles(row.reference) if row.reference else None,
    )
    return objective_loss(batch, objective).loss


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def random_step(seed):
    """Two groups of rollouts with branches, edits and repetitions, and the scores of their calls."""
    chance = random.Random(seed)

    def ids(least, most):
        return [chance.randrange(VOCAB) for _ in range(chance.randint(least, most))]

    def call(prompt, id, episode_id, index):
        sampled = ids(1, 4)
        return make_call(
            prompt,
            sampled,
            id=id,
            episode_id=episode_id,
            index=index,
            logprobs=[-3 * chance.random() for _ in sampled],
            temperature=chance.choice([1.0, 1.0, 0.7, 0.0]),
            restricted=chance.choice([[], [], ["top_p"]]),
            agent=chance.choice(["a", "b"]),
        )

    episodes = []
    for group in range(2):
        prompt = ids(1, 4)
        for number in range(chance.randint(2, 3)):
            name, calls, rewards = f"g{group}e{number}", [], []
            for index in range(chance.randint(1, 3)):
                before = [*calls[-1].prompt_ids, *calls[-1].sampled_ids] if calls and chance.random() < 0.7 else prompt
                calls.append(call([*before, *ids(0, 2)], f"{name}c{index}", name, index))
                if chance.random() < 0.5:
                    value = chance.choice([0.25, -1.0, 2.0])
                    rewards.append(Reward(episode_id=name, name="good", value=value, call_id=calls[-1].id))
            rewards.append(Reward(episode_id=name, name="good", value=chance.choice([0.0, 1.0])))
            episode = make_episode(name, calls)
            start = structs.replace(episode.start, group=str(group), sample=number)
            episodes.append(structs.replace(episode, start=start, rewards=rewards))

    def near(values, by):
        return [value + chance.gauss(0, by) for value in values]

    scores = {
        c.id: CallScores(
            old=near(c.logprobs, 0.3), reference=near(c.logprobs, 0.5), values=near([0.5] * len(c.logprobs), 1)
        )
        for episode in episodes
        for c in episode.calls
    }
    return episodes, scores, chance


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")

    def make(objective, rule, **train):
        settings = {"steps": 1, "objective": objective, "credit": rule, "epochs": 2} | train
        return make_recipe(folder, train=settings, sampling={"max_tokens": 5})

    return make


@given(
    st.integers(0, 10**6),
    st.sampled_from(sorted(OBJECTIVES)),
    st.sampled_from(sorted(RULES)),
    st.sampled_from(
        [{}, {"entropy_bonus": 0.01}, {"kl": {"coefficient": 0.1}}, {"correction": {"kind": "sequence_mask"}}]
    ),
)
@settings(max_examples=40, deadline=None)
def test_the_layout_of_a_step_does_not_change_its_gradient(recipe_of, seed, name, rule, more):
    assume("correction" not in more or settings_of(name).old == "trainer")
    penalty = settings_of(name).kl
    assume(rule not in WITH_CRITIC or penalty is None or penalty.place != "token_reward")
    objective = {"name": name, **more}
    recipe = recipe_of(objective, rule)
    resolved = recipe.train.objective.settings()
    episodes, scores, chance = random_step(seed)
    data = learn_from(recipe, episodes, scores)
    expected = gradient(data.packed.rows, resolved)

    def same(rows, what):
        difference = float((gradient(rows, resolved) - expected).abs().max())
        assert difference <= 1e-9 * (1 + float(expected.abs().max())), what

    shuffled = [structs.replace(e, calls=chance.sample(e.calls, len(e.calls))) for e in episodes]
    chance.shuffle(shuffled)
    same(learn_from(recipe, shuffled, scores).packed.rows, "episodes and calls in another order")

    longest = max(len(c.prompt_ids) + len(c.sampled_ids) for e in episodes for c in e.calls)
    short = learn_from(recipe_of(objective, rule, max_row_tokens=longest), episodes, scores)
    same(short.packed.rows, "short rows")
    assert short.ledger.truncated == {}

    ranks = learn_from(recipe_of(objective, rule, world_size=3), episodes, scores)
    shares = share_out(ranks.packed.rows, 3)
    assert len({len(share) for share in shares}) == 1
    same([row for share in shares for row in [*share, PADDING]], "three ranks, and padding")

    group_of = {episode.id: episode.start.group for episode in episodes}
    calls = {call.id: call for episode in episodes for call in episode.calls}
    weights = {
        row.calls[number]: weight
        for row in data.packed.rows
        for number, weight in zip(row.sequences, row.weights, strict=True)
    }
    alone = [
        row
        for transition in data.transitions
        for row in pack([transition], group_of, weights, calls, 4096, scores=scores).rows
    ]
    assert len(alone) == len(weights)
    same(alone, "each call alone")
