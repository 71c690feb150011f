"""Work on many episodes at once, of which some may be damaged: those are told, and the others go on without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_rl.errors import StoreError

_OF_A_ROW = "Could not decode to UTF-8"
"""So SQLite's driver says that a text is none. All else that a store says is about the store."""


def each(ids: Sequence[str], work: Callable[[Sequence[str]], None], left_out: Callable[[str, Exception], None]) -> None:
    """`work` is done on all of them; where what is in them breaks it, on halves, down to those that are at fault.

    Raises StoreError for a store that cannot be read.
    """
    try:
        work(ids)
    except Exception as error:
        if isinstance(error, StoreError) and _OF_A_ROW not in str(error):
            raise
        if len(ids) == 1:
            left_out(ids[0], error)
        else:
            each(ids[: len(ids) // 2], work, left_out)
            each(ids[len(ids) // 2 :], work, left_out)
