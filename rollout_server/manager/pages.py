"""Reference-counted KV pages of the device.

A page is free, held (by sequences and passes under way), or idle: in the prefix tree and held by nobody, so that it can
be evicted. The tree's claim (`cache`) is no hold. Free and idle pages together are what a pass can still take.
"""

from __future__ import annotations


class PagePool:
    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._cached = [False] * count
        self.idle = 0

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def available(self) -> int:
        return len(self._free) + self.idle

    @property
    def total(self) -> int:
        return len(self._holders)

    def take(self) -> int:
        """A free page, held once. Raises IndexError when there is none: callers evict first."""
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        if not self._holders[page]:
            if not self._cached[page]:
                raise ValueError(f"page {page} is free")
            self.idle -= 1
        self._holders[page] += 1

    def release(self, page: int) -> bool:
        """Give up one hold. True when the page is idle now."""
        holders = self._holders[page] - 1
        if holders < 0:
            raise ValueError(f"page {page} is not held")
        self._holders[page] = holders
        if holders:
            return False
        if self._cached[page]:
            self.idle += 1
            return True
        self._free.append(page)
        return False

    def cache(self, page: int) -> None:
        """The prefix tree claims a page that is held."""
        if self._cached[page] or not self._holders[page]:
            raise ValueError(f"page {page} is in the tree already, or free")
        self._cached[page] = True

    def uncache(self, page: int) -> None:
        """The prefix tree gives its claim up."""
        if not self._cached[page]:
            raise ValueError(f"page {page} is not in the tree")
        self._cached[page] = False
        if not self._holders[page]:
            self.idle -= 1
            self._free.append(page)

    def holders(self, page: int) -> int:
        return self._holders[page]

    def is_cached(self, page: int) -> bool:
        return self._cached[page]
