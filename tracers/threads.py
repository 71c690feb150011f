"""What a thread pool is given to do belongs to the rollout and the span that gave it.

Pools outlive rollouts and serve many at once, so the pool's threads belong to none: only the variables of ours travel,
with each piece of work. A bare `threading.Thread` is not followed: nothing says for whom it works.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures.thread import ThreadPoolExecutor
from typing import Any

from tracers.context import carried


def hook_thread_pools() -> None:
    """Follow `submit`, and with it `map` and asyncio's `run_in_executor`."""
    original: Callable[..., Any] = ThreadPoolExecutor.submit

    @functools.wraps(original)
    def submit(self: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return original(self, carried(function), *args, **kwargs)

    ThreadPoolExecutor.submit = submit  # type: ignore[assignment, method-assign]
