"""`after_fork`: what a forked child must forget of its parent's threads and locks."""

from __future__ import annotations

import os
from collections.abc import Callable


def after_fork(function: Callable[[], None]) -> Callable[[], None]:
    """A decorator: the function runs in each child that is forked from here on; never where there is no fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)
    return function
