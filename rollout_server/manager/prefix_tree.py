"""Which pages hold the keys and values of which token prefixes, per policy version.

A node is one full page, keyed by its tokens under its parent. Pages enter the tree when they are planned, not when
they are computed: a group's samples that arrive together share their prompt in the very pass that computes it (keys
are written before they are read, layer by layer). The tree itself holds each page once; what no sequence holds
besides is evictable, leaves first, least recently used first.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

from rollout_server.manager.pages import PagePool

Root = tuple[int, str]
"""(policy version, adapter name): prefixes under different roots never meet."""


class Node:
    __slots__ = ("children", "key", "page", "parent", "used")

    def __init__(self, parent: Node | None, key: tuple[int, ...], page: int) -> None:
        self.parent, self.key, self.page = parent, key, page
        self.children: dict[tuple[int, ...], Node] = {}
        self.used = 0


class PrefixTree:
    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.pool, self.page_size = pool, page_size
        self._roots: dict[Root, Node] = {}
        self._clock = itertools.count(1)
        self.size = 0

    def match(self, root: Root, ids: Sequence[int]) -> list[Node]:
        """Nodes of the longest known prefix of `ids` in whole pages, leaving at least one token to compute."""
        found: list[Node] = []
        node = self._roots.get(root)
        size = self.page_size
        for start in range(0, len(ids) - size, size):
            node = node.children.get(tuple(ids[start : start + size])) if node else None
            if node is None:
                break
            found.append(node)
        return found

    def touch(self, nodes: Sequence[Node]) -> None:
        now = next(self._clock)
        for node in nodes:
            node.used = now

    def insert(self, root: Root, parent: Node | None, key: tuple[int, ...], page: int) -> Node | None:
        """Add a full page below `parent` (None: at the root).

        Returns None when the tree has that prefix in another page already.
        """
        above = parent or self._roots.setdefault(root, Node(None, (), -1))
        if key in above.children:
            return None
        self.pool.hold(page)
        node = Node(above, key, page)
        node.used = next(self._clock)
        above.children[key] = node
        self.size += 1
        return node

    def evict(self, count: int) -> int:
        """Free up to `count` pages that only the tree holds; returns how many."""
        if count <= 0:
            return 0
        heap = [(node.used, id(node), node) for node in self._nodes() if self._evictable(node)]
        heapq.heapify(heap)
        freed = 0
        while heap and freed < count:
            _, _, node = heapq.heappop(heap)
            parent = node.parent
            assert parent is not None
            del parent.children[node.key]
            self.pool.release(node.page)
            self.size -= 1
            freed += 1
            if parent.parent is not None and self._evictable(parent):
                heapq.heappush(heap, (parent.used, id(parent), parent))
        return freed

    def drop(self, root: Root) -> None:
        """Forget a version: its pages are freed as soon as no sequence holds them."""
        top = self._roots.pop(root, None)
        stack = list(top.children.values()) if top else []
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            self.pool.release(node.page)
            self.size -= 1

    def roots(self) -> list[Root]:
        return list(self._roots)

    def pages(self) -> list[int]:
        return [node.page for node in self._nodes()]

    def _evictable(self, node: Node) -> bool:
        return not node.children and self.pool.holders(node.page) == 1

    def _nodes(self) -> list[Node]:
        found: list[Node] = []
        stack = [child for top in self._roots.values() for child in top.children.values()]
        while stack:
            node = stack.pop()
            found.append(node)
            stack.extend(node.children.values())
        return found
