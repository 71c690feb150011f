"""`python -m tests.bench.bench_viewer`: what the viewer's list takes of 100,000 episodes with 1,000,000 calls.

The store is made once (`tests.bench.viewer_store`, some 3 GB) and kept in `--folder` for the next time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_rl.store import Store
from tests.bench.viewer_store import make_store
from trainers.viewer.index import EpisodeIndex
from trainers.viewer.records import EpisodeQuery

FOLDER = Path("~/.cache/lightning-rl/bench").expanduser()
_TIMES = 20
QUERIES: dict[str, dict[str, Any]] = {
    "all, the latest first": {},
    "sorted by id": {"sort": "id", "descending": False},
    "sorted by task": {"sort": "task", "descending": False},
    "sorted by tokens": {"sort": "tokens"},
    "sorted by a reward": {"sort": "reward.brevity"},
    "by outcome": {"outcome": ("timeout", "agent_error")},
    "by agent": {"agent": ("critic",)},
    "by a part of the task": {"task": "99"},
    "by versions and a reward": {"version": (100, 200), "reward": {"correct": (1.0, None)}, "sort": "seconds"},
    "by a rare word": {"text": "kmopgorrw"},
    "by a letter": {"text": "a"},
    "by three beginnings": {"text": "a th be"},
}


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def row(what: str, *values: str) -> None:
    print(f"{what:<40}" + "".join(f"{value:>14}" for value in values), flush=True)


def opening(store: Store, cache: Path) -> EpisodeIndex:
    """Until all episodes were read."""
    before = resident_mb()
    began = time.perf_counter()
    index = EpisodeIndex(store, cache)
    index.page(EpisodeQuery())
    row("first page", f"{1e3 * (time.perf_counter() - began):.0f} ms")
    index.facets()
    row("all episodes listed", f"{time.perf_counter() - began:.2f} s")
    meanwhile = []
    while True:
        meanwhile.append(seconds(lambda: index.page(EpisodeQuery(task="9", sort="reward.brevity"))))
        indexing = index.page(EpisodeQuery(limit=1)).indexing
        if indexing.done == indexing.total:
            break
        time.sleep(0.25)
    row("all episodes read", f"{time.perf_counter() - began:.1f} s")
    row(
        "a filter meanwhile, p50 and p99",
        f"{1e3 * statistics.median(meanwhile):.1f} ms",
        f"{1e3 * p99(meanwhile):.1f} ms",
    )
    row("memory beside what was there before", f"{resident_mb() - before:.0f} MB", f"({before:.0f} MB)")
    return index


def p99(times: list[float]) -> float:
    return sorted(times)[int(0.99 * (len(times) - 1))]


def queries(index: EpisodeIndex) -> None:
    row("", "matched", "first", "p50", "p99")
    for name, fields in QUERIES.items():
        taken = []
        for time_ in range(_TIMES):
            query = EpisodeQuery(**fields, tokens=(-1 - time_, None))  # another one each time: answers are remembered
            taken.append(seconds(lambda query=query: index.page(query)))  # type: ignore[misc]
        matched = index.page(EpisodeQuery(**fields)).matched
        row(
            name,
            f"{matched:,}",
            *(f"{1e3 * value:.1f} ms" for value in (taken[0], statistics.median(taken), p99(taken))),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the store is kept")
    parser.add_argument("--episodes", type=int, default=100_000)
    parser.add_argument("--calls", type=int, default=10, help="of an episode, about")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"{options.episodes}x{options.calls}.db"
    made = seconds(lambda: make_store(path, options.episodes, options.calls))
    row("the store", f"{path.stat().st_size / 1e9:.1f} GB", f"{made:.0f} s")
    with tempfile.TemporaryDirectory() as cache, Store.open(path, create=False) as store:
        print("never seen")
        index = opening(store, Path(cache))
        queries(index)
        index.close()
        row("kept", f"{sum(file.stat().st_size for file in Path(cache).iterdir()) / 1e6:.0f} MB")
        print("seen before")
        opening(store, Path(cache)).close()


if __name__ == "__main__":
    main()
