"""From the name of a model to a directory with a Hugging Face checkpoint.

A name is a built-in (see `BUILT_IN`), a local directory, or a hub id. Built-ins are made once, in the
user's cache, from what installed packages ship: no network. A directory appears in the cache only when it is
complete.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from lightning_rl.errors import ModelError
from rollout_server.models import built_in

_CACHE_FORMAT = "v1"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(name: str) -> Path:
    """Directory that holds `config.json`, safetensors, tokenizer and chat template.

    Raises:
        ModelError: the name is no built-in, no checkpoint directory and no hub id that can be had.
        MissingExtra: the built-in's package is not installed.
    """
    if name in BUILT_IN:
        return _cached(name, BUILT_IN[name])
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} is a directory without config.json", hint="give a Hugging Face checkpoint directory"
            )
        return path
    if _HUB_ID.fullmatch(name):
        return _from_hub(name)
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    suggestion = f"did you mean {near[0]!r}? " if near else ""
    raise ModelError(
        f"no model {name!r}", hint=f"{suggestion}built in are {', '.join(BUILT_IN)}; else give a directory or a hub id"
    )


def at_hand(name: str, file: str) -> Path | None:
    """A file of a model's, if it is on this machine already: nothing is made, and nothing fetched."""
    if name in BUILT_IN:
        path = _place(name) / file
    elif (directory := Path(name).expanduser()).is_dir():
        path = directory / file
    elif _HUB_ID.fullmatch(name):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, file)
        path = Path(cached) if isinstance(cached, str) else directory / file
    else:
        return None
    return path if path.is_file() else None


def cache_dir() -> Path:
    """Where built-in models are kept: `LRL_CACHE`, else the user's cache directory."""
    root = os.environ.get("LRL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "lightning-rl")
    return Path(root).expanduser()


def _place(name: str) -> Path:
    return cache_dir() / "models" / f"{name}-{_CACHE_FORMAT}"


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    target = _place(name)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        make(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # another process was faster: its copy is as good
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"hub model {name!r} could not be had: {type(error).__name__}: {str(error).splitlines()[0]}",
            hint="check the id and the network, or give a local directory",
        ) from error


def _smollm2_moe(directory: Path) -> None:
    """SmolLM2-135M-Instruct, sparsely upcycled to four experts, two for each token."""
    built_in.upcycled(resolve_model("smollm2-135m"), directory)


BUILT_IN: dict[str, Callable[[Path], None]] = {
    "smollm2-135m": built_in.smollm2,
    "smollm2-moe": _smollm2_moe,
    "tiny-llama": built_in.tiny_llama,
    "tiny-moe": built_in.tiny_moe,
}
