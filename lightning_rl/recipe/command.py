"""`agent.command`: checked before anything starts, so that a misspelt program is not found by a thousand failing episodes."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path


def check_command(command: str, folder: Path) -> list[str]:
    """The command's words, as a POSIX shell would split them. ValueError if it cannot be started in `folder`."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"{command!r} cannot be split into words: {str(error).lower()}") from None
    if not words:
        raise ValueError("the command is empty")
    program = words[0]
    if "/" in program:
        path = folder / Path(program).expanduser()
        if not path.is_file():
            raise ValueError(f"there is no program {path}")
        if not os.access(path, os.X_OK):
            raise ValueError(f"{path} is not executable: chmod +x it, or name its interpreter first")
    elif shutil.which(program) is None:
        raise ValueError(f"there is no program {program!r} on PATH")
    return words
