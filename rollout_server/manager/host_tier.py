"""Pages of host memory or disk that keep the keys and values of conversations which pause.

Within one `Forward` offloads run before restores, so a host page that the pass being planned reads or writes must not be
given to anybody else in that same pass: such pages are busy until `settle`.
"""

from __future__ import annotations


class HostTier:
    def __init__(self, count: int) -> None:
        self.total = count
        self._free = list(range(count - 1, -1, -1))
        self._busy: set[int] = set()
        self._leaving: list[int] = []

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free page, busy in this pass: it is an offload's target. Raises IndexError when there is none."""
        page = self._free.pop()
        self._busy.add(page)
        return page

    def read(self, page: int) -> None:
        """The pass being planned restores from `page`."""
        self._busy.add(page)

    def is_busy(self, page: int) -> bool:
        return page in self._busy

    def release(self, page: int) -> None:
        if page in self._busy:
            self._leaving.append(page)
        else:
            self._free.append(page)

    def settle(self) -> None:
        """The pass is planned; what it used and gave up is free for the next."""
        self._free += self._leaving
        self._leaving.clear()
        self._busy.clear()
