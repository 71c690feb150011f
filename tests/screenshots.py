"""Pictures of the viewer for docs/viewer.md: `python -m tests.screenshots RUN --out docs/img`, with a run that has episodes.

Each view is opened in a headless browser on a server of its own, and written as a PNG of few colours.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from PIL import Image
from playwright.sync_api import sync_playwright

COLOURS = 128
LOOKS: dict[str, dict[str, Any]] = {
    "": {"viewport": {"width": 1280, "height": 800}},
    "-dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "-phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
}
"""By the end of the file's name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", help="run directory")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--episode", help="id (default: the latest of training with the most calls)")
    parser.add_argument("--call", help="id (default: the episode's last)")
    parser.add_argument("--group", help="name (default: the episode's)")
    parser.add_argument("--token", type=int, help="place of the token whose details the call's picture shows")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with viewer(options.run) as (link, key):
        views = addresses(link, key, options)
        pictures = [(name, "") for name in views] + [("episode", "-dark"), ("call", "-phone")]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for name, look in pictures:
                page = browser.new_context(**LOOKS[look]).new_page()
                page.goto(link + views[name], wait_until="networkidle")
                page.wait_for_timeout(500)  # charts are drawn once their size is known
                file = options.out / f"viewer-{name}{look}.png"
                write(file, page.screenshot())
                page.context.close()
                print(f"{file}, {file.stat().st_size / 1e3:.0f} kB")
            browser.close()


@contextmanager
def viewer(run: str) -> Iterator[tuple[str, str]]:
    """Its address, and the run's key."""
    command = [sys.executable, "-m", "lightning_rl.cli", "ui", run, "--port", "0", "--no-open"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        found = next(filter(None, (re.search(r"(http://\S+/)#/run/(\S+)", line) for line in process.stdout)), None)
        if found is None:
            sys.exit(f"lrl ui did not open {run}")
        yield found[1], found[2]
    finally:
        process.terminate()
        process.communicate()


def addresses(link: str, key: str, options: argparse.Namespace) -> dict[str, str]:
    """Of each view, by its name."""

    def asked(what: str, **query: object) -> Any:
        with urllib.request.urlopen(f"{link}api/run/{key}/{what}?{urlencode(query)}") as answer:
            return json.load(answer)

    id = options.episode
    if id is None:
        rows = asked("episodes", phase="train", sort="calls", limit=1)["rows"]
        if not rows:
            sys.exit("the run has no episodes of training yet")
        id = rows[0]["id"]
    episode = asked("episode", id=id)
    group = options.group or episode["group"]
    call = options.call or [node["id"] for node in episode["nodes"] if node["type"] == "call"][-1]
    token = options.token
    if token is None:
        view = asked("call", id=call)
        token = len(view["prompt"]["ids"]) + view["logprobs"].index(min(view["logprobs"]))
    with urllib.request.urlopen(f"{link}api/runs") as answer:
        keys = [run["key"] for run in json.load(answer)["runs"]]
    several = {"compare": f"#/compare?{urlencode([('run', each) for each in keys[:2]])}"} if len(keys) > 1 else {}
    return {
        "runs": "#/",
        **several,
        "run": f"#/run/{key}",
        "episodes": f"#/run/{key}/episodes",
        "episode": at(key, "episode", id, node=call),
        "call": at(key, "call", call, token=token),
        "credit": at(key, "credit", group),
        "group": at(key, "group", group),
    }


def at(key: str, view: str, id: str, **query: object) -> str:
    wanted: Mapping[str, object] = query
    return f"#/run/{key}/{view}/{quote(id, safe='')}" + (f"?{urlencode(wanted)}" if wanted else "")


def write(file: Path, png: bytes) -> None:
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    few = picture.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(file, optimize=True)


if __name__ == "__main__":
    main()
