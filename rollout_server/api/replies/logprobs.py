"""Log-probs in OpenAI's two shapes. They are those of the distribution that was sampled from, one entry a sampled
token.

The end-of-turn token has its entry too, so that entries line up with `token_ids`.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from rollout_server.api.choice import Piece
from rollout_server.api.replies.detokenize import token_bytes

_IMPOSSIBLE = -9999.0
"""OpenAI's number for what JSON cannot say: minus infinity."""


def chat_logprobs(tokenizer: Tokenizer, piece: Piece) -> dict[str, Any]:
    content = []
    for at, (token_id, logprob) in enumerate(zip(piece.ids, piece.logprobs, strict=True)):
        top = piece.top_logprobs[at] if piece.top_logprobs else []
        entry = _entry(tokenizer, token_id, logprob)
        content.append({**entry, "top_logprobs": [_entry(tokenizer, i, x) for i, x in top]})
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, piece: Piece, offset: int) -> dict[str, Any]:
    """`offset` is where the piece's text begins in the choice's text."""
    tokens = [_text(tokenizer, i) for i in piece.ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    top = [{_text(tokenizer, i): max(x, _IMPOSSIBLE) for i, x in entries} for entries in piece.top_logprobs]
    return {"tokens": tokens, "token_logprobs": piece.logprobs, "top_logprobs": top or None, "text_offset": offsets}


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = token_bytes(tokenizer, token_id)
    return {"token": raw.decode(errors="replace"), "logprob": max(logprob, _IMPOSSIBLE), "bytes": list(raw)}


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return token_bytes(tokenizer, token_id).decode(errors="replace")
