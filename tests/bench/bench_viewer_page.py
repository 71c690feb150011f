"""`python -m tests.bench.bench_viewer_page`: how long somebody waits who looks at 100,000 episodes with 1,000,000 calls.

In chromium, from the address to what it shows, the page's own work included. The store is that of `tests.bench.bench_viewer`.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from tests.bench.bench_viewer import FOLDER, row
from tests.bench.viewer_store import make_store

CHROMIUM = "/usr/bin/chromium"
_TIMES, _OPENINGS = 7, 5
_LATEST = """async (key) => (await (await fetch(`api/run/${key}/episodes?limit=7`)).json())
  .rows.map((row) => encodeURIComponent(row.id))"""
FILTERS = {
    "by outcome": "outcome=timeout",
    "by agent": "agent=critic",
    "by a reward, sorted by it": "reward.correct=1,&sort=reward.brevity",
    "by version and length": "version=100,200&calls=8,",
    "by a part of the task": "task=99",
    "by words": "text=search+the",
}
_CHANGED = """async (hash) => {
  const status = () => document.querySelector('[role=status]')?.innerText ?? '';
  const before = status(), began = performance.now();
  location.hash = hash;
  while (status() === before && performance.now() - began < 10_000) await new Promise(requestAnimationFrame);
  return performance.now() - began;
}"""


@contextmanager
def viewer(store: Path, cache: str) -> Iterator[tuple[str, int]]:
    """Its link, with the run's key in it, and its process."""
    command = [sys.executable, "-m", "lightning_rl.cli", "ui", str(store), "--no-open", "--port", "0"]
    environment = {**os.environ, "XDG_CACHE_HOME": cache, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        link = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        yield link, process.pid
    finally:
        process.terminate()
        process.wait()


def milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def first_view(page: Page, link: str) -> float:
    def look() -> None:
        page.goto(f"{link}/episodes")
        page.wait_for_selector("tbody tr:nth-child(5)")

    return milliseconds(look)


def until_read(page: Page) -> float:
    began = time.perf_counter()
    while page.get_by_label("texts read").count():
        time.sleep(1)
    return time.perf_counter() - began


def filters(page: Page, link: str) -> None:
    base = link.partition("#")[2]
    for name, query in FILTERS.items():
        taken = []
        for number in range(_TIMES):
            page.evaluate(_CHANGED, f"#{base}/episodes?step=,{1000 + number}&task=no+such+task")
            taken.append(page.evaluate(_CHANGED, f"#{base}/episodes?{query}&step=,{1000 + number}"))
        row(f"filter {name}", *(f"{value:.0f} ms" for value in (statistics.median(taken), max(taken))))


def episodes(page: Page, link: str, ids: list[str]) -> None:
    taken = []
    for id in ids:
        page.goto(f"{link}/episodes")
        page.wait_for_selector("tbody tr:nth-child(5)")
        address = f"{link}/episode/{id}"

        def look(address: str = address) -> None:
            page.goto(address)
            page.wait_for_selector("[role=treeitem]")

        taken.append(milliseconds(look))
    row("one episode", *(f"{value:.0f} ms" for value in (statistics.median(taken), max(taken))))


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the store is kept")
    parser.add_argument("--episodes", type=int, default=100_000)
    parser.add_argument("--calls", type=int, default=10, help="of an episode, about")
    parser.add_argument("--cache", help="folder for what the viewer keeps (default: a new one)")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    store = make_store(options.folder / f"{options.episodes}x{options.calls}.db", options.episodes, options.calls)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        row("", "median", "largest")
        taken = []
        for number in range(_OPENINGS):
            with viewer(store, f"{scratch}/{number}") as (link, _), opened(browser) as page:
                taken.append(first_view(page, link))
        row("first view, never read before", *_said(taken))
        cache = options.cache or f"{scratch}/kept"
        with viewer(store, cache) as (link, _), opened(browser) as page:
            first_view(page, link)
            row("until all texts are read", f"{until_read(page):.0f} s")
        taken = []
        for _ in range(_OPENINGS):
            with viewer(store, cache) as (link, _), opened(browser) as page:
                taken.append(first_view(page, link))
        row("first view, read before", *_said(taken))
        with viewer(store, cache) as (link, pid), opened(browser) as page:
            first_view(page, link)
            row("the same page once more", *_several(page, link))
            filters(page, link)
            key = link.rpartition("/")[2]
            episodes(page, link, page.evaluate(_LATEST, key))
            row("the server's memory", f"{resident_mb(pid):.0f} MB")
        browser.close()


@contextmanager
def opened(browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    yield page
    page.close()


def _several(page: Page, link: str) -> list[str]:
    taken = []
    for _ in range(_TIMES):
        page.goto("about:blank")
        taken.append(first_view(page, link))
    return _said(taken)


def _said(taken: list[float]) -> list[str]:
    return [f"{value:.0f} ms" for value in (statistics.median(taken), max(taken))]


if __name__ == "__main__":
    main()
