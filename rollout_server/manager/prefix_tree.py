"""Which pages hold the keys and values of which token prefixes: a radix tree, exact to the token.

One root for each (version, adapter): prefixes under different weights never meet. A node is one page, keyed by its tokens
under its parent. A full page's node may have children; a partial one, a sequence's tail, has none. Children are kept in
the order of their keys, so the one that shares most tokens with a query stands next to where the query would stand. No
child's key is a prefix of its sibling's: the longer one serves both.

A node stands on the device or in the host tier. What stands under a host node stands in the host tier too, and whoever
holds a node's page holds its ancestors', so idle pages can always be evicted, leaves first, least recently used first.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rollout_server.manager.host_tier import HostTier
from rollout_server.manager.pages import PagePool

Root = tuple[int, str]
"""(version, adapter name)."""
Key = tuple[int, ...]


class Node:
    __slots__ = ("children", "host", "key", "keys", "on_device", "page", "parent", "step", "used")

    def __init__(self, parent: Node | None, key: Key, page: int, step: int) -> None:
        self.parent, self.key = parent, key
        """`parent` None: a root, or no longer in the tree."""
        self.page, self.host = page, -1
        """Device page and host page; -1 where it is not."""
        self.children: dict[Key, Node] = {}
        self.keys: list[Key] = []
        """The children's keys, sorted."""
        self.on_device = 0
        """Children with a device page."""
        self.step = step
        """The pass that computes the page: copies made for a later pass find its keys and values there."""
        self.used = 0


class Match(NamedTuple):
    """The longest known prefix of some ids."""

    nodes: list[Node]
    """Whole pages; those on the device first, then those in the host tier."""
    partial: Node | None
    """Has `partial_tokens` more, in its page's first cells."""
    partial_tokens: int
    known: int
    """Tokens known in all: one more than can be used if even the last id is known."""


NO_MATCH = Match([], None, 0, 0)


