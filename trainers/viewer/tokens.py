"""What token ids stand for, exactly: each id's bytes as the model's own vocabulary has them, without decoding a sequence.

Decoding joins tokens and mends what is broken at their borders; whoever looks at single tokens has to see the borders. So the
bytes of each id are taken from the vocabulary: of byte-level BPE by its table of letters, of SentencePiece with byte fallback from
`<0xE2>`. A tokenizer is only ever read from this machine.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_rl.episode import Call
from rollout_server.models.catalog import BUILT_IN, at_hand
from trainers.viewer.opened import OpenRun
from trainers.viewer.records import TokenColumns

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FILE = "tokenizer.json"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_KEPT = 4
"""Tokenizers."""


class Token(NamedTuple):
    text: str
    is_special: bool = False
    is_broken: bool = False


class Vocabulary:
    """What the ids of one tokenizer stand for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {id: bool(token.special) for id, token in tokenizer.get_added_tokens_decoder().items()}
        self._bytes_of = _byte_level if _has_byte_level(tokenizer) else _sentence_piece
        self._known: dict[int, Token] = {}

    def token(self, id: int) -> Token:
        known = self._known.get(id)
        if known is None:
            known = self._known[id] = self._read(id)
        return known

    def columns(self, ids: Sequence[int]) -> TokenColumns:
        tokens = [self.token(id) for id in ids]
        return TokenColumns(
            ids=list(ids),
            texts=[token.text for token in tokens],
            special=[place for place, token in enumerate(tokens) if token.is_special],
            broken=[place for place, token in enumerate(tokens) if token.is_broken],
        )

    def _read(self, id: int) -> Token:
        piece = self._tokenizer.id_to_token(id) if 0 <= id < 1 << 32 else None
        if piece is None:
            return Token(f"<no token {id}>", is_broken=True)
        if id in self._added:
            return Token(piece, is_special=self._added[id])
        data = self._bytes_of(piece)
        try:
            return Token(data.decode())
        except UnicodeDecodeError:
            return Token(data.decode(errors="backslashreplace"), is_broken=True)


class Reading(NamedTuple):
    vocabulary: Vocabulary | None
    why_not: str = ""


def model_of(run: OpenRun, call: Call) -> str | None:
    """The recipe's. Without one, a record's word is taken for models of ours only: a path or an id in it leads nowhere."""
    if run.recipe is not None:
        return run.recipe.model.name
    return call.model if call.model in BUILT_IN else None


def vocabulary_of(run: OpenRun, call: Call) -> Reading:
    """That of the call's tokens, or why there is none."""
    if call.upstream:
        return Reading(None, f"{call.upstream} answered this call: its tokens are not known")
    model = model_of(run, call)
    if model is None:
        return Reading(None, f"no recipe says which model {call.model!r} was: there are only the ids of its tokens")
    path = at_hand(model, _FILE)
    if path is None:
        hint = (
            f"`lrl serve {model}` puts it there" if model in BUILT_IN or "/" in model else "the run's recipe names it"
        )
        return Reading(None, f"the tokenizer of {model} is not on this machine: {hint}")
    return _KNOWN.of(path)


def no_texts(ids: Sequence[int]) -> TokenColumns:
    return TokenColumns(ids=list(ids), texts=[], special=[], broken=[])


class _Known:
    """The latest tokenizers, by file; a file that has changed is read again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_file: OrderedDict[tuple[str, int, int], Vocabulary] = OrderedDict()

    def of(self, path: Path) -> Reading:
        from tokenizers import Tokenizer

        with self._lock:
            try:
                status = path.stat()
                key = (str(path.resolve()), status.st_mtime_ns, status.st_size)
                if key not in self._by_file:
                    self._by_file[key] = Vocabulary(Tokenizer.from_file(str(path)))
            except Exception as error:  # the library raises bare Exception for what it cannot read
                return Reading(None, f"{path} cannot be read: {error}")
            self._by_file.move_to_end(key)
            while len(self._by_file) > _KEPT:
                self._by_file.popitem(last=False)
            return Reading(self._by_file[key])


_KNOWN = _Known()


def _has_byte_level(tokenizer: Tokenizer) -> bool:
    decoder = tokenizer.decoder
    stages: Any = json.loads(decoder.__getstate__()) if decoder is not None else {}
    return any(stage.get("type") == "ByteLevel" for stage in (stages, *stages.get("decoders", ())))


def _letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level BPE: itself where it can be seen, else the next free one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(seen)]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_LETTERS = _letters()


def _byte_level(piece: str) -> bytes:
    return b"".join(bytes([_LETTERS[letter]]) if letter in _LETTERS else letter.encode() for letter in piece)


def _sentence_piece(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
