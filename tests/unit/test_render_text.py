"""Text as it streams: whole characters, stop strings, log-prob bytes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from rollout_server.api.replies.detokenize import Detokenizer, StopFinder, token_bytes


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = Detokenizer(tokenizer)
    return [*(decoder.feed(i) for i in ids), decoder.finish()]


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30))
def test_pieces_are_the_text_and_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    got = pieces(tokenizer, ids)
    assert "".join(got) == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):  # this vocabulary lacks some bytes
        assert not any("\ufffd" in piece for piece in got)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 49151), st.integers(0, 400)), max_size=20))
def test_any_ids_come_out_as_decoded_at_once(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@given(
    cuts=st.lists(st.text("abc", max_size=4), max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stops_do_not_depend_on_the_pieces(cuts: list[str], stops: list[str]) -> None:
    def read(parts: list[str]) -> tuple[str, str | None]:
        finder, text = StopFinder(stops), ""
        for part in parts:
            text += finder.feed(part)
            if finder.found:
                return text, finder.found
        return text + finder.finish(), None

    whole = "".join(cuts)
    text, found = read(cuts)
    assert (text, found) == read(list(whole)) == read([whole])
    assert bool(found) == any(stop in whole for stop in stops)
    if found:
        end = min(whole.find(stop) + len(stop) for stop in stops if stop in whole)
        assert len(text) + len(found) == end
        assert not any(stop in text for stop in stops)
        assert whole.startswith(text)
        assert any(whole[len(text) :].startswith(stop) for stop in stops)
    else:
        assert text == whole


def test_the_largest_stops_cost_little() -> None:
    stops = ["a" * (64 * n) for n in range(1, 11)]
    begin = time.process_time()
    finder = StopFinder(stops)
    for _ in range(2000):
        finder.feed("a" * 30 + "b")
    assert time.process_time() - begin < 1


def test_spaces_survive_bytes_and_special_tokens() -> None:
    """Decoders like SentencePiece's drop the space before the first word of what they are given."""
    words = ["▁Hi", "▁and", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "</think>"]
    tokenizer = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</think>"])
    decoder = Detokenizer(tokenizer, {6})
    assert [decoder.feed(i) for i in (0, 2, 3, 4, 5, 1, 6, 1)] == ["Hi", "", "", "", "😀", " and", "</think>", " and"]
    assert decoder.finish() == ""


def test_bytes_of_tokens_make_the_text(tokenizer: Tokenizer) -> None:
    text = "Grüße 🌍 世界"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(token_bytes(tokenizer, i) for i in ids) == text.encode()
    assert token_bytes(tokenizer, 2) == b"<|im_end|>"
