"""Reference-counted KV pages. A page is free, or held by sequences and the prefix tree together."""

from __future__ import annotations


class PagePool:
    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def total(self) -> int:
        return len(self._holders)

    def take(self) -> int:
        """A free page, held once. Raises IndexError when there is none: callers ask `free` first."""
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        if not self._holders[page]:
            raise ValueError(f"page {page} is free")
        self._holders[page] += 1

    def release(self, page: int) -> None:
        if not self._holders[page]:
            raise ValueError(f"page {page} is free already")
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)

    def holders(self, page: int) -> int:
        return self._holders[page]
