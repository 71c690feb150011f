"""Checks everything that the scheduler keeps against everything else that it keeps."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rollout_server.manager.prefix_tree import Node, PrefixTree
from rollout_server.manager.sequence import Sequence

if TYPE_CHECKING:
    from rollout_server.manager.scheduler import Scheduler


def check_integrity(scheduler: Scheduler) -> None:
    """Raises AssertionError with what is wrong."""
    _check_pages(scheduler)
    _check_slots(scheduler)
    _check_tree(scheduler)
    for sequence in scheduler.running:
        _check_running(sequence, scheduler)
    for sequence in scheduler.waiting.sequences():
        held = sequence.pages or sequence.slot >= 0 or sequence.source >= 0
        assert not held, f"{_name(sequence)} waits and holds pages or a slot"
        assert sequence.drawn == sequence.sampled, f"{_name(sequence)} waits while its results are awaited"


def _check_pages(scheduler: Scheduler) -> None:
    pool, tree = scheduler.memory.pool, scheduler.memory.tree
    holders: Counter[int] = Counter()
    for sequence in scheduler.running:
        holders.update(sequence.pages)
        if sequence.source >= 0:
            holders[sequence.source] += 1
    for plan in scheduler.in_flight:
        holders.update(plan.pages)
    for page in range(pool.total):
        assert pool.holders(page) == holders[page], f"page {page}: {pool.holders(page)} holds, {holders[page]} holders"
    cached = [node.page for node in tree.nodes() if node.page >= 0]
    assert len(cached) == len(set(cached)) == tree.size, "a page stands twice in the prefix tree"
    assert set(cached) == {page for page in range(pool.total) if pool.is_cached(page)}, (
        "the tree's claims differ from it"
    )
    assert pool.idle == sum(not holders[page] for page in cached), "idle pages are miscounted"
    used = set(cached) | {page for page, count in holders.items() if count}
    assert pool.free == pool.total - len(used), f"{pool.free} pages are free, {len(used)} of {pool.total} used: a leak"


def _check_slots(scheduler: Scheduler) -> None:
    taken = [sequence.slot for sequence in scheduler.running]
    taken += [slot for plan in scheduler.in_flight for slot in plan.slots]
    assert sorted(taken + scheduler.free_slots) == list(range(scheduler.slots)), "slots leak, or belong to two"


def _check_tree(scheduler: Scheduler) -> None:
    tree, host = scheduler.memory.tree, scheduler.memory.host
    roots = {(version, adapter) for adapter, version in scheduler.versions.items()}
    assert set(tree.roots()) <= roots, "keys and values of old weights are in the tree"
    on_host = [node.host for node in tree.nodes() if node.host >= 0]
    assert len(on_host) == len(set(on_host)) == host.total - host.free, "host pages leak, or belong to two"
    for root in tree.roots():
        _check_children(tree.root(root), tree)
    for node in tree.nodes():
        _check_children(node, tree)


def _check_children(node: Node, tree: PrefixTree) -> None:
    assert (node.page >= 0) + (node.host >= 0) == (node.parent is not None), "a node is nowhere, or in two places"
    assert node.keys == sorted(node.children), "keys are out of order"
    children = list(node.children.values())
    assert node.on_device == sum(child.page >= 0 for child in children), "children on the device are miscounted"
    assert not children or node.parent is None or len(node.key) == tree.page_size, "a partial page has children"
    for key, after in zip(node.keys, node.keys[1:], strict=False):
        assert after[: len(key)] != key, "a node is a prefix of its sibling"
    for child in children:
        assert child.parent is node
        assert 0 < len(child.key) <= tree.page_size
        assert child.page < 0 or node.host < 0, "a page on the device stands under one in the host tier"
        if node.page >= 0 and child.page >= 0 and tree.pool.holders(child.page):
            assert tree.pool.holders(node.page), "a page is held, and the one before it is not"


def _check_running(sequence: Sequence, scheduler: Scheduler) -> None:
    name, size = _name(sequence), scheduler.memory.page_size
    assert not sequence.ended, f"{name} has ended and runs"
    assert sequence.room == len(sequence.pages) * size, f"{name}: miscounted room"
    assert sequence.source >= 0 or sequence.planned <= sequence.room, f"{name} has no page for its last tokens"
    assert sequence.host_source < 0, f"{name}: a copy from the host tier was forgotten"
    assert sequence.sampled <= sequence.drawn <= max(sequence.max_tokens, 0), f"{name} drew too much"
    unknown = sum(sequence in plan.decoding for plan in scheduler.in_flight)
    assert sequence.drawn - sequence.sampled == unknown, f"{name}: results are missing"
    if sequence.private:
        return
    node = sequence.leaf
    for at in range(sequence.in_tree - 1, -1, -1):
        assert node is not None and node.page == sequence.pages[at], f"{name} stands elsewhere in the tree"  # noqa: PT018
        assert node.key == tuple(sequence.ids[at * size : (at + 1) * size]), f"{name}: the tree has other ids"
        node = node.parent
    assert node is not None and node.parent is None, f"{name}: its prefix is not in the tree"  # noqa: PT018


def _name(sequence: Sequence) -> str:
    return f"{sequence.request.request_id}[{sequence.index}]"
