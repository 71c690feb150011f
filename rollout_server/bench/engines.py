"""Which engines the bench can run, and how each one's driver is started: ours and its peers, as tables."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from lightning_rl.errors import MissingExtra
from rollout_server.bench.engine_process import Launch
from rollout_server.bench.wire import Setup

_ROOT = Path(__file__).resolve().parent.parent.parent
_DRIVERS = _ROOT / "tests" / "bench" / "peers"
MAKE = "tests/bench/peers/make.sh"

PEERS = {
    "transformers": "transformers/bin/python",
    "vllm": "vllm/bin/python",
    "llamacpp": "llamacpp/venv/bin/python",
}
"""Peer → the interpreter of its driver, in the directory that `make.sh` filled."""

WITHOUT_ADAPTERS = {"llamacpp"}
"""It does not batch requests for different adapters, and wants them in a format of its own."""

VARIANTS: dict[str, dict[str, bool | int]] = {
    "no-shared-prefix": {"shared_prefix": False},
    "no-lookahead": {"lookahead": 0},
    "batch-invariant": {"batch_invariant": True},
}
"""Settings of our engine to compare with the standard ones: fields of `EngineConfig`."""


def ours(setup: Setup, variant: str = "") -> Launch:
    overrides = VARIANTS[variant] if variant else {}
    return Launch(
        engine="lrl",
        variant=variant,
        command=[sys.executable, "-m", "rollout_server.bench.lrl_driver"],
        environment={**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONSAFEPATH": "1"},
        setup=msgspec.structs.replace(setup, overrides=overrides),
    )


def peer(name: str, setup: Setup, peers_dir: Path) -> Launch:
    """Raises MissingExtra when the peer's environment or the source tree that holds its driver is not there."""
    driver, home = _DRIVERS / f"{name}_driver.py", peers_dir.resolve() / name
    interpreter = peers_dir.resolve() / PEERS[name]
    if not driver.is_file():
        raise MissingExtra(
            f"the driver of {name} is not in this installation ({driver})",
            hint="peers are run from a checkout of the source tree",
        )
    if not (home / ".complete").is_file():
        raise MissingExtra(
            f"the environment of {name} is not in {peers_dir}", hint=f"make it: {MAKE} {peers_dir} {name}"
        )
    # A peer gets OpenMP's own spinning back: `lrl` shortens it for our processes.
    inherited = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "PYTHONHOME")}
    return Launch(
        engine=name,
        variant="",
        command=[str(interpreter), str(driver)],
        environment={
            **inherited,
            "PYTHONPATH": str(_ROOT),
            "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": str(setup.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        },
        setup=msgspec.structs.replace(setup, home=str(home)),
    )
