"""The warm start as the process that it is, against supervised fine-tuning by hand with plain transformers."""

import json
import os
import subprocess
import sys
from collections import Counter

import msgspec
import pytest
import torch

from rollout_server.models.weights import read_tensors
from tests.integration.learning import LORA, random_ids
from trainers.policy import load_policy
from trainers.publish import policy_tensors
from trainers.warm_start import NO_LABEL, Demonstration, MasterAdamW, WarmStartConfig, rows_of_batch

STEPS, LEARNING_RATE = 3, 1e-2


def demonstrations():
    """One system prompt; two turns of the assistant, of different lengths."""
    generator = torch.Generator().manual_seed(2)
    shared = random_ids(12, generator)
    made = []
    for i in range(6):
        turns = [
            random_ids(3 + i, generator),
            random_ids(5, generator),
            random_ids(4, generator),
            random_ids(2 + i, generator),
        ]
        mask = [0] * len(shared) + [number % 2 for number, turn in enumerate(turns) for _ in turn]
        made.append(Demonstration(shared + [token for turn in turns for token in turn], mask))
    return made


def by_hand(model_dir, lora):
    """Padding-free, packing-free: the mean over all labelled tokens of the batch, the whole set at each step."""
    policy = load_policy(model_dir, "float32", lora, seed=0, attention="sdpa")
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    total = sum(sum(demonstration.mask) for demonstration in demonstrations())
    losses = []
    for step in range(STEPS):
        # one step of warm-up, then linearly towards 0
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (0 if step == 0 else (STEPS - step) / (STEPS - 1))
        optimizer.zero_grad()
        loss = torch.zeros(())
        for demonstration in demonstrations():
            ids, mask = torch.tensor(demonstration.ids), torch.tensor(demonstration.mask[1:]).bool()
            logits = policy.causal_lm(ids[None]).logits[0, :-1][mask]
            loss = loss + torch.nn.functional.cross_entropy(logits, ids[1:][mask], reduction="sum") / total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return policy_tensors(policy), losses


KINDS = {"lora": LORA, "full": None}
BOTH = """
import runpy, sys
for config in sys.argv[1:]:
    sys.argv[1:] = [config]
    runpy.run_module("trainers.warm_start", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def warmed(tiny_llama, tmp_path_factory):
    """Folders, by kind. One after the other in one process, which takes longer to import than to train."""
    lines = [msgspec.json.encode(demonstration) for demonstration in demonstrations()]
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        (folder / "demonstrations.jsonl").write_bytes(b"\n".join(lines))
        config = WarmStartConfig(
            model_dir=str(tiny_llama),
            dtype="float32",
            lora=KINDS[kind].model_dump() if KINDS[kind] else None,
            steps=STEPS,
            batch_size=len(lines),
            learning_rate=LEARNING_RATE,
            seed=0,
            demonstrations=str(folder / "demonstrations.jsonl"),
            out=str(folder / "warm"),
            progress=str(folder / "progress.jsonl"),
            parent_pid=os.getpid(),
        )
        (folder / "config.json").write_bytes(msgspec.json.encode(config))
    done = subprocess.run(
        [sys.executable, "-c", BOTH, *(str(folder / "config.json") for folder in folders.values())],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_plain_fine_tuning_learns(tiny_llama, warmed, kind):
    lora, folder = KINDS[kind], warmed[kind]
    expected, losses = by_hand(tiny_llama, lora)
    progress = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in progress] == [1, 2, 3]
    assert [line["loss"] for line in progress] == pytest.approx(losses, rel=1e-3)
    assert losses[-1] < losses[0]
    actual = read_tensors(folder / "warm", "adapter_model" if lora else "model")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        # Adam takes a full step for a gradient of any size: where it is all rounding, so is the step's sign
        assert float((actual[name] - tensor).abs().mean()) < 1e-5, name
    start = policy_tensors(load_policy(tiny_llama, "float32", lora, seed=0))
    assert any(float((actual[name] - start[name]).abs().mean()) > 1e-3 for name in expected)


def test_a_batch_is_packed_with_every_label_once():
    examples = [
        {"input_ids": d.ids, "labels": [t if m else NO_LABEL for t, m in zip(d.ids, d.mask, strict=True)]}
        for d in demonstrations()
    ]
    (row,) = rows_of_batch(examples)
    wanted = Counter(t for d in demonstrations() for t, m in zip(d.ids, d.mask, strict=True) if m)
    assert Counter(row.targets) == wanted
    assert sum(row.weights) == pytest.approx(1.0)
    assert len(row.ids) == 12 + sum(
        len(d.ids) - 12 - 1 for d in demonstrations()
    )  # shared once, last tokens not at all


def test_a_first_token_has_no_loss_for_nothing_predicts_it():
    (row,) = rows_of_batch([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    assert (row.ids, row.targets) == ([5, 6], [6, 7])


def test_small_updates_add_up_in_bfloat16():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], 1e-3)
    for _ in range(8):  # 0.999 is nearer to 1 than to the next bf16 number below it
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.tolist() == pytest.approx([1 - 8e-3] * 4, abs=2e-3)
    assert weight.tolist() != [1.0] * 4
