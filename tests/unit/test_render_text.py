"""Text as it streams: whole characters, stop strings, log-prob bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

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
    def read(parts: list[str]) -> tuple[str, bool]:
        finder, text = StopFinder(stops), ""
        for part in parts:
            for char in part:  # one at a time, as the earliest possible end counts
                text += finder.feed(char)
                if finder.found:
                    return text, True
        return text + finder.finish(), False

    whole = "".join(cuts)
    text, found = read(cuts)
    assert found == any(stop in whole for stop in stops)
    if found:
        assert not any(stop in text for stop in stops)
        assert whole.startswith(text)
        assert any(whole[len(text) :].startswith(stop) for stop in stops)
    else:
        assert text == whole


def test_an_inclusive_stop_stays() -> None:
    finder = StopFinder([], ["</x>"])
    assert finder.feed("a</") + finder.feed("x>b") == "a</x>"
    assert finder.found


def test_bytes_of_tokens_make_the_text(tokenizer: Tokenizer) -> None:
    text = "Grüße 🌍 世界"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(token_bytes(tokenizer, i) for i in ids) == text.encode()
    assert token_bytes(tokenizer, 2) == b"<|im_end|>"
