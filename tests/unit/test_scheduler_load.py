"""A hundred thousand requests through the scheduler, without a model."""

from __future__ import annotations

import random
import time

from rollout_server import messages as m
from rollout_server.manager.scheduler import Scheduler

REQUESTS = 100_000


def test_a_hundred_thousand_requests() -> None:
    """Groups, common prefixes, growing conversations, stops and cancellations, in a memory that is far too small."""
    rng = random.Random(0)
    scheduler = Scheduler(
        pages=3000, page_size=16, vocab_size=1000, max_batch=256, max_step_tokens=4096, lookahead=1, host_pages=1000
    )
    system = [[rng.randrange(1000) for _ in range(rng.randrange(20, 60))] for _ in range(40)]
    queue: list[m.Forward] = []
    submitted = finished = cancelled = steps = 0
    started = time.process_time()
    while submitted < REQUESTS or scheduler.requests:
        while submitted < REQUESTS and len(scheduler.requests) < 600:
            prompt = rng.choice(system) + [rng.randrange(1000) for _ in range(rng.randrange(1, 20))]
            sampling = m.SamplingParams(max_tokens=rng.choice([4, 8, 12]), stop_ids=(1, 2, 3))
            n = 4 if submitted % 16 == 0 else 1
            scheduler.submit(str(submitted), prompt, sampling, n=n, priority=submitted % 64 == 0)
            submitted += 1
        if steps % 20 == 0 and scheduler.requests:
            cancelled += 1
            scheduler.cancel(next(reversed(scheduler.requests)))
        while (forward := scheduler.plan()) is not None:
            queue.append(forward)
        assert queue, "nothing is planned, and something waits: a deadlock"
        steps += 1
        forward = queue.pop(0)
        draws = sum(len(row.draws) for row in forward.rows)
        ids = [rng.randrange(30) for _ in range(draws)]
        results = m.Forwarded(
            step=forward.step,
            ids=ids,
            logprobs=[0.0] * draws,
            entropies=[0.0] * draws,
            top_logprobs=[],
            scores=[],
            seconds=0.0,
        )
        finished += sum(reply.finish_reason is not None for reply in scheduler.apply(results))  # type: ignore[union-attr]
        if steps % 500 == 0:
            scheduler.check_integrity()
    seconds = time.process_time() - started
    scheduler.check_integrity()
    assert not scheduler.running
    assert not len(scheduler.waiting)
    assert scheduler.memory.available == scheduler.memory.pool.total, "pages leaked"
    assert finished + cancelled >= REQUESTS
    assert scheduler.counters.finished == finished
    assert seconds < 60, f"{seconds:.0f} s of processor time"  # about 10 s on an idle core
