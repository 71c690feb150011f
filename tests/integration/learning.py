"""What the tests of the learning side learn from, and a trainer rank to run them in processes of their own.

`torchrun --nproc-per-node 2 -m tests.integration.learning OUT MODEL` trains on two ranks and leaves what came out in OUT.
"""

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lightning_rl.algorithms.aggregation import token_weights
from lightning_rl.recipe import LoraConfig, Objective
from lightning_rl.transition import group_transitions
from tests.unit.domain import make_call, make_episode
from trainers.deepspeed_engine import OptimiserConfig, TrainEngine, init_distributed, leave_distributed
from trainers.learner import objective_loss
from trainers.packing import Packed, Row, pack, share_out
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
    transitions = group_transitions(episodes, returns, "none")
    weights = token_weights(transitions, "token")
    return pack(transitions, {episode.id: "g" for episode in episodes}, weights, by_id, limit)


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
    scores = module(**row_tensors(row))
    if not row.nodes:
        return scores.logprobs.sum(), {}
    return objective_loss(scores, row, Objective())


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
    torch.save({"tensors": expected, "metrics": metrics}, out / f"rank-{torch.distributed.get_rank()}.pt")
    second.close()
    leave_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # gloo can abort on an orderly exit
