"""The optimiser step against torch's own AdamW, and the same step on one process and on two."""

import os
import subprocess
import sys

import pytest
import torch

from tests.integration.learning import (
    LEARNING_RATES,
    LORA,
    OPTIMISER,
    STEPS,
    learn_with_everything,
    new_engine,
    one_rank,
    row_loss,
    rows_of_step,
    take_steps,
    tensors_of,
)
from trainers.policy import load_policy
from trainers.publish import policy_tensors


@pytest.fixture(scope="module", autouse=True)
def _distributed():
    with one_rank():
        yield


@pytest.fixture(scope="module")
def one_process(tiny_llama):
    engine = new_engine(tiny_llama)
    metrics = take_steps(engine, range(STEPS))
    tensors = tensors_of(engine)
    engine.close()
    return tensors, metrics


def assert_same(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def by_hand(policy):
    """Rows added up, the gradient clipped, AdamW at the step's learning rate, all in fp32 on fp32 masters."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    masters = [p.detach().float().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        masters, betas=OPTIMISER.betas, eps=OPTIMISER.eps, weight_decay=OPTIMISER.weight_decay
    )
    norms = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATES[step]
        for master in masters:
            master.grad = torch.zeros_like(master)
        for row in rows_of_step(step):
            policy.zero_grad()
            row_loss(policy, row)[0].backward()
            for master, parameter in zip(masters, parameters, strict=True):
                master.grad += parameter.grad.float()
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters, OPTIMISER.gradient_clipping)))
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)
    assert max(norms) > OPTIMISER.gradient_clipping
    return policy_tensors(policy), norms


def test_steps_equal_those_of_torch(tiny_llama, one_process):
    tensors, metrics = one_process
    expected, norms = by_hand(load_policy(tiny_llama, "float32", LORA, seed=0))
    assert_same(tensors, expected, atol=2e-6, rtol=1e-4)
    assert [m["gradient_norm"] for m in metrics] == pytest.approx(norms, rel=1e-4)
    assert metrics[0]["tokens"] == sum(len(row.nodes) for row in rows_of_step(0))


def test_bfloat16_adds_up_and_updates_in_fp32(tiny_llama):
    engine = new_engine(tiny_llama, "bfloat16")
    take_steps(engine, range(STEPS))
    expected, _ = by_hand(load_policy(tiny_llama, "bfloat16", LORA, seed=0))
    different = sum(int((tensor != expected[name]).sum()) for name, tensor in tensors_of(engine).items())
    assert different < 20  # of 17920; thousands if rows were added up in bf16
    engine.close()


def test_two_processes_learn_what_one_learns(tiny_llama, one_process, tmp_path):
    """And a checkpoint of theirs goes on bit for bit: `tests.integration.learning` asserts it on each rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, "-m", "tests.integration.learning", str(tmp_path), str(tiny_llama)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]
    assert_same(ranks[1]["tensors"], ranks[0]["tensors"], atol=0, rtol=0)
    tensors, metrics = one_process
    assert_same(ranks[0]["tensors"], tensors, atol=2e-6, rtol=1e-4)
    for ours, theirs in zip(metrics, ranks[0]["metrics"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)
    ours, theirs = learn_with_everything(tiny_llama), ranks[0]["everything"]
    assert_same(theirs["tensors"], ours["tensors"], atol=2e-6, rtol=1e-4)
    for mine, other in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert other == pytest.approx(mine, rel=1e-3, abs=1e-5)
    for moment in ("before", "after"):
        assert theirs[moment].keys() == ours[moment].keys()
        for call_id, scores in ours[moment].items():
            for name in ("old", "reference", "values"):
                assert getattr(theirs[moment][call_id], name) == pytest.approx(getattr(scores, name), abs=1e-4)


def test_a_step_without_rows_changes_nothing(tiny_llama):
    """A step in which no group had a signal; and the next one is as if it had not been."""
    engine, other = new_engine(tiny_llama), new_engine(tiny_llama)
    before = tensors_of(engine)
    assert "tokens" not in engine.step([], row_loss, 1e-2)
    assert_same(tensors_of(engine), before, atol=0, rtol=0)
    take_steps(engine, [0])
    take_steps(other, [0])
    assert_same(tensors_of(engine), tensors_of(other), atol=0, rtol=0)
    engine.close()
    other.close()
