"""The page and its answers as one file of HTML, which any browser opens without a server and without a network. Pure.

Script and style stand in the file. A policy in it lets that one script run, by its digest, and nothing be fetched; answers are
data between the tags of a script that is none, with every `<` written otherwise, so that nothing in them can end it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, quote_plus

from lightning_rl.errors import LightningError
from trainers.viewer.encoding import encoded, writable

_SCRIPT_TAG = re.compile(r"<script\b[^>]*\ssrc=[^>]*></script>")
_STYLE_TAG = re.compile(r"<link\b[^>]*\brel=\"stylesheet\"[^>]*>")
_BODY_END = "</body>"
_CHARSET = '<meta charset="utf-8" />'


def address(path: str, query: Mapping[str, str | Sequence[str]] | None = None) -> str:
    """How the page names an answer (`addressOf` in `source.ts`): arguments by name, as `URLSearchParams` writes them."""
    pairs = [
        f"{_argument(name)}={_argument(each)}"
        for name, value in sorted((query or {}).items())
        for each in ([value] if isinstance(value, str) else value)
        if each
    ]
    return f"{path}?{'&'.join(pairs)}" if pairs else path


def of_run(key: str, what: str = "") -> str:
    """As `encodeURIComponent` writes it (`ofRun` in `source.ts`)."""
    name = quote(writable(key), safe="!~*'()")
    return f"run/{name}/{what}" if what else f"run/{name}"


def one_file(index: str, script: str, style: str, answers: Iterable[tuple[str, Any]]) -> Iterator[bytes]:
    """`answers`: records by address. Raises LightningError for a page that is put together in another way."""
    code = inline_script(script)
    head, end = index.replace(_CHARSET, f"{_CHARSET}\n    {_policy(code)}", 1), ""
    head = _in_place_of(_SCRIPT_TAG, head, f'<script type="module">{code}</script>')
    head = _in_place_of(_STYLE_TAG, head, f"<style>{_inline_style(style)}</style>")
    head, body_end, end = head.rpartition(_BODY_END)
    if not body_end or _CHARSET not in head:
        raise _unexpected()
    yield f'{head}<script type="application/json" id="lrl-data">{{'.encode()
    for number, (name, answer) in enumerate(answers):
        yield (b",\n" if number else b"\n") + _embedded(name) + b":" + _embedded(answer)
    yield f"}}</script>\n{body_end}{end}".encode()


def _in_place_of(tag: re.Pattern[str], text: str, content: str) -> str:
    text, count = tag.subn(lambda _: content, text)
    if count != 1:
        raise _unexpected()
    return text


def _unexpected() -> LightningError:
    return LightningError("the viewer's page is not as expected", hint="build it anew: make page")


def _embedded(value: Any) -> bytes:
    return encoded(value).replace(b"<", b"\\u003c")


def inline_script(script: str) -> str:
    """The same program, in which nothing ends a script's element or begins a comment of HTML: all of these stand in strings."""
    return re.sub(r"</(script)", r"<\\/\1", script, flags=re.IGNORECASE).replace("<!--", "\\x3C!--")


def _inline_style(style: str) -> str:
    return re.sub(r"</(style)", r"<\\/\1", style, flags=re.IGNORECASE)


def _policy(code: str) -> str:
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    rules = (
        "default-src 'none'",
        f"script-src 'sha256-{digest}'",
        "style-src 'unsafe-inline'",
        "img-src data:",
        "font-src data:",
        "connect-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
    )
    return f'<meta http-equiv="Content-Security-Policy" content="{"; ".join(rules)}" />'


def _argument(text: str) -> str:
    return quote_plus(writable(text), safe="*").replace("~", "%7E")
