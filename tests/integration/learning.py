"""What the tests of the learning side learn from, and a trainer rank to run them in processes of their own.

`torchrun --nproc-per-node 2 -m tests.integration.learning OUT MODEL` trains on two ranks and leaves what came out in OUT.
"""

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from msgspec import structs

from lightning_rl.algorithms.aggregation import token_weights
from lightning_rl.episode import Call
from lightning_rl.recipe import LoraConfig, Objective, Recipe, load_recipe
from lightning_rl.scores import CallScores
from tests.unit.domain import make_call, make_episode, transitions_of
from trainers.deepspeed_engine import OptimiserConfig, TrainEngine, init_distributed, leave_distributed
from trainers.learner import Learner
from trainers.learner import row_loss as objective_row_loss
from trainers.packing import Packed, Row, pack, rows_to_score, share_out
from trainers.policy import load_policy, row_tensors
from trainers.publish import policy_tensors

torch.set_num_threads(1)  # models here are tiny: a second thread costs more than it gives, on a busy machine far more

LORA = LoraConfig(rank=4, alpha=8.0)
OPTIMISER = OptimiserConfig(weight_decay=0.01, gradient_clipping=5e-5)
STEPS = 4
LEARNING_RATES = [1e-2, 5e-3, 2e-3, 1e-3]


def random_ids(count, generator):
    return torch.randint(3, 4000, (count,), generator=generator).tolist()


def group_of_calls(temperature=1.0):
    """Four episodes of two calls each: one prompt, two of the answers alike, the second call a continuation."""
    generator = torch.Generator().manual_seed(3)
    prompt = random_ids(70, generator)
    episodes = []
    for e in range(4):
        answer = random_ids(20 + 5 * e, generator) if e != 1 else episodes[0].calls[0].sampled_ids
        first = make_call(prompt, answer, id=f"e{e}a", episode_id=f"e{e}", temperature=temperature)
        second = make_call(
            prompt + answer + random_ids(9, generator),
            random_ids(60, generator),
            id=f"e{e}b",
            episode_id=f"e{e}",
            temperature=temperature,
        )
        episodes.append(make_episode(f"e{e}", [first, second]))
    return episodes


def packed_group(episodes, limit=4096) -> Packed:
    by_id = {call.id: call for episode in episodes for call in episode.calls}
    returns = {call.id: float(e % 3) for e, episode in enumerate(episodes) for call in episode.calls}
    transitions = transitions_of(episodes, returns, "none")
    weights = token_weights(transitions, "token")
    return pack(transitions, {episode.id: "g" for episode in episodes}, weights, by_id, limit)


def recipe_with_everything(dtype: str = "float32", lora: LoraConfig | None = LORA) -> Recipe:
    """A critic, a reference policy and an entropy bonus."""
    return load_recipe(
        Path(__file__).parents[2] / "recipes" / "smoke.yaml",
        [
            f"model.dtype={dtype}",
            f"train.lora={lora.model_dump() if lora else 'null'}",
            "train.credit=turn_gae",
            "train.learning_rate=0.01",
            "train.objective={name: gspo, entropy_bonus: 0.01, kl: {coefficient: 0.1}}",
        ],
    )


def rows_with_everything(scores: Mapping[str, CallScores] = {}, limit: int = 4096, ranks: int = 1) -> list[Row]:
    """`group_of_calls`, of which the fourth episode's calls were sampled under restrictions, with targets for a critic at every
    third token."""
    transitions = []
    by_id = {call.id: call for call in everything_sampled()}
    episodes = [make_episode(f"e{e}", [by_id[f"e{e}a"], by_id[f"e{e}b"]]) for e in range(4)]
    returns = {call_id: float(int(call_id[1]) % 3) for call_id in by_id}
    for t in transitions_of(episodes, returns, "none"):
        targets = [t.advantage + i / 50 if i % 3 == 0 else None for i in range(len(t.sampled_ids))]
        transitions.append(structs.replace(t, value_targets=targets))
    weights = token_weights(transitions, "token")
    agents = {call_id: "planner" if call_id.endswith("a") else "writer" for call_id in by_id}
    group_of = {episode.id: "g" for episode in episodes}
    return pack(transitions, group_of, weights, by_id, limit, ranks=ranks, scores=scores, agent_of=agents).rows


