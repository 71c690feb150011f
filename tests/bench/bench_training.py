"""Forward and backward of one group: our packed row against plain transformers on the same calls, interleaved.

    python -m tests.bench.bench_training [--rounds 5]

A group of 8 samples of one task: 240 prompt tokens in common, 120 tokens each of which 40 are a tool result. SmolLM2-135M in
bfloat16, LoRA r = 16. Plain transformers gets the eight calls as one padded batch, full logits, the same PEFT adapter. Tokens
are counted as transformers sees them (8 × 360), so that the ratio is one of time for the same work.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from lightning_rl.algorithms.aggregation import token_weights
from lightning_rl.memory import keep_freed_memory
from lightning_rl.recipe import LoraConfig
from rollout_server.models.catalog import resolve_model
from tests.unit.domain import make_call, make_episode, transitions_of
from trainers.packing import Row, pack
from trainers.policy import Policy, load_policy, row_tensors

PROMPT, SAMPLES, SAMPLED = 240, 8, 120


def group() -> tuple[list[list[int]], Row]:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(5, 40000, (PROMPT,), generator=generator).tolist()
    answers = [torch.randint(5, 40000, (SAMPLED,), generator=generator).tolist() for _ in range(SAMPLES)]
    episodes = [make_episode(f"e{i}", [make_call(prompt, a, f"c{i}", f"e{i}")]) for i, a in enumerate(answers)]
    calls = {call.id: call for episode in episodes for call in episode.calls}
    transitions = transitions_of(episodes, {f"c{i}": float(i % 2) for i in range(SAMPLES)}, "std")
    rows = pack(transitions, {e.id: "g" for e in episodes}, token_weights(transitions, "token"), calls, 4096).rows
    return [prompt + a for a in answers], rows[0]


def ours(policy: Policy, row: Row) -> None:
    scores = policy(**row_tensors(row))
    (scores.logprobs * torch.tensor(row.advantages)).sum().backward()


def plain(policy: Policy, sequences: list[list[int]]) -> None:
    ids = torch.tensor(sequences)
    logits = policy.causal_lm(input_ids=ids, use_cache=False).logits[:, PROMPT - 1 : -1].float()
    logprobs = torch.log_softmax(logits, -1).gather(2, ids[:, PROMPT:, None])
    logprobs.sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    keep_freed_memory()
    model = resolve_model("smollm2-135m")
    lora = LoraConfig(rank=16, alpha=32.0)
    packed_policy = load_policy(model, "bfloat16", lora, seed=0)
    plain_policy = load_policy(model, "bfloat16", lora, seed=0, attention="sdpa")
    sequences, row = group()
    runs: dict[str, Callable[[], None]] = {
        "packed row": lambda: ours(packed_policy, row),
        "plain transformers": lambda: plain(plain_policy, sequences),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    tokens = SAMPLES * (PROMPT + SAMPLED)
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:20} {median:6.2f} s   {tokens / median:7.0f} tokens/s ({tokens} tokens; {len(row.ids)} distinct)")
    pairs = zip(times["plain transformers"], times["packed row"], strict=True)
    print(f"ratio, median of {options.rounds} pairs: {statistics.median(a / b for a, b in pairs):.2f}")


if __name__ == "__main__":
    main()
