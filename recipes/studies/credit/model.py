"""The policy of the study: a Llama of 0.1 M parameters over bytes, that says A, B, C or D alike often in every state.

It is made on the spot: random weights, and then some seconds of supervised learning on the study's conversations with letters
drawn at random, so that every rule starts from the same indifferent policy.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from recipes.studies.credit.agents import LETTERS, TAIL

STEPS = 150
BATCH = 24
LEARNING_RATE = 3e-3
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'][0] + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>a' }}{% endif %}"
)


def make_model(directory: Path) -> None:
    """A checkpoint with tokenizer and chat template, as transformers reads them. Seeded: it is the same every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    _make_indifferent(model, tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _tokenizer() -> Any:
    """Bytes, and what marks a message."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _conversation(draw: random.Random) -> list[str]:
    """The observations of one of the study's conversations."""
    first, tail = draw.choice([("door", "fork"), ("buy", "day"), ("plan", ""), ("", "job")])
    return [*filter(None, [first]), *(f"{tail} {turn}" for turn in range(TAIL) if tail)]


def _make_indifferent(model: Any, tokenizer: Any) -> None:
    import torch

    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, STEPS)
    for _ in range(STEPS):
        ids, labels = zip(*(_example(draw, tokenizer) for _ in range(BATCH)), strict=True)
        longest = max(map(len, ids))
        padded = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
        wanted = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
        loss = model(input_ids=padded, labels=wanted).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _example(draw: random.Random, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids, and the letters among them as labels."""
    ids: list[int] = []
    labels: list[int] = []
    for observation in _conversation(draw):
        letter = tokenizer.encode(draw.choice(LETTERS))
        asked = tokenizer.encode(f"<|im_start|>u{observation}<|im_end|><|im_start|>a")
        ids += [*asked, *letter, tokenizer.eos_token_id]
        labels += [-100] * len(asked) + [*letter, -100]
    return ids, labels
