"""`python -m tests.bench.bench_store`: what a long conversation takes in the store; how long writing, listing and reading take."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_rl.episode import Call, EpisodeStart, Outcome, Task
from lightning_rl.store import Store

TURN_TOKENS = 100
"""Half of them the user's, half sampled."""


def begin(store: Store, episode_id: str, step: int = 0) -> None:
    store.begin(EpisodeStart(id=episode_id, task=Task(id=episode_id, input={}), phase="train", step=step))


def turns(episode_id: str, count: int, *, alone: bool = False) -> list[Call]:
    """A conversation, each call extending the one before; `alone`: each in an episode of its own, where it repeats nothing."""
    messages: list[dict[str, Any]] = []
    ids: list[int] = []
    calls = []
    for turn in range(count):
        half = TURN_TOKENS // 2
        fresh = [1000 + (turn * TURN_TOKENS + at) % 30000 for at in range(TURN_TOKENS)]
        messages = [*messages, {"role": "user", "content": f"turn {turn} " + "word " * half}]
        ids = [*ids, *fresh[:half]]
        home = f"{episode_id}.{turn}" if alone else episode_id
        calls.append(
            Call(
                id=f"{home}-{turn}",
                episode_id=home,
                index=0 if alone else turn,
                model="policy",
                prompt_ids=ids,
                sampled_ids=fresh[half:],
                logprobs=[-0.5] * half,
                versions=[1] * half,
                temperature=1.0,
                finish_reason="stop",
                parent_id=None if alone or not turn else f"{home}-{turn - 1}",
                request={"model": "policy", "messages": messages},
                response={"role": "assistant", "content": "word " * half},
            )
        )
        messages = [*messages, {"role": "assistant", "content": "word " * half}]
        ids = [*ids, *fresh[half:]]
    return calls


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def long_conversation(count: int) -> None:
    for alone in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            calls = turns("long", count, alone=alone)
            with Store.open(Path(folder, "episodes.db")) as store:
                for episode_id in dict.fromkeys(call.episode_id for call in calls):
                    begin(store, episode_id)
                taken = [seconds(lambda call=call: store.add_call(call)) for call in calls]  # type: ignore[misc]
                read = 0.0 if alone else seconds(lambda: store.episode("long"))
            how = "each call whole" if alone else "as differences"
            print(
                f"{count} turns, {how}: {size(Path(folder)) / 1e6:.3f} MB, add_call p50 {1e3 * statistics.median(taken):.2f} ms"
                + ("" if alone else f", episode read in {1e3 * read:.0f} ms")
            )


def many_episodes(episodes: int, calls: int) -> None:
    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder, "episodes.db")) as store:
        for number in range(episodes):
            name = f"e{number}"
            begin(store, name, step=number // 64)
            store.add_calls(turns(name, calls))
            store.end(name, Outcome.COMPLETED, counted=True, ended_at=1.0)
        print(
            f"{episodes} episodes of {calls} calls: list all {seconds(store.starts):.2f} s, "
            f"list a step {1e3 * seconds(lambda: store.starts(step=3)):.1f} ms, "
            f"read one {1e3 * seconds(lambda: store.episode('e100')):.1f} ms, {size(Path(folder)) / 1e6:.0f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=10)
    options = parser.parse_args()
    long_conversation(options.turns)
    many_episodes(options.episodes, options.calls)


if __name__ == "__main__":
    main()
