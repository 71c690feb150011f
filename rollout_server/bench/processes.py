"""A process and its descendants as one thing: frozen while another engine is measured, their peak memory, processor time.

Linux only: all of it is read from /proc.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from lightning_rl.errors import ServerError

FREEZE_TIMEOUT_S = 10.0
_STOPPED = "TtZX"


def tree(pid: int) -> list[int]:
    """`pid` and its living descendants, parents before children."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for parent in found:
        found.extend(children.get(parent, []))
    return found


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def freeze(pid: int) -> None:
    """Stop the tree: it keeps its memory and takes no processor time, not even for polling.

    Raises ServerError if a member does not stop.
    """
    deadline = time.monotonic() + FREEZE_TIMEOUT_S
    while running := [member for member in tree(pid) if _state(member) not in _STOPPED]:
        if time.monotonic() > deadline:
            raise ServerError(f"processes {running} did not stop within {FREEZE_TIMEOUT_S:.0f} s")
        send(running, signal.SIGSTOP)
        time.sleep(0.001)


def thaw(pid: int) -> None:
    send(tree(pid), signal.SIGCONT)


def _state(pid: int) -> str:
    """The letter that `ps` shows; X for a process that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "X"


def reset_peak(pid: int) -> None:
    """Let the tree's peak memory start from what it holds now."""
    for member in tree(pid):
        with contextlib.suppress(OSError):
            Path(f"/proc/{member}/clear_refs").write_text("5")


def peak_memory(pid: int) -> int:
    """Bytes: the sum of the tree's resident peaks (VmHWM). Pages that processes share count for each of them."""
    return sum(_high_water(member) for member in tree(pid))


def _high_water(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def processor_seconds(pid: int) -> float:
    """Of one process since it began, in steps of a hundredth of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
