"""The packages installed beside this one, and whether Python would find them there.

Their names are general (`tracers` is even the name of an old distribution), so a folder of the user's can shadow them.
That is an error at import, which names the folder, instead of a puzzle later. Nothing is imported to find out.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lightning_rl.errors import LightningError

SIBLINGS = ("tracers", "trainers", "rollout_server")


class ShadowedPackageError(LightningError, ImportError):
    """Another package or module stands in the place of one of ours."""


def check_siblings() -> None:
    home = Path(__file__).resolve().parent.parent
    for name in SIBLINGS:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ShadowedPackageError(
                f"the package {name!r} is missing from {home}",
                hint="reinstall lightning-rl",
            )
        places = [Path(place).resolve() for place in spec.submodule_search_locations or [spec.origin or ""]]
        if places != [home / name]:
            found = ", ".join(map(str, places))
            raise ShadowedPackageError(
                f"{found} shadows the package {name!r} of Lightning RL, which is at {home / name}",
                hint=f"rename it, or take {places[0].parent} off PYTHONPATH, or start Python from another folder",
            )
