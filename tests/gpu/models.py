"""Tiny random models of every dense family, and greedy decoding on our decoder with and without graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rollout_server.kernels.interface import Batch, Kernels, SharedRun
from rollout_server.models.config import read_config
from rollout_server.models.decoder import Decoder, load_decoder

PAGE = 16
_SHAPE = {
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=64)),
}


def make(family: str, directory: Path, kernels: Kernels, dtype: torch.dtype) -> tuple[PreTrainedModel, Decoder]:
    """The same weights in transformers and in our decoder, both on the GPU."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    model.save_pretrained(directory)
    decoder = load_decoder(directory, read_config(directory), dtype, kernels, device="cuda")
    return model.to("cuda", dtype), decoder


class Greedy:
    """Decodes prompts together. Row r owns `pages_each` pages from r * pages_each on; the last page is scratch."""

    def __init__(self, decoder: Decoder, rows: int, pages_each: int) -> None:
        self.decoder, self.rows = decoder, rows
        self.scratch = rows * pages_each
        device = torch.device("cuda")
        self.cache = decoder.kernels.allocate(decoder.config, self.scratch + 1, PAGE, decoder.dtype, device)
        self.tables = torch.arange(rows * pages_each, dtype=torch.int32, device=device).view(rows, pages_each)

    def batch(self, ids: list[list[int]], starts: list[int], runs: list[SharedRun] | None = None) -> Batch:
        def ints(values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device="cuda")

        positions: list[int] = []
        cells: list[int] = []
        offsets = [0]
        tables = self.tables.tolist()
        for row, (new, start) in enumerate(zip(ids, starts, strict=True)):
            here = range(start, start + len(new))
            positions += here
            cells += [tables[row][p // PAGE] * PAGE + p % PAGE for p in here]
            offsets.append(offsets[-1] + len(new))
        lengths = [start + len(new) for new, start in zip(ids, starts, strict=True)]
        return Batch(
            ids=ints([token for new in ids for token in new], torch.int64),
            positions=ints(positions),
            cells=ints(cells, torch.int64),
            offsets=ints(offsets),
            tables=self.tables,
            lines=ints(list(range(len(ids)))),
            lengths=ints(lengths),
            longest=max(lengths),
            most=max(map(len, ids)),
            runs=runs or [],
        )

    @torch.inference_mode()
    def decode(
        self,
        prompts: list[list[int]],
        steps: int,
        hidden_states: Callable[[Batch], torch.Tensor],
        runs: list[SharedRun] | None = None,
    ) -> tuple[list[list[int]], torch.Tensor]:
        """Greedy ids [row][step], and the logits [steps, rows, V] they were taken from. `hidden_states` computes the
        decode passes."""
        whole = self.batch(prompts, [0] * len(prompts))
        last = whole.offsets[1:].long() - 1
        logits = [self.decoder.logits(self.decoder.hidden_states(whole, self.cache)[last])]
        for step in range(steps - 1):
            ids = logits[-1].argmax(-1).tolist()
            batch = self.batch([[i] for i in ids], [len(prompt) + step for prompt in prompts], runs)
            logits.append(self.decoder.logits(hidden_states(batch)).clone())
        stacked = torch.stack(logits)
        return stacked.argmax(-1).T.tolist(), stacked


def prompts(rows: int, *, seed: int = 1, vocab: int = 1024) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 90, (rows,), generator=generator).tolist()
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]
