"""Decode on one GPU against its memory roofline and against transformers, at real shapes with random weights.

    python -m tests.gpu.bench_decode --out decode.json [--models llama-8b qwen3-8b] [--batches 1 64 256] [--context 1024]

A step is a captured decode pass, logits and sampling, on the device alone. The roofline is the time in which the
device's measured bandwidth moves what a step must read: every weight but the embedding once, every row's keys and values
once. transformers decodes the same number of rows at the same context, eagerly with a static cache, greedily.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, StaticCache

from rollout_server.kernels.interface import Batch
from rollout_server.models.config import ModelConfig, read_config
from rollout_server.models.decoder import Decoder

PAGE = 16
STEPS = 20
"""Decode steps of one timing."""
REPEATS = 5
PREFILL_TOKENS = 16_384
"""Tokens of one prefill pass of transformers."""
_SHAPE = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama-8b": lambda: LlamaForCausalLM(
        LlamaConfig(**_SHAPE, num_hidden_layers=32, intermediate_size=14336, vocab_size=128_256)
    ),
    "qwen3-8b": lambda: Qwen3ForCausalLM(
        Qwen3Config(**_SHAPE, num_hidden_layers=36, intermediate_size=12288, vocab_size=151_936)
    ),
}


def seconds(step: Callable[[], object], steps: int) -> float:
    """Median seconds of one step."""
    for _ in range(3):
        step()
    found = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / steps)
    return statistics.median(found)


def bandwidth() -> float:
    """Bytes a second that a copy of 4 GiB reads and writes."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), 4)


def bytes_read(config: ModelConfig, weights: int, rows: int, context: int) -> int:
    """By one decode step, in bf16: `weights` elements without the embedding, and the keys and values."""
    cached = rows * context * config.layers * 2 * config.kv_heads * config.head_dim
    return 2 * (weights + cached)


def our_step(decoder: Decoder, rows: int, context: int) -> Callable[[], object]:
    """A decode step at a fixed context, each row on pages of its own."""
    from rollout_server.worker.cuda_graphs import DecodeGraphs

    each = -(-context // PAGE)
    device = torch.device("cuda")
    cache = decoder.kernels.allocate(decoder.config, rows * each + 1, PAGE, decoder.dtype, device)
    for layer in cache:
        layer.keys.normal_()
        layer.values.normal_()
    graphs = DecodeGraphs(decoder, cache, rows, each, rows * each)
    lines = torch.arange(rows, dtype=torch.int32, device=device)
    tables = torch.arange(rows * each, dtype=torch.int32, device=device).view(rows, each)
    position = context - 1
    batch = Batch(
        ids=torch.zeros(rows, dtype=torch.int64, device=device),
        positions=torch.full((rows,), position, dtype=torch.int32, device=device),
        cells=tables[:, position // PAGE].long() * PAGE + position % PAGE,
        offsets=torch.arange(rows + 1, dtype=torch.int32, device=device),
        tables=tables,
        lines=lines,
        lengths=torch.full((rows,), context, dtype=torch.int32, device=device),
        longest=context,
        most=1,
    )
    temperatures = torch.ones(rows, device=device)
    uniforms = torch.rand(rows, dtype=torch.float64, device=device)

    @torch.inference_mode()
    def step() -> None:
        nonlocal batch
        logits = decoder.logits(graphs.run(batch))
        ids, _, _ = decoder.kernels.log_softmax_sample(logits, temperatures, uniforms)
        batch = batch._replace(ids=ids)

    return step


def their_step(model: PreTrainedModel, rows: int, context: int) -> Callable[[], object]:
    """transformers' decode step: as many as will be timed fit into its cache beyond `context`."""
    beyond = 3 + REPEATS * STEPS
    cache = StaticCache(config=model.config, max_cache_len=context + beyond)
    part = max(1, PREFILL_TOKENS // rows)
    with torch.inference_mode():
        for start in range(0, context, part):
            new = min(part, context - start)
            ids = torch.randint(0, model.config.vocab_size, (rows, new), device="cuda")
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    last = torch.zeros(rows, 1, dtype=torch.int64, device="cuda")

    @torch.inference_mode()
    def step() -> None:
        logits = model(last, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        last.copy_(logits[:, -1].argmax(-1, keepdim=True))

    return step


def measure(make_step: Callable[[], Callable[[], object]]) -> tuple[float | None, str | None]:
    """Seconds of a step, or why it could not be had. What it allocated is free again afterwards."""
    try:
        return seconds(make_step(), STEPS), None
    except torch.cuda.OutOfMemoryError:
        return None, "out of memory"
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def rows_of(name: str, batches: list[int], context: int) -> list[dict[str, Any]]:
    from rollout_server.kernels.triton import backend

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = MODELS[name]().eval()
    torch.set_default_dtype(torch.float32)
    with tempfile.TemporaryDirectory() as directory:
        model.config.save_pretrained(directory)
        config = read_config(Path(directory))
    decoder = Decoder(config, model.state_dict(), torch.bfloat16, backend, device="cuda")
    weights = sum(p.numel() for p in model.parameters()) - config.vocab * config.hidden
    speed = bandwidth()
    results = []
    for rows in batches:
        limit = bytes_read(config, weights, rows, context) / speed
        for engine, make_step in (
            ("lrl", lambda rows=rows: our_step(decoder, rows, context)),
            ("transformers", lambda rows=rows: their_step(model, rows, context)),
        ):
            took, error = measure(make_step)
            results.append(
                {
                    "scenario": "decode",
                    "model": name,
                    "concurrency": rows,
                    "context": context,
                    "engine": engine,
                    "tokens_per_second": None if took is None else rows / took,
                    "milliseconds": None if took is None else took * 1e3,
                    "fraction_of_limit": None if took is None else limit / took,
                    "limit_tokens_per_second": rows / limit,
                    "bandwidth_gb_per_second": speed / 1e9,
                    "device": torch.cuda.get_device_name(),
                    "error": error,
                }
            )
            print(json.dumps(results[-1]), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 256])
    parser.add_argument("--context", type=int, default=1024)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    results: list[dict[str, Any]] = []
    for name in asked.models:
        results += rows_of(name, asked.batches, asked.context)
        gc.collect()
        torch.cuda.empty_cache()
        asked.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
