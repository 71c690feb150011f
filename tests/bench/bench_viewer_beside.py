"""`python -m tests.bench.bench_viewer_beside`: does a viewer that is looked at slow a run down?

The same few steps of training (SmolLM2, the calculator) alone and with `lrl ui` and a browser that has the live run open, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.bench.bench_viewer import row
from tests.bench.bench_viewer_page import CHROMIUM

RECIPE = Path(__file__).parents[2] / "recipes" / "calculator.yaml"
SMALLER = ("warm_start=null", "evaluate.tasks=8", "train.tasks_per_step=4", "tracking.wandb=null")
_GO_THERE = """(view) => {
  const look = async () => {
    const { runs } = await (await fetch('api/runs')).json();
    if (runs.length) location.hash = `#/run/${runs[0].key}${view}`;
    else setTimeout(look, 500);
  };
  look();
}"""


def train(folder: Path, steps: int) -> float:
    """Seconds of rollouts, training and publishing."""
    words = [str(RECIPE), f"runs_dir={folder}", f"train.steps={steps}", *SMALLER]
    subprocess.run([sys.executable, "-m", "lightning_rl.cli", "train", *words], check=True, stdout=subprocess.DEVNULL)
    (run,) = folder.glob("calculator/2*")
    seconds = json.loads((run / "seconds.json").read_text())
    return float(sum(seconds[stage] for stage in ("rollout", "train", "publish")))


@contextmanager
def looked_at(folder: Path) -> Iterator[None]:
    """A page on the run as soon as there is one, and another on its episodes; both ask every two seconds."""
    command = [sys.executable, "-m", "lightning_rl.cli", "ui", str(folder), "--no-open", "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        link = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            for view in ("", "/episodes"):
                page = browser.new_page(viewport={"width": 1440, "height": 900})
                page.goto(link)
                page.evaluate(_GO_THERE, view)
            yield
            browser.close()
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    row("", "alone", "looked at", "ratio")
    ratios = []
    for pair in range(options.pairs):
        taken = {}
        for watched in (False, True) if pair % 2 == 0 else (True, False):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                with looked_at(folder) if watched else nullcontext():
                    taken[watched] = train(folder, options.steps)
        ratios.append(taken[True] / taken[False])
        row(f"pair {pair + 1}", f"{taken[False]:.1f} s", f"{taken[True]:.1f} s", f"{ratios[-1]:.3f}")
    row("median", "", "", f"{statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
