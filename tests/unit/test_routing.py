"""Requests go where their prefix is, groups stay together, and no replica is left idle while another drowns."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rollout_server.api.engine.routing import CHUNK, LOAD_FACTOR, LOAD_SLACK, PrefixRouter, Route, chunk_chain

SYSTEM = list(range(10 * CHUNK))
OTHER = list(range(1000, 1000 + 10 * CHUNK))


def test_a_conversation_stays_where_it_began() -> None:
    router = PrefixRouter(3, 1 << 16)
    homes = []
    for prompt in (SYSTEM, OTHER, [5] * 200):
        route = router.route(prompt, 1)
        homes.append(route.replica)
        router.release(route)
    assert sorted(homes) == [0, 1, 2]
    for prompt, home in zip((SYSTEM, OTHER, [5] * 200), homes, strict=True):
        turn = router.route(prompt + [7] * 300, 1)
        assert (turn.replica, turn.matched) == (home, len(prompt) // CHUNK * CHUNK)
        longer = router.route(prompt + [7] * 300 + [9] * 64, 1)
        assert (longer.replica, longer.matched) == (home, (len(prompt) + 300) // CHUNK * CHUNK)


def test_adapters_do_not_share_prefixes() -> None:
    router = PrefixRouter(2, 1 << 16)
    router.route(SYSTEM, 1)
    assert router.route(SYSTEM, 1, "french").matched == 0
    assert router.route(SYSTEM, 1, "french").matched == len(SYSTEM)


def test_a_busy_replica_gives_its_prefixes_away() -> None:
    """Up to the stated bound the prefix decides; beyond it, load; and then the second replica knows the prefix too."""
    router = PrefixRouter(2, 1 << 16)
    routes = [router.route(SYSTEM, 1) for _ in range(200)]
    first = next(at for at, route in enumerate(routes) if route.replica == 1)
    assert first == int(LOAD_FACTOR + LOAD_SLACK)
    assert routes[first].matched == 0
    assert abs(router.loads[0] - router.loads[1]) <= LOAD_FACTOR + LOAD_SLACK


def test_one_replica_takes_all() -> None:
    router = PrefixRouter(1, 64)
    assert [router.route(SYSTEM, n).replica for n in (1, 5, 300)] == [0, 0, 0]


def test_the_record_is_bounded_and_forgets_tails_first() -> None:
    router = PrefixRouter(2, 4 * CHUNK)
    home = router.route(SYSTEM, 1).replica
    assert router.route(SYSTEM, 1).matched == 4 * CHUNK
    router.route(SYSTEM[:CHUNK] + [1] * CHUNK, 1)
    assert len(router._known[home]) == 4
    assert router.route(SYSTEM, 1).matched == 3 * CHUNK


@given(a=st.lists(st.integers(0, 1), max_size=300), b=st.lists(st.integers(0, 1), max_size=300))
def test_chains_share_what_prompts_share(a: list[int], b: list[int]) -> None:
    same = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    shared = sum(x == y for x, y in zip(chunk_chain(a), chunk_chain(b), strict=False))
    assert shared == same // CHUNK
    assert not set(chunk_chain(a)) & set(chunk_chain(a, "other"))


@given(
    replicas=st.integers(1, 4),
    steps=st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 16), st.booleans(), st.sets(st.integers(0, 3))), max_size=60
    ),
)
def test_any_traffic(replicas: int, steps: list[tuple[int, int, bool, set[int]]]) -> None:
    """The chosen one can serve and was within the bound, and none within it knew more; what is released adds up to nothing."""
    router = PrefixRouter(replicas, 50 * CHUNK)
    known: list[set[bytes]] = [set() for _ in range(replicas)]
    open_: list[Route] = []
    for kind, sequences, ends, down in steps:
        up = [replica for replica in range(replicas) if replica not in down] or [0]
        prompt = [kind] * CHUNK * (kind + 1)
        chain = chunk_chain(prompt)
        loads = list(router.loads)
        route = router.route(prompt, sequences, among=up)
        bound = LOAD_FACTOR * (min(loads[replica] for replica in up) + sequences) + LOAD_SLACK
        assert route.replica in up
        assert loads[route.replica] + sequences <= bound or len(up) == 1
        for other in up:
            if len(up) > 1 and loads[other] + sequences <= bound:
                assert sum(key in known[other] for key in chain) * CHUNK <= route.matched
        if len(up) > 1:
            known[route.replica].update(chain)
        open_.append(route)
        if ends:
            router.release(open_.pop(0))
        assert min(router.loads) >= 0
    for route in open_:
        router.release(route)
    assert router.loads == [0] * replicas