def everything_sampled() -> list[Call]:
    calls = [call for episode in group_of_calls(0.7) for call in episode.calls]
    return [structs.replace(call, restricted=["grammar"]) if call.episode_id == "e3" else call for call in calls]


def learn_with_everything(model_dir: Path) -> dict[str, Any]:
    """Scores, two steps, scores: by rank 0; the others follow it. Three rows, so that two ranks need one of padding."""
    world = torch.distributed.get_world_size()
    learner = Learner(recipe_with_everything(), model_dir, None)
    if torch.distributed.get_rank():
        learner.follow()
        return {}
    to_score = rows_to_score(everything_sampled(), {f"e{e}": "g" for e in range(4)}, 240, world)
    before = learner.score(share_out(to_score, world), reference=True)
    shares = share_out(rows_with_everything(before, 240, world), world)
    metrics = [learner.step(shares, rate) for rate in (1e-3, 5e-4)]
    after = learner.score(share_out(to_score, world), reference=True)
    tensors = {name: tensor.clone() for name, tensor in policy_tensors(learner.policy).items()}
    learner.stop()
    return {"before": before, "metrics": metrics, "after": after, "tensors": tensors}


def with_active_adapter(policy):
    """A fresh adapter adds nothing: B is zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return policy


def rows_of_step(step: int) -> list[Row]:
    """Five small rows, so that two ranks need one of padding."""
    generator = torch.Generator().manual_seed(100 + step)
    rows: list[Row] = []
    for g in range(5):
        prompt = random_ids(8, generator)
        calls = [
            make_call(prompt, random_ids(4 + g, generator), id=f"g{g}e{e}", episode_id=f"g{g}e{e}") for e in range(3)
        ]
        rows += packed_group([make_episode(call.id, [call]) for call in calls]).rows
    return rows


def row_loss(module, row: Row):
    return objective_row_loss(module(**row_tensors(row)), row, Objective().settings())


def new_engine(model_dir: Path, dtype: str = "float32", lora: LoraConfig | None = LORA, seed: int = 0) -> TrainEngine:
    return TrainEngine(load_policy(model_dir, dtype, lora, seed=seed), dtype, OPTIMISER)


def take_steps(engine: TrainEngine, steps: Sequence[int]) -> list[dict[str, float]]:
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return [engine.step(share_out(rows_of_step(s), world)[rank], row_loss, LEARNING_RATES[s]) for s in steps]


def tensors_of(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy_tensors(engine.module).items()}


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone, one for all tests: DeepSpeed keeps the first group it sees for good. The
    environment is left as it was."""
    environment = dict(os.environ)
    if torch.distributed.is_initialized():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    else:
        init_distributed()
        atexit.register(leave_distributed)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)


def main(out: Path, model_dir: Path) -> None:
    """Steps 0-3 at once; then 0-1, a checkpoint, and 2-3 by an engine that only knows the checkpoint."""
    from trainers.checkpoint import TrainState, checkpoint_path, load_checkpoint, save_checkpoint

    init_distributed()
    straight = new_engine(model_dir)
    metrics = take_steps(straight, range(STEPS))
    expected = tensors_of(straight)
    straight.close()
    first = new_engine(model_dir)
    take_steps(first, [0, 1])
    state = TrainState(step=2, version=3, world_size=2)
    save_checkpoint(first, out / "checkpoints", state, keep=1)
    first.close()
    second = new_engine(model_dir, seed=7)
    load_checkpoint(second, checkpoint_path(out / "checkpoints", 2))
    take_steps(second, [2, 3])
    resumed = tensors_of(second)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items()), "resumed weights differ"
    second.close()
    everything = learn_with_everything(model_dir)
    done = {"tensors": expected, "metrics": metrics, "everything": everything}
    torch.save(done, out / f"rank-{torch.distributed.get_rank()}.pt")
    leave_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # gloo can abort on an orderly exit
