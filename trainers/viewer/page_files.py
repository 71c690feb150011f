"""The compiled page: three files beside this module, made from `web/` by `make page`."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path

from msgspec import Struct

FOLDER = Path(__file__).parent / "page"
INDEX, SCRIPT, STYLE = "index.html", "viewer.js", "viewer.css"
KINDS = {INDEX: "text/html; charset=utf-8", SCRIPT: "text/javascript; charset=utf-8", STYLE: "text/css; charset=utf-8"}
NONCE = '<meta name="csp-nonce" content="'
HOW = "make page"
MISSING = f"""\
The viewer's page is not built.

In a checkout, `{HOW}` builds it; it takes Node.js 20.19 or 22.12, or newer, with npm. Wheels made of a source archive
have it in them.
Terminals do without: `lrl traces list RUN`, `lrl traces show RUN EPISODE`, `lrl credit RUN`.
"""


class PageFile(Struct, frozen=True):
    body: bytes
    packed: bytes
    """By gzip."""
    tag: str


def is_built(folder: Path = FOLDER) -> bool:
    return all((folder / name).is_file() for name in KINDS)


def prepare(folder: Path = FOLDER) -> None:
    """Read and pack them before somebody waits."""
    if is_built(folder):
        for name in KINDS:
            page_file(folder, name)


def page_file(folder: Path, name: str) -> PageFile:
    """As it is now: it may be built anew while the viewer runs. Raises OSError."""
    path = folder / name
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size)


def index_with(nonce: str, folder: Path) -> bytes:
    text = page_file(folder, INDEX).body.decode()
    return text.replace(NONCE + '"', f'{NONCE}{nonce}"').encode()


@functools.lru_cache(maxsize=8)
def _read(path: Path, changed_at: int, size: int) -> PageFile:
    body = path.read_bytes()
    return PageFile(body=body, packed=gzip.compress(body, 6), tag=f'"{changed_at:x}-{size:x}"')