class PrefixTree:
    def __init__(self, pool: PagePool, host: HostTier, page_size: int) -> None:
        self.pool, self.host, self.page_size = pool, host, page_size
        self.size = 0
        """Nodes on the device."""
        self._roots: dict[Root, Node] = {}
        self._nodes: list[Node | None] = [None] * pool.total
        self._clock = itertools.count(1)
        self._device_leaves: list[tuple[int, int, Node]] = []
        self._host_leaves: list[tuple[int, int, Node]] = []
        self._serial = itertools.count()

    # looking up -------------------------------------------------------------------------------------------------------

    def root(self, root: Root) -> Node:
        return self._roots.setdefault(root, Node(None, (), -1, 0))

    def match(self, root: Root, ids: Sequence[int]) -> Match:
        """What is known of `ids`, leaving at least the last one to compute."""
        node = self._roots.get(root)
        if node is None:
            return NO_MATCH
        size, start = self.page_size, 0
        whole = (len(ids) - 1) // size
        nodes: list[Node] = []
        while len(nodes) < whole:
            child = node.children.get(tuple(ids[start : start + size]))
            if child is None:
                break
            nodes.append(child)
            node = child
            start += size
        partial, common = _closest(node, tuple(ids[start : start + size]))
        usable = min(common, len(ids) - 1 - start)
        return Match(nodes, partial if usable else None, usable, start + common)

    def touch(self, nodes: Sequence[Node]) -> None:
        """Used now."""
        now = next(self._clock)
        for node in nodes:
            node.used = now
            self._offer(node)

    def roots(self) -> list[Root]:
        return list(self._roots)

    def nodes(self) -> Iterator[Node]:
        """All nodes, parents before children."""
        stack = [child for top in self._roots.values() for child in top.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    # growing ----------------------------------------------------------------------------------------------------------

    def insert(self, parent: Node, key: Key, page: int, step: int) -> Node:
        """The node of a full page. If the tree has it on another device page, that node; the caller moves over to it."""
        node = parent.children.get(key)
        if node is None:
            return self._add(parent, key, page, step)
        if node.page < 0:
            self.restore(node, page)
            node.step = step
        return node

    def insert_partial(self, parent: Node, key: Key, page: int, step: int) -> Node | None:
        """A tail's node; None where the tree has these tokens already."""
        at = bisect_left(parent.keys, key)
        if at < len(parent.keys) and parent.keys[at][: len(key)] == key:
            return None
        return self._add(parent, key, page, step)

    def restore(self, node: Node, page: int) -> None:
        """A host node's page is on the device again. `page` is held by the caller."""
        assert node.parent is not None
        self.host.release(node.host)
        node.host, node.page = -1, page
        node.parent.on_device += 1
        self._place(node)

    def _add(self, parent: Node, key: Key, page: int, step: int) -> Node:
        at = bisect_left(parent.keys, key)
        if at and parent.keys[at - 1] == key[: len(parent.keys[at - 1])]:
            at -= 1
            self.remove(parent.children[parent.keys[at]])
        node = Node(parent, key, page, step)
        parent.children[key] = node
        parent.keys.insert(at, key)
        parent.on_device += 1
        node.used = next(self._clock)
        self._place(node)
        return node

    def _place(self, node: Node) -> None:
        self.pool.cache(node.page)
        self._nodes[node.page] = node
        self.size += 1

    # shrinking --------------------------------------------------------------------------------------------------------

    def remove(self, node: Node) -> None:
        """Take a node without children out of the tree; its page is free as soon as nobody holds it."""
        parent = node.parent
        assert parent is not None
        assert not node.children
        del parent.children[node.key]
        del parent.keys[bisect_left(parent.keys, node.key)]
        if node.page >= 0:
            parent.on_device -= 1
            self._displace(node)
        else:
            self.host.release(node.host)
            node.host = -1
        node.parent = None
        self._offer(parent)

    def drop(self, root: Root) -> None:
        """Forget a version; its pages are free as soon as nobody holds them."""
        top = self._roots.pop(root, None)
        if top is not None:
            self._drop_below(top)

    def released(self, pages: Sequence[int]) -> None:
        """Holds of these pages are given up. The last page of a prefix first: leaves go before what they stand on."""
        now = next(self._clock)
        for page in reversed(pages):
            if self.pool.release(page):
                node = self._nodes[page]
                assert node is not None
                node.used = now
                self._offer(node)

    def evict(self) -> tuple[int, int] | None:
        """Free one device page; (device page, host page) if its keys and values go to the host tier instead of away.

        Raises IndexError when no page is idle.
        """
        while True:
            used, _, node = heapq.heappop(self._device_leaves)
            if node.used == used and self._is_device_leaf(node):
                break
        target = self._host_page()
        parent = node.parent
        assert parent is not None
        if target is None:
            self._drop_below(node)
            self.remove(node)
            return None
        page = node.page
        self._displace(node)
        node.host = target
        parent.on_device -= 1
        self._offer(node)
        self._offer(parent)
        return page, target

    def _host_page(self) -> int | None:
        busy: list[tuple[int, int, Node]] = []
        while not self.host.free and self._host_leaves:
            entry = heapq.heappop(self._host_leaves)
            node = entry[2]
            if node.used != entry[0] or not _is_host_leaf(node):
                continue
            if self.host.is_busy(node.host):
                busy.append(entry)
            else:
                self.remove(node)
        for entry in busy:
            heapq.heappush(self._host_leaves, entry)
        return self.host.take() if self.host.free else None

    def _drop_below(self, top: Node) -> None:
        stack = list(top.children.values())
        top.children, top.keys, top.on_device = {}, [], 0
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.page >= 0:
                self._displace(node)
            else:
                self.host.release(node.host)
                node.host = -1
            node.parent = None
            node.children, node.keys, node.on_device = {}, [], 0

    def _displace(self, node: Node) -> None:
        self.pool.uncache(node.page)
        self._nodes[node.page] = None
        node.page = -1
        self.size -= 1

    # least recently used ----------------------------------------------------------------------------------------------

    def _offer(self, node: Node) -> None:
        """Queue a node for eviction if it can be evicted. Entries that no longer hold are skipped when they come up."""
        if self._is_device_leaf(node):
            self._push(self._device_leaves, node)
        elif _is_host_leaf(node):
            self._push(self._host_leaves, node)

    def _push(self, leaves: list[tuple[int, int, Node]], node: Node) -> None:
        heapq.heappush(leaves, (node.used, next(self._serial), node))
        if len(leaves) > 4 * (self.pool.total + self.host.total) + 64:
            on_device = leaves is self._device_leaves
            newest: dict[Node, tuple[int, int, Node]] = {}
            for entry in leaves:
                leaf = entry[2]
                if leaf.used == entry[0] and (self._is_device_leaf(leaf) if on_device else _is_host_leaf(leaf)):
                    newest[leaf] = entry
            leaves[:] = newest.values()
            heapq.heapify(leaves)

    def _is_device_leaf(self, node: Node) -> bool:
        return node.page >= 0 and not node.on_device and node.parent is not None and not self.pool.holders(node.page)


def _is_host_leaf(node: Node) -> bool:
    return node.host >= 0 and not node.children and node.parent is not None


def _closest(node: Node, key: Key) -> tuple[Node | None, int]:
    """The child that shares most first tokens with `key`, and how many."""
    at = bisect_left(node.keys, key)
    best: Node | None = None
    most = 0
    for neighbour in node.keys[max(0, at - 1) : at + 1]:
        common = _common(neighbour, key)
        if common > most:
            best, most = node.children[neighbour], common
    return best, most


def _common(a: Key, b: Key) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
