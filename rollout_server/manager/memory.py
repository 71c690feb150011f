"""The KV memory of the engine: pages, the prefix tree over them, and the host tier, as one.

Every change that the device must follow is written into the pass being planned. The worker runs passes in order, so a page
that is free now may be taken for the next pass although earlier ones are still under way; within one pass the order is:
offloads, restores, copies, rows.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from rollout_server.manager.host_tier import HostTier
from rollout_server.manager.pages import PagePool
from rollout_server.manager.pass_plan import PassPlan
from rollout_server.manager.prefix_tree import Match, Node, PrefixTree, Root
from rollout_server.manager.sequence import Sequence


class Memory:
    def __init__(self, *, pages: int, page_size: int, host_pages: int = 0) -> None:
        self.page_size = page_size
        self.pool = PagePool(pages)
        self.host = HostTier(host_pages)
        self.tree = PrefixTree(self.pool, self.host, page_size)
        self.evicted = 0

    @property
    def available(self) -> int:
        """Pages that can be taken at once."""
        return self.pool.available

    def take(self, plan: PassPlan) -> int:
        """A page, held. What is least recently used gives way; the caller has made sure that something is `available`."""
        if not self.pool.free:
            self.evicted += 1
            offloaded = self.tree.evict()
            if offloaded is not None:
                plan.offloads.append(offloaded)
        return self.pool.take()

    def release(self, pages: Ordered[int]) -> None:
        """Give up holds, in the order of the pages within their prefix."""
        self.tree.released(pages)

    def newly_needed(self, match: Match, length: int) -> int:
        """How much `available` shrinks when a sequence of `length` tokens starts from `match`."""
        on_device = [node for node in match.nodes if node.page >= 0]
        idle = sum(not self.pool.holders(node.page) for node in on_device)
        if match.partial is not None and match.partial.page >= 0:
            idle += not self.pool.holders(match.partial.page)
        return -(-length // self.page_size) - len(on_device) + idle

    def attach(self, sequence: Sequence, match: Match, root: Root, plan: PassPlan) -> None:
        """Start a sequence from what is known of its ids."""
        for node in match.nodes:
            if node.page >= 0:
                self.pool.hold(node.page)
            else:
                self.host.read(node.host)
        sequence.pages = [node.page for node in match.nodes]
        partial = match.partial
        if partial is not None and partial.page >= 0:
            self.pool.hold(partial.page)
            sequence.source = partial.page
        elif partial is not None:
            self.host.read(partial.host)
            sequence.host_source = partial.host
        self.tree.touch([*match.nodes, partial] if partial is not None else match.nodes)
        for at, node in enumerate(match.nodes):
            if node.page < 0:
                page = self.take(plan)
                plan.restores.append((node.host, page))
                self.tree.restore(node, page)
                sequence.pages[at] = page
        sequence.in_tree = len(match.nodes)
        sequence.leaf = match.nodes[-1] if match.nodes else self.tree.root(root)
        sequence.room = len(sequence.pages) * self.page_size
        sequence.planned = sequence.room + match.partial_tokens

    def fork(self, sequence: Sequence, leader: Sequence) -> None:
        """Start a sequence from one with the same ids whose prompt is in the pass being planned."""
        whole = len(leader.ids) // self.page_size
        sequence.pages = leader.pages[:whole]
        for page in sequence.pages:
            self.pool.hold(page)
        if len(leader.pages) > whole:
            sequence.source = leader.pages[whole]
            self.pool.hold(sequence.source)
        assert leader.in_tree == whole
        sequence.in_tree, sequence.leaf = whole, leader.leaf
        sequence.room = whole * self.page_size
        sequence.planned = leader.planned

    def extend(self, sequence: Sequence, count: int, plan: PassPlan) -> None:
        """`count` more pages; the first starts as the copy that the sequence waits for, if any."""
        for _ in range(count):
            page = self.take(plan)
            sequence.pages.append(page)
            if sequence.source >= 0:
                plan.copies.append((sequence.source, page))
                plan.pages.append(sequence.source)
                sequence.source = -1
            elif sequence.host_source >= 0:
                plan.restores.append((sequence.host_source, page))
                sequence.host_source = -1
        sequence.room += count * self.page_size

    def remember(self, sequence: Sequence, step: int) -> list[int]:
        """Enter pages that are full, and whose ids are known, into the tree.

        Returns held pages that the sequence gave up because the tree has equal ones: `step` may still write to them.
        """
        doubles: list[int] = []
        if sequence.private:
            return doubles
        size = self.page_size
        known = min(sequence.planned, len(sequence.ids))
        while (sequence.in_tree + 1) * size <= known:
            at = sequence.in_tree
            self._forget_tail(sequence)
            assert sequence.leaf is not None
            page = sequence.pages[at]
            node = self.tree.insert(sequence.leaf, tuple(sequence.ids[at * size : (at + 1) * size]), page, step)
            if node.page != page:
                self.pool.hold(node.page)
                sequence.pages[at] = node.page
                sequence.sent = min(sequence.sent, at)
                doubles.append(page)
            sequence.leaf = node
            sequence.in_tree += 1
        return doubles

    def remember_tail(self, sequence: Sequence, step: int) -> None:
        """Enter what is known of the page that is not full."""
        at = sequence.in_tree
        known = min(sequence.planned, len(sequence.ids), sequence.room)
        if sequence.private or known <= at * self.page_size:
            return
        self._forget_tail(sequence)
        assert sequence.leaf is not None
        key = tuple(sequence.ids[at * self.page_size : known])
        sequence.tail = self.tree.insert_partial(sequence.leaf, key, sequence.pages[at], step)

    def drop(self, root: Root) -> None:
        self.tree.drop(root)

    def settle(self) -> None:
        """The pass is planned."""
        self.host.settle()

    def _forget_tail(self, sequence: Sequence) -> None:
        tail: Node | None = sequence.tail
        if tail is not None and tail.parent is not None and tail.page >= 0:
            self.tree.remove(tail)
        sequence.tail = None
