"""The prefix tree against a set of prefixes."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.manager.host_tier import HostTier
from rollout_server.manager.pages import PagePool
from rollout_server.manager.prefix_tree import Match, Node, PrefixTree

PAGE = 4
ROOT = (0, "")


def empty(pages: int = 200, host_pages: int = 0) -> PrefixTree:
    return PrefixTree(PagePool(pages), HostTier(host_pages), PAGE)


def keep(tree: PrefixTree, ids: list[int], step: int = 0) -> list[int]:
    """Insert all of `ids`, as a sequence that ends does; the pages it held."""
    parent: Node = tree.root(ROOT)
    held = []
    for start in range(0, len(ids), PAGE):
        page = tree.pool.take()
        held.append(page)
        key = tuple(ids[start : start + PAGE])
        if len(key) == PAGE:
            parent = tree.insert(parent, key, page, step)
            if parent.page != page:
                tree.released([page])
                tree.pool.hold(parent.page)
                held[-1] = parent.page
        else:
            tree.insert_partial(parent, key, page, step)
    tree.released(held)
    return held


def known(match: Match) -> int:
    return len(match.nodes) * PAGE + match.partial_tokens


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=14), min_size=1, max_size=20),
    st.lists(st.integers(1, 3), min_size=1, max_size=16),
)
def test_a_match_is_exact_to_the_token(kept: list[list[int]], ids: list[int]) -> None:
    tree = empty()
    for each in kept:
        keep(tree, each)
    prefixes = {tuple(each[:i]) for each in kept for i in range(len(each) + 1)}
    longest = max(i for i in range(len(ids) + 1) if tuple(ids[:i]) in prefixes)
    match = tree.match(ROOT, ids)
    assert match.known == longest
    assert known(match) == min(longest, len(ids) - 1)
    for at, node in enumerate(match.nodes):
        assert node.key == tuple(ids[at * PAGE : (at + 1) * PAGE])
    if match.partial is not None:
        start = len(match.nodes) * PAGE
        assert match.partial.key[: match.partial_tokens] == tuple(ids[start : start + match.partial_tokens])
    assert tree.match((1, ""), ids).known == 0
    assert tree.match((0, "other"), ids).known == 0


def test_a_longer_tail_supersedes_a_shorter_one() -> None:
    tree = empty()
    (short,) = keep(tree, [1, 2])
    assert tree.pool.idle == 1
    keep(tree, [1, 2, 3])
    assert tree.size == 1
    assert not tree.pool.is_cached(short)
    keep(tree, [1, 2, 3, 4, 5])
    keep(tree, [1, 2, 4])
    assert tree.size == 3
    keep(tree, [1, 2])
    assert tree.size == 3


def test_least_recently_used_goes_first_and_leaves_before_their_parents() -> None:
    tree = empty(pages=6)
    keep(tree, [1] * 8)
    keep(tree, [2] * 8)
    keep(tree, [3] * 4)
    tree.touch(tree.match(ROOT, [1] * 9).nodes)
    for _ in range(2):
        assert tree.evict() is None
    assert known(tree.match(ROOT, [2] * 9)) == 0
    assert known(tree.match(ROOT, [1] * 9)) == 8
    tree.evict()
    tree.evict()
    assert known(tree.match(ROOT, [3] * 9)) == 0
    assert known(tree.match(ROOT, [1] * 9)) == 4


def test_held_pages_are_not_evicted() -> None:
    tree = empty(pages=3)
    first, second = keep(tree, [1] * 8)
    tree.pool.hold(first)
    tree.evict()
    assert not tree.pool.is_cached(second)
    assert tree.pool.available == 2
    assert tree.pool.is_cached(first)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6))
def test_both_tiers_hold_what_they_say(seed: int, host_pages: int) -> None:
    """Random insertions and evictions: what was offloaded is found on the host page that it went to."""
    rng = random.Random(seed)
    tree = empty(pages=8, host_pages=host_pages)
    on_host: dict[int, tuple[int, ...]] = {}
    for _ in range(60):
        if rng.random() < 0.5 and tree.pool.free >= 4:
            keep(tree, [rng.randint(1, 2) for _ in range(rng.randint(1, 14))])
        elif tree.pool.idle:
            by_page = {node.page: node for node in tree.nodes() if node.page >= 0}
            offloaded = tree.evict()
            if offloaded is not None:
                on_host[offloaded[1]] = prefix(by_page[offloaded[0]])
        if rng.random() < 0.5:
            tree.host.settle()
        for node in tree.nodes():
            assert (node.page >= 0) != (node.host >= 0)
            if node.host >= 0:
                assert on_host[node.host] == prefix(node)
                assert all(child.host >= 0 for child in node.children.values())
    tree.host.settle()
    tree.drop(ROOT)
    assert tree.pool.free == 8
    assert tree.host.free == host_pages


def prefix(node: Node) -> tuple[int, ...]:
    return (*prefix(node.parent), *node.key) if node.parent is not None else ()


def test_queued_leaves_do_not_pile_up() -> None:
    tree = empty(pages=4)
    for _ in range(5000):
        keep(tree, [1] * 8)
    assert len(tree._device_leaves) < 200
    assert tree.evict() is None
