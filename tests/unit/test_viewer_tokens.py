"""Single tokens as text: put together again they are what the tokenizer decodes, byte for byte; and nothing is fetched for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from tests.unit.domain import make_call, make_recipe
from trainers.viewer.opened import OpenRun
from trainers.viewer.records import TokenColumns
from trainers.viewer.tokens import Vocabulary, vocabulary_of

TEXTS = [
    "Hello, world!\n\n  two",
    "naïve 3 × 4 → [12] 🦜👩‍👩‍👧‍👦 end",
    "\t\r\x00\x1b[31m",
    "日本語 \\xe2 </tool_call>",
    "<|im_start|>user\nhi<|im_end|>",
]


def together(columns: TokenColumns) -> bytes:
    """Broken tokens have their bytes as `\\xe2`."""
    parts = []
    for place, text in enumerate(columns.texts):
        data = text.encode()
        parts.append(
            re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), data)
            if place in columns.broken
            else data
        )
    return b"".join(parts)


@pytest.fixture(scope="module", params=["tiny_llama", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.from_file(str(request.getfixturevalue(request.param) / "tokenizer.json"))


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_what_the_tokenizer_decodes(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    columns = Vocabulary(tokenizer).columns(ids)
    assert together(columns).decode() == tokenizer.decode(ids, skip_special_tokens=False) == text
    assert columns.ids == ids
    for place, (id, shown) in enumerate(zip(ids, columns.texts, strict=True)):
        if place not in columns.broken:
            assert shown == tokenizer.decode([id], skip_special_tokens=False)
    assert bool(columns.special) == ("<|im_end|>" in text)
    assert bool(columns.broken) == ("🦜" in text or "日" in text)


def test_ids_that_mean_nothing_are_said_to(tokenizer: Tokenizer) -> None:
    columns = Vocabulary(tokenizer).columns([2, 10**6, -1, 2**40])
    assert columns.texts == ["<|im_end|>", "<no token 1000000>", "<no token -1>", f"<no token {2**40}>"]
    assert (columns.special, columns.broken) == ([0], [1, 2, 3])


def test_byte_fallback_of_sentencepiece() -> None:
    pieces = ["<unk>", "▁hi", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(
        models.BPE({piece: id for id, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>"])
    ids = [1, 2, *(3 + byte for byte in "🦜".encode()), 3 + ord("a")]
    columns = Vocabulary(made).columns(ids)
    assert columns.texts == [" hi", " ", "\\xf0", "\\x9f", "\\xa6", "\\x9c", "a"]
    assert columns.broken == [2, 3, 4, 5]
    assert together(columns).decode() == made.decode(ids)


def test_which_tokenizer(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, call = None, make_call([1], [2], model="tiny-llama")
    own = OpenRun("k", store, None, make_recipe(tmp_path, model={"name": str(tiny_llama)}))  # type: ignore[arg-type]
    bare = OpenRun("k", store, None, None)  # type: ignore[arg-type]
    assert vocabulary_of(own, call).vocabulary is not None
    assert vocabulary_of(bare, call).vocabulary is not None, "one of ours is known by its name"
    elsewhere = make_call([1], [2], model=str(tiny_llama))
    assert vocabulary_of(bare, elsewhere).vocabulary is None, "a path in a record leads nowhere"
    assert "provider" in vocabulary_of(own, make_call([], [], upstream="provider")).why_not
    monkeypatch.setenv("LRL_CACHE", str(tmp_path / "empty"))
    assert "not on this machine" in vocabulary_of(bare, call).why_not
    assert not (tmp_path / "empty").exists()
