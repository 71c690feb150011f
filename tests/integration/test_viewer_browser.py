"""The viewer in a real browser, headless: over a made run full of cases, and over a real one while it trains."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from lightning_rl.store import Store
from rollout_server.models.catalog import cache_dir
from tests.forked import Forked
from tests.viewer_run import GROUP, HOSTILE, LONG_CALLS, LONG_TOKENS, end_running, make_run
from trainers.run_directory import open_run
from trainers.viewer.page_files import is_built

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STAMP = "20261122-010101"
MADE = f"made.{STAMP}"
HOSTILE_GROUP = f"2/hostile {HOSTILE}".replace("\x00", "␀")  # no store keeps a NUL
WAIT_MS = 60_000
TRAINING_MS = 240_000

pytestmark = [pytest.mark.timeout(600)]
if not os.environ.get("CI"):  # there nothing may be missing
    reason = "needs chromium and the compiled page (`make page`)"
    pytestmark.append(pytest.mark.skipif(CHROMIUM is None or not is_built(), reason=reason))


def environment(folder: Path) -> dict[str, str]:
    """Of a process of its own, with what the viewer keeps in a place of its own."""
    places = {"PYTHONPATH": str(ROOT), "LRL_CACHE": str(cache_dir()), "XDG_CACHE_HOME": str(folder / "cache")}
    return {**os.environ, "PYTHONUNBUFFERED": "1", **places}


@contextmanager
def viewer(folder: Path) -> Iterator[str]:
    """`lrl ui` in a folder with `runs`, as a user starts it; its link."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_rl.cli", "ui", "--port", "0", "--no-open"],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ""
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if found := re.search(r"http://\S+", line):
                yield found[0].split("#")[0]
                break
        else:
            pytest.fail(f"lrl ui ended without a link:\n{said}")
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that has `runs`."""
    folder = tmp_path_factory.mktemp("viewer")
    make_run(folder / "runs" / "made" / STAMP)
    return folder


@pytest.fixture(scope="module")
def served(made: Path) -> Iterator[str]:
    with viewer(made) as link:
        yield link


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Watched:
    """A page, and what must never happen on one: faults, scripts of others, requests elsewhere."""

    def __init__(self, browser: Any, link: str, **settings: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1440, "height": 900}} | settings))
        self.context.set_default_timeout(WAIT_MS)
        self.page = self.context.new_page()
        self.link = link
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("console", lambda said: self.faults.append(said.text) if said.type == "error" else None)
        self.page.on("request", self._request)
        self.page.on("response", self._response)

    def _response(self, response: Any) -> None:
        if response.status >= 400:
            self.faults.append(f"{response.status} for {response.url}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.link, "data:", "blob:")):
            self.faults.append(f"request to {request.url}")

    def go(self, *segments: str, query: str = "") -> Any:
        address = "#/" + "/".join(quote(segment, safe="") for segment in segments) + (f"?{query}" if query else "")
        self.page.goto(self.link + address)
        return self.page

    def sees(self, words: str | re.Pattern[str], **how: Any) -> Any:
        """The first element that shows the words, once it does."""
        found = self.page.get_by_text(words, **how).filter(visible=True).first
        expect(found).to_be_visible(timeout=WAIT_MS)
        return found

    def settle(self) -> None:
        """Until nothing loads any more; then nothing may have gone wrong."""
        expect(self.page.get_by_role("status", name="loading")).to_have_count(0, timeout=WAIT_MS)
        assert self.faults == []
        assert self.page.get_by_role("alert").all_inner_texts() == [], self.page.url
        assert self.page.evaluate("window.hacked") is None
        assert self.page.locator("img, iframe, object, embed, a[href^='javascript']").count() == 0


@pytest.fixture
def watched(browser: Any, served: str) -> Iterator[Watched]:
    watched = Watched(browser, served)
    yield watched
    watched.context.close()


VIEWS: dict[str, tuple[list[str], str]] = {
    "runs": ([], f"made/{STAMP}"),
    "run": (["run", MADE], "Objective"),
    "episodes": (["run", MADE, "episodes"], "patience"),
    "episode": (["run", MADE, "episode", "trip.2"], "ValueError: 13F"),
    "call": (["run", MADE, "call", "trip.2.c2"], "francs"),
    "group": (["run", MADE, "group", GROUP], "along the coast"),
    "credit": (["run", MADE, "credit", GROUP], "step_rewards"),
    "hostile episode": (["run", MADE, "episode", "hostile"], "<script>window.hacked = 1</script>"),
    "hostile call": (["run", MADE, "call", "hostile.c0"], "<script>window.hacked = 1</script>"),
    "hostile group": (["run", MADE, "group", HOSTILE_GROUP], "<script>window.hacked = 1</script>"),
    "hostile credit": (["run", MADE, "credit", HOSTILE_GROUP], "<script>window.hacked = 1</script>"),
}
"""With words that each shows."""
LOOKS: dict[str, dict[str, Any]] = {
    "dark": {"color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}


@pytest.mark.parametrize("look", LOOKS)
def test_each_view_has_an_address_and_fits_in_the_dark_and_on_a_phone(browser: Any, served: str, look: str) -> None:
    watched = Watched(browser, served, **LOOKS[look])
    page = watched.page
    for name, (segments, words) in VIEWS.items():
        watched.go(*segments)
        watched.sees(words)
        watched.settle()
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"], f"{name}: too wide"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (look == "dark")
    watched.context.close()


def test_one_follows_links_from_the_runs_to_a_token_and_back(watched: Watched) -> None:
    page = watched.go()
    page.get_by_role("link", name=f"made/{STAMP}", exact=True).click()
    page.get_by_role("link", name="Episodes", exact=True).click()
    page.get_by_role("link", name="trip", exact=True).first.click()
    page.get_by_role("treeitem").filter(has_text="#0").click()
    page.get_by_role("link", name="Tokens").click()
    watched.sees("Sampled", exact=True)
    token = page.locator("[data-at]").last
    place = token.get_attribute("data-at")
    token.click()
    expect(page).to_have_url(re.compile(f"token={place}"))
    details = page.get_by_role("complementary", name="Token")
    for words in ("log-prob", "probability", "entropy", "advantage", "sampled ·"):  # the last is among its alternatives
        expect(details.get_by_text(words).first).to_be_visible()
    page.keyboard.press("ArrowLeft")
    expect(page).to_have_url(re.compile(f"token={int(place) - 1}"))
    page.keyboard.press("4")
    expect(page).to_have_url(re.compile("colour=version"))
    pinned = page.url
    page.get_by_role("link", name="credit", exact=True).click()
    watched.sees("step_rewards")
    page.go_back()
    expect(page).to_have_url(pinned)
    expect(details.get_by_text("log-prob").first).to_be_visible()
    watched.settle()


def test_episodes_are_filtered_sorted_and_opened_by_the_keyboard(watched: Watched) -> None:
    page = watched.go("run", MADE, "episodes")
    count = page.get_by_role("status").filter(has_text="episode")
    expect(count).to_have_text("8 episodes")
    expect(page.get_by_text("texts of")).to_have_count(0, timeout=WAIT_MS)
    page.keyboard.press("/")
    page.keyboard.type("francs genoa")
    expect(count).to_have_text("4 of 8 episodes")
    page.keyboard.press("Escape")
    page.get_by_role("button", name=re.compile("^completed")).press("Enter")
    expect(count).to_have_text("3 of 8 episodes")
    page.get_by_role("button", name="Rewards").press("Enter")
    page.get_by_role("textbox", name="vowels: at least").press_sequentially("0.5")
    expect(count).to_have_text("2 of 8 episodes")
    page.keyboard.press("Escape")
    assert {"text=francs+genoa", "outcome=completed"} <= set(page.url.partition("?")[2].split("&"))
    head = page.get_by_role("columnheader", name="vowels")
    for order in ("descending", "ascending"):
        head.get_by_role("button").press("Enter")
        expect(head).to_have_attribute("aria-sort", order)
    address = page.url
    page.reload()  # all of it is in the address
    expect(count).to_have_text("2 of 8 episodes")
    page.keyboard.press("j")
    expect(page.locator("tr[aria-current]")).to_contain_text("0.5")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("/episode/trip.0"))
    watched.sees("By train.")
    page.go_back()
    expect(page).to_have_url(address)
    page.keyboard.press("x")
    expect(count).to_have_text("8 episodes")
    watched.settle()


def test_an_episode_that_runs_ends_on_the_open_page(watched: Watched, made: Path) -> None:
    folder = made / "runs" / "made" / STAMP
    with open_run(folder).lock():  # as the trainer does
        page = watched.go("run", MADE, "episode", "running")
        watched.sees("running", exact=True)
        page.evaluate("window.same = true")
        end_running(folder)
        watched.sees("We have arrived.")
        watched.sees("completed", exact=True)
    assert page.evaluate("window.same"), "nobody loaded the page anew"
    watched.settle()


def test_what_agents_say_is_shown_and_never_run(watched: Watched) -> None:
    page = watched.page
    answer = page.goto(watched.link)
    policy = {
        name: sources for name, *sources in map(str.split, answer.headers["content-security-policy"].split(";")) if name
    }
    assert policy["default-src"] == ["'none'"]
    assert not {"'unsafe-inline'", "'unsafe-eval'", "*"} & set(policy["script-src"])
    watched.go("run", MADE, "episodes", query="text=hacked")
    watched.sees("onerror=")
    for tab in ("tree", "conversation", "credit"):
        watched.go("run", MADE, "episode", "hostile", query=f"node=hostile.tool&tab={tab}")
        watched.sees("<script>")
        watched.settle()
    for tab in ("messages", "request", "tokens"):
        watched.go("run", MADE, "call", "hostile.c0", query=f"tab={tab}&prompt=1")
        watched.sees("<script>")
        watched.settle()
    special = page.locator("[data-at]").first  # bytes and characters that would reorder the line are written out
    expect(special).to_be_visible()
    assert "\u202e" not in page.locator("body").inner_text()
    assert page.locator("script").count() == page.locator("script[src]").count()


def test_long_episodes_and_calls_are_on_the_page_only_where_one_looks(watched: Watched) -> None:
    page = watched.go("run", MADE, "episode", "long")
    rows = page.get_by_role("treeitem")
    expect(rows.first).to_be_visible()
    assert rows.count() < LONG_CALLS / 2
    page.keyboard.press("End")
    expect(rows.filter(has_text=f"#{LONG_CALLS - 1}")).to_be_visible()
    watched.settle()

    watched.go("run", MADE, "call", "tokens.c0")
    tokens = page.locator("[data-at]")
    expect(tokens.first).to_be_visible()
    assert tokens.count() < LONG_TOKENS / 5
    last = page.locator(f"[data-at='{LONG_TOKENS}']")
    expect(last).to_have_count(0)
    watched.go("run", MADE, "call", "tokens.c0", query=f"token={LONG_TOKENS}")
    expect(last).to_be_in_viewport()
    assert tokens.count() < LONG_TOKENS / 5
    page.keyboard.press("ArrowUp")
    expect(page).to_have_url(re.compile(rf"token=(?!{LONG_TOKENS})\d+"))
    watched.settle()


def test_what_is_shown_is_copied_as_json(watched: Watched) -> None:
    watched.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = watched.page

    def copied(*segments: str, words: str) -> Any:
        watched.go("run", MADE, *segments)
        watched.sees(words)
        page.evaluate("navigator.clipboard.writeText('')")
        page.get_by_title("Copy as JSON").filter(visible=True).first.click()
        page.wait_for_function("navigator.clipboard.readText().then((text) => text !== '')")
        return json.loads(page.evaluate("navigator.clipboard.readText()"))

    call = copied("call", "trip.1.c2", words="francs")
    assert call["id"] == "trip.1.c2"
    assert len(call["sampled"]["ids"]) == len(call["logprobs"]) > 0
    assert copied("episode", "trip.1", words="planner")["rewards"][0]["value"] == 1.0
    assert copied("episodes", words="patience")["matched"] == 8
    watched.settle()


def test_a_file_holds_its_episodes_and_asks_for_nothing(browser: Any, made: Path) -> None:
    file = made / "file" / "made.html"
    file.parent.mkdir()
    command = [sys.executable, "-m", "lightning_rl.cli", "traces", "html", f"runs/made/{STAMP}"]
    subprocess.run(
        [*command, "trip.1", "trip.2", "hostile", "--out", str(file)], cwd=made, env=environment(made), check=True
    )
    watched = Watched(browser, file.as_uri())
    watched.context.set_offline(True)
    for name, (segments, words) in VIEWS.items():
        watched.go(*segments)
        watched.sees("trip" if name == "episodes" else words)
        watched.settle()
    watched.go("run", MADE, "call", "trip.1.c2", query="token=70")
    expect(watched.page.get_by_role("complementary", name="Token").get_by_text("log-prob").first).to_be_visible()
    watched.settle()
    watched.context.close()


def test_a_real_run_appears_trains_and_is_read(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with viewer(tmp_path) as link:
        watched = Watched(browser, link)
        page = watched.go()
        watched.sees("No runs in runs yet")
        recipe = str(ROOT / "recipes" / "smoke.yaml")
        fewer = ["warm_start=null", "train.steps=2", "evaluate.tasks=2"]
        training = Forked(["train", recipe, *fewer], tmp_path, {**os.environ, "PYTHONPATH": str(ROOT)})
        try:
            page.get_by_role("link", name=re.compile("^smoke.2")).click(timeout=TRAINING_MS)
            expect(page.get_by_text(re.compile("^(running|finished)$")).first).to_be_visible(timeout=TRAINING_MS)
            expect(page.get_by_text("finished", exact=True).first).to_be_visible(timeout=TRAINING_MS)
            output, _ = training.communicate(timeout=120)
        finally:
            if training.returncode is None:
                os.kill(training.pid, 9)
        assert training.returncode == 0, output
        watched.sees("2 of 2")
        watched.sees("Objective")
        watched.settle()

        page.get_by_role("link", name="Episodes", exact=True).click()
        page.get_by_role("button", name=re.compile("^train")).click()
        page.locator("tbody a").first.click()
        page.get_by_role("treeitem").first.click()
        page.keyboard.press("End")
        page.get_by_role("link", name="Tokens").click()
        watched.sees("Sampled", exact=True)
        watched.settle()

        id = page.url.partition("/call/")[2].partition("?")[0]
        place = next((tmp_path / "runs" / "smoke").glob("2*/episodes.db"))
        with Store.open(place) as store:
            call = store.call(id)
        assert call is not None
        shown = page.locator("[data-at]")
        expect(shown.last).to_have_attribute("data-at", str(len(call.prompt_ids) + len(call.sampled_ids) - 1))
        expect(page.get_by_text(f"{len(call.sampled_ids)} token").last).to_be_visible()
        watched.context.close()
