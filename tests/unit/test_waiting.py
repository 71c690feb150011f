"""The queue: order of arrival within a flow, fairness between flows, nobody starves, nothing grows."""

from __future__ import annotations

import itertools
import random
import time
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.manager.sequence import Request, Sequence
from rollout_server.manager.waiting import AGING, SLACK, FairQueue, WaitingQueue

numbers = itertools.count()


def arriving(flow: str = "", *, cost: int = 1, n: int = 1, priority: int = 0) -> list[Sequence]:
    """The choices of a request."""
    request = Request("", flow=flow)
    return [
        Sequence(
            number=next(numbers),
            request=request,
            ids=[1],
            prompt_length=10,
            sampling=None,
            index=index,
            priority=priority,
            cost=cost,
        )
        for index in range(n)
    ]


@given(st.integers(0, 2**32))
def test_one_flow_is_served_in_order_of_arrival_within_a_priority(seed: int) -> None:
    """Of priorities, the best goes first unless another is due. Who is preempted comes back first."""
    rng = random.Random(seed)
    queue = WaitingQueue()
    inside: list[Sequence] = []
    for _ in range(60):
        if rng.random() < 0.6:
            (one,) = arriving(cost=rng.randint(1, 9), priority=rng.randrange(3))
            inside.append(one)
            queue.push(one)
        elif inside and rng.random() < 0.3:
            gone = inside.pop(rng.randrange(len(inside)))
            gone.ended = True
            queue.discard(gone)
        elif inside:
            first = min(inside, key=lambda s: (s.priority, s.number))
            assert queue.head() is first
            assert queue.pop() is first
            inside.remove(first)
            if rng.random() < 0.3:
                queue.put_back(first)
                inside.append(first)
        assert len(queue) == len(inside)
        assert queue.tokens == 10 * len(inside)
        assert set(queue.sequences()) == set(inside)


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_flows_keep_their_order_and_nobody_is_lost(seed: int, flows: int) -> None:
    """Arrivals, admissions, preemptions and cancellations at random: work is conserved, requests stay whole."""
    rng = random.Random(seed)
    queue = WaitingQueue()
    arrived: dict[str, deque[Sequence]] = {}
    running: list[Sequence] = []
    for _ in range(200):
        event = rng.random()
        if event < 0.4:
            choices = arriving(str(rng.randrange(flows)), cost=rng.randint(1, 50), n=rng.choice([1, 1, 4]))
            for sequence in choices:
                queue.push(sequence)
            arrived.setdefault(choices[0].request.flow, deque()).extend(choices)
        elif event < 0.5 and len(queue):
            gone = rng.choice(queue.sequences())
            gone.ended = True
            queue.discard(gone)
            arrived[gone.request.flow].remove(gone)
        elif event < 0.6 and running:
            back = running.pop()
            back.reached = 1
            queue.put_back(back)
            arrived[back.request.flow].appendleft(back)
            arrived[back.request.flow] = deque(sorted(arrived[back.request.flow], key=lambda s: s.number))
        else:
            head = queue.head()
            assert (head is None) == (not any(arrived.values()))
            if head is not None:
                assert queue.pop() is head
                assert arrived[head.request.flow].popleft() is head
                running.append(head)
        assert queue.flows == sum(bool(waiting) for waiting in arrived.values())
        assert len(queue) == sum(map(len, arrived.values()))
    while len(queue):
        head = queue.pop()
        assert arrived[head.request.flow].popleft() is head
    assert not any(arrived.values())
    assert queue.tokens == 0
    assert not queue.flows


@given(st.integers(0, 2**32), st.integers(2, 6), st.integers(1, 40))
def test_flows_that_always_wait_get_equal_shares(seed: int, flows: int, largest: int) -> None:
    """Whatever the costs: the shares of two never differ by more than the largest request of each (the paper's theorem 1)."""
    rng = random.Random(seed)
    queue = FairQueue(0.0)
    for flow in range(flows):
        for _ in range(100):
            queue.push(*arriving(str(flow), cost=rng.randint(1, largest)))
    served = dict.fromkeys(map(str, range(flows)), 0)
    while queue.active == flows:
        sequence = queue.pop()
        served[sequence.request.flow] += sequence.cost
        assert max(served.values()) - min(served.values()) <= 2 * largest


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 4))
def test_a_flood_delays_another_flow_by_a_few_requests_of_each_flow(seed: int, flows: int, n: int) -> None:
    rng = random.Random(seed)
    queue = WaitingQueue()
    for _ in range(200):
        for sequence in arriving(str(rng.randrange(flows)), cost=rng.randint(5, 10), n=n):
            queue.push(sequence)
    for _ in range(rng.randrange(100)):
        queue.pop()
    (late,) = arriving("late", cost=10)
    queue.push(late)
    before = 0
    while queue.pop() is not late:
        before += 1
    assert before <= 4 * n * flows


def test_new_flows_without_end_do_not_starve_an_old_one() -> None:
    """Each of them starts now; now goes on."""
    queue = WaitingQueue()
    for _ in range(2):
        queue.push(*arriving("old", cost=100))
    for number in range(20):
        queue.push(*arriving(f"first {number}", cost=10))
    served = []
    for number in range(400):
        served.append(queue.pop().request.flow)
        queue.push(*arriving(f"new {number}", cost=10))
    assert served.count("old") == 2


def test_who_is_put_back_is_not_charged_again() -> None:
    """After many updates, each of which puts everybody back, a newcomer's turn comes as soon as before."""
    queue = WaitingQueue()
    for flow in "abcd":
        for _ in range(40):
            queue.push(*arriving(flow, cost=10))
    for _ in range(20):
        running = [queue.pop() for _ in range(16)]
        for sequence in running:
            sequence.reached = 10
            queue.put_back(sequence)
    (late,) = arriving("late", cost=10)
    queue.push(late)
    before = 0
    while queue.pop() is not late:
        before += 1
    assert before <= 16 + 2 * 4


def test_who_was_passed_over_often_enough_is_next() -> None:
    queue = WaitingQueue()
    (low,) = arriving(priority=9)
    queue.push(low)
    for _ in range(AGING + 5):
        queue.push(*arriving())
    order = [queue.pop() for _ in range(AGING + 2)]
    assert order.index(low) == AGING


def test_flows_that_are_gone_are_forgotten() -> None:
    """A hundred thousand flows, none of them twice, while others wait all the time; and cancellations behind a head that stays."""
    queue = FairQueue(0.0)
    for number in range(50):
        queue.push(*arriving(f"begin {number}", cost=7))
    for number in range(20_000):
        queue.pop()
        queue.push(*arriving(str(number), cost=1 + number % 13))
        assert len(queue.flows) <= 8 * (queue.active + SLACK)
    for _ in range(5000):
        (gone,) = arriving("impatient", cost=100)
        queue.push(gone)
        gone.ended = True
        queue.discard(gone)
    assert len(queue._heap) <= 2 * len(queue) + SLACK + 1
    assert queue.flows["impatient"].end <= queue.now + 100, "charged for what it did not get"


@pytest.mark.parametrize("flows", [1, 10_000])
def test_ten_thousand_who_wait_cost_nothing(flows: int) -> None:
    queue = WaitingQueue()
    for number in range(10_000):
        queue.push(*arriving(str(number % flows), cost=1 + number % 7))
    started = time.process_time()
    for _ in range(10_000):
        assert queue.head() is queue.head()
        queue.push(*arriving("another"))
        queue.pop()
    assert time.process_time() - started < 1.0  # about 0.1 s
