"""Threads that an agent has left running when it returns: waited for, as Python waits at the end of a program.

Daemon threads are not waited for, nor are idle workers of thread pools, which would wait for work for ever. How long an episode
may take is the runner's business.
"""

from __future__ import annotations

import concurrent.futures.process
import concurrent.futures.thread
import sys
import threading
import time

PAUSE_S = 0.02
"""Time for a pool's worker to take up work that it has been given already."""
PATIENCE_S = 2.0
"""How long it is waited for without a word."""


def wait_for_threads() -> None:
    """Returns when none is at work. After a while says on standard error who is, for the agent's log."""
    idle: set[threading.Thread] = set()
    said_at = time.monotonic() + PATIENCE_S
    while left := [thread for thread in threading.enumerate() if _counts(thread)]:
        was_idle, idle = idle, {thread for thread in left if _is_idle(thread)}
        busy = [thread for thread in left if thread not in was_idle or thread not in idle]
        if not busy:
            return
        if time.monotonic() > said_at:
            said_at = float("inf")
            names = ", ".join(thread.name for thread in busy)
            print(f"the agent has returned; waiting for its threads: {names}", file=sys.stderr)
        busy[0].join(PAUSE_S)


def _counts(thread: threading.Thread) -> bool:
    if thread.daemon or thread is threading.main_thread() or thread is threading.current_thread():
        return False
    return type(thread).__module__ != concurrent.futures.process.__name__  # waits for its pool to be closed


def _is_idle(thread: threading.Thread) -> bool:
    """Whether it waits for a thread pool to give it work."""
    frame = sys._current_frames().get(thread.ident or 0)
    code = frame.f_code if frame is not None else None
    return code is not None and (code.co_filename, code.co_name) == (concurrent.futures.thread.__file__, "_worker")
