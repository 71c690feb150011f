"""`lrl ui`: a real server on a small store, and who it answers."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from lightning_rl.cli import main
from lightning_rl.episode import EpisodeStart, Outcome, Reward, Span, Task
from lightning_rl.errors import ServerError
from lightning_rl.store import Store
from tests.unit.domain import make_call, make_recipe
from trainers.run_directory import RunDirectory, create_run
from trainers.viewer import page_files
from trainers.viewer.access import Access, is_loopback
from trainers.viewer.app import Answers, build_app
from trainers.viewer.library import MOST_OPEN, Library
from trainers.viewer.places import shelf_of
from trainers.viewer.serving import listen

HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[31m\x00"
LINK = re.compile(r"http://\S+")
Served = tuple[httpx.Client, str]
"""And the link that was printed."""


def start_episode(store: Store, number: int) -> EpisodeStart:
    start = EpisodeStart(
        id=f"train.0.t{number}.{number}",
        task=Task(id=f"t{number}", input={"question": HOSTILE}),
        phase="train",
        sample=number,
        group="0/t",
        started_at=100.0 + number,
    )
    store.begin(start)
    return start


def add_episode(store: Store, number: int, good: float, long: str = "") -> None:
    start = start_episode(store, number)
    call = make_call(
        [1, 2], [3, 4], id=f"c{number}", episode_id=start.id, versions=[1, 1], agent="solver", started_at=101.0, ended_at=102.0,
        request={"messages": [{"role": "user", "content": HOSTILE + long}]}, response={"role": "assistant", "content": "4"},
    )  # fmt: skip
    store.add_call(call)
    store.add_spans([Span(id="s", episode_id=start.id, name="tool", kind="tool", started_at=102.0, ended_at=103.0)])
    rewards = [Reward(episode_id=start.id, name="good", value=good, time=104.0, source="test")]
    store.end(start.id, Outcome.COMPLETED, answer="4", counted=True, rewards=rewards, ended_at=105.0 + number)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("viewer")
    made = create_run(folder / "runs", "demo")
    made.recipe.write_text(make_recipe(folder, train={"steps": 3}).to_yaml())
    made.metrics.write_text('{"step": 1, "success": NaN, "kl": 0.5}\n{"step": 2, "succ')
    with Store.open(made.store) as store:
        for number, good in enumerate((1.0, 0.0, 0.25)):
            add_episode(store, number, good, long="x" * 300_000 if number == 1 else "")
    return made


@pytest.fixture(scope="module")
def served(run: RunDirectory) -> Iterator[Served]:
    process, link = start_viewer("runs/demo", "--port", "0", folder=run.path.parents[2])
    with httpx.Client(base_url=link.partition("#")[0], timeout=30) as client:
        yield client, link
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    assert "Traceback" not in process.stdout.read()


def start_viewer(*words: str, folder: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_rl.cli", "ui", *words, "--no-open"],
        cwd=folder,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ""
    for line in process.stdout:
        said += line
        if found := LINK.search(line):
            return process, found[0]
    raise AssertionError(said)


def get(served: Served, path: str, **query: str | int) -> Any:
    client, link = served
    key = link.partition("#/run/")[2]
    answer = client.get(f"/api/run/{key}{path}", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_link_leads_to_the_run_and_each_view_has_its_answer(served: Served, run: RunDirectory) -> None:
    client, link = served
    runs = client.get("/api/runs").json()
    assert link.endswith(f"#/run/{runs['chosen']}")
    assert [(entry["name"], entry["state"]) for entry in runs["runs"]] == [(f"demo/{run.path.name}", "stopped")]
    assert get(served, "")["series"] == {"kl": [0.5]}, "the second line is torn"
    page = get(served, "/episodes", sort="reward.good", descending="false", limit=2, outcome="completed")
    assert (page["matched"], page["rows"][0]["rewards"]) == (3, {"good": 0.0})
    assert get(served, "/facets")["outcomes"] == {"completed": 3}
    episode = get(served, "/episode", id="train.0.t0.0")
    assert episode["task"] == "t0"
    assert "onerror" in episode["task_input"]["text"]
    assert [node["type"] for node in episode["nodes"]] == ["call", "span"]
    assert get(served, "/call", id="c0")["sampled"]["ids"] == [3, 4]
    assert len(get(served, "/group", name="0/t")["samples"]) == 3
    own = get(served, "/credit", group="0/t")
    assert (own["own"]["rule"], own["others"]) == ("equal", [])
    other = get(served, "/credit", group="0/t", rule="tree")["others"]
    assert [each["rule"] for each in other] == ["tree"]


def test_a_long_text_is_cut_and_the_whole_of_it_is_to_be_had(served: Served) -> None:
    (call, _) = get(served, "/episode", id="train.0.t1.1")["nodes"]
    (text,) = [message["text"] for message in call["news"]]
    assert len(text["text"]) < text["length"] == len(HOSTILE) + 300_000
    assert len(get(served, "/text", place=text["place"])["text"]) == text["length"]


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [("/api/nothing", 404, "nothing at this address"), ("/etc/passwd", 404, "nothing"),
     ("/api/run/no/episodes", 404, "no run no"), ("/api/run/KEY/episode?id=none", 404, "none"),
     ("/api/run/KEY/call?id=none", 404, "none"), ("/api/run/KEY/episode", 400, "id="),
     ("/api/run/KEY/group?name=none", 404, "none"), ("/api/run/KEY/episodes?limit=9999", 400, "limit"),
     ("/api/run/KEY/credit?group=0/t&rule=os:system", 400, "os:system"), ("/api/run/KEY/text?place=../../x", 400, "no place"),
     ("/api/run/KEY/experts?id=c0&layer=x", 400, "layer")],
)  # fmt: skip
def test_what_is_not_there_is_said_in_words(served: Served, path: str, status: int, says: str) -> None:
    client, link = served
    answer = client.get(path.replace("KEY", link.partition("#/run/")[2]))
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_only_get_is_answered(served: Served, method: str) -> None:
    answer = served[0].request(method, "/api/runs")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")


def test_every_answer_tells_the_browser_to_be_careful(served: Served) -> None:
    for path in ("/", "/api/runs", "/api/nothing", "/viewer.js"):
        told = served[0].get(path).headers
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in told["content-security-policy"]
        assert "unsafe" not in told["content-security-policy"]
        assert (told["x-content-type-options"], told["referrer-policy"]) == ("nosniff", "no-referrer")
        assert told["cross-origin-resource-policy"] == told["cross-origin-opener-policy"] == "same-origin"
        assert "server" not in told
    assert served[0].get("/api/runs").headers["cache-control"] == "no-store"


def test_a_run_that_goes_on_is_followed(served: Served, run: RunDirectory) -> None:
    client, _ = served
    before = get(served, "/episodes")["total"]
    with run.lock(), Store.open(run.store) as store:
        start = start_episode(store, 7)
        with run.metrics.open("a") as file:
            file.write('ess": 0.5}\n')
        assert client.get("/api/runs").json()["runs"][0]["state"] == "running"
        assert get(served, "")["series"]["success"] == [None, 0.5]
        wait_for(lambda: get(served, "/episodes")["total"] == before + 1)
        assert get(served, "/episode", id=start.id)["ended_at"] is None
        store.end(start.id, Outcome.TIMEOUT, counted=False, ended_at=110.0)
        wait_for(lambda: get(served, "/episodes", outcome="timeout")["matched"] == 1)


def wait_for(is_so: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_reading_leaves_every_file_as_it_was(tmp_path: Path, run: RunDirectory) -> None:
    copy = create_run(tmp_path / "runs", "copy")
    for path in (run.recipe, run.metrics):
        (copy.path / path.name).write_bytes(path.read_bytes())
    with Store.open(copy.store) as store:
        add_episode(store, 0, 1.0)
    before = digests(copy)
    process, link = start_viewer("runs/copy", "--port", "0", folder=tmp_path)
    with httpx.Client(base_url=link.partition("#")[0], timeout=30) as client:
        key = link.partition("#/run/")[2]
        for path in (
            "",
            "/episodes",
            "/facets",
            "/episode?id=train.0.t0.0",
            "/call?id=c0",
            "/group?name=0/t",
            "/credit?group=0/t",
        ):
            assert client.get(f"/api/run/{key}{path}").status_code == 200
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    assert digests(copy) == before


def test_credit_keeps_nobody_waiting_and_ctrl_c_waits_for_nobody(tmp_path: Path) -> None:
    made = create_run(tmp_path / "runs", "slow")
    (tmp_path / "slow.py").write_text("import time\n\ndef rule(group):\n    time.sleep(60)\n")
    made.recipe.write_text(
        make_recipe(tmp_path, train={"credit": {"rule": f"{tmp_path}/slow.py:rule"}, "steps": 1}).to_yaml()
    )
    with Store.open(made.store) as store:
        add_episode(store, 0, 1.0)
    process, link = start_viewer("runs/slow", "--port", "0", folder=tmp_path)
    base, _, key = link.partition("#/run/")

    def ask_credit(number: int) -> None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(f"{base}api/run/{key}/credit?group=0/t", timeout=30)

    with ThreadPoolExecutor(6) as askers:
        askers.map(ask_credit, range(6))
        with httpx.Client(base_url=base, timeout=10) as client:
            time.sleep(0.3)
            assert client.get(f"/api/run/{key}/episode?id=train.0.t0.0").json()["task"] == "t0"
            assert client.get(f"/api/run/{key}/episodes").json()["total"] == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    assert "Traceback" not in process.communicate()[0]


def test_two_viewers_never_share_a_port() -> None:
    with listen("127.0.0.1", 0, is_asked_for=True) as first:
        port = first.getsockname()[1]
        with pytest.raises(ServerError, match="cannot listen"):
            listen("127.0.0.1", port, is_asked_for=True)
        if port < 65535:
            with listen("127.0.0.1", port, is_asked_for=False) as second:
                assert second.getsockname()[1] > port


@pytest.mark.parametrize("port", ["-1", "65536", "70000"])
def test_a_port_that_is_none_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", f"--port={port}", "--no-open"]) == 2
    assert "0 to 65535" in capsys.readouterr().err


def test_a_rule_that_ends_the_program_is_an_answer(
    run: RunDirectory, page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "_list", lambda *_: sys.exit(3))
    answer = asked(run, page).get("/api/runs")
    assert (answer.status_code, answer.json()["error"]) == (500, "the viewer failed at this")


def test_one_file_holds_what_was_chosen_and_nothing_of_others(
    tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = create_run(tmp_path / "runs", "demo")
    made.recipe.write_text(make_recipe(tmp_path, train={"steps": 3}).to_yaml())
    with Store.open(made.store) as store:
        for number, good in enumerate((1.0, 0.0, 0.25, 0.5)):
            add_episode(store, number, good, long=f"said by {number}!")
    with contextlib.closing(sqlite3.connect(made.store)) as database, database:
        database.execute("UPDATE calls SET versions = x'00' WHERE id = 'c3'")
        database.execute("UPDATE episodes SET phase = 'eval-base', \"group\" = '' WHERE id = 'train.0.t3.3'")
    (page / "index.html").write_text(
        '<meta charset="utf-8" /><script type="module" src="./viewer.js"></script><link rel="stylesheet" href="a"></body>'
    )
    monkeypatch.setattr(page_files, "FOLDER", page)
    monkeypatch.setattr(page_files, "is_built", lambda: True)
    out = tmp_path / "one.html"
    ids = ["train.0.t0.0", "train.0.t1.1", "train.0.t3.3"]
    assert main(["traces", "html", str(made.path), *ids, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("2 episodes in")
    assert "train.0.t3.3 is left out: call c3" in said.err
    text = out.read_text()
    data = json.loads(text.partition('id="lrl-data">')[2].partition("</script>")[0])
    of = f"run/demo.{made.path.name}"
    assert {
        "runs",
        of,
        f"{of}/episodes",
        f"{of}/facets",
        f"{of}/episode?id=train.0.t0.0",
        f"{of}/call?id=c1",
    } <= data.keys()
    assert [row["agents"] for row in data[f"{of}/episodes"]["rows"]] == [["solver"], ["solver"]]
    assert {one["episode"] for one in data[f"{of}/group?name=0%2Ft"]["samples"]} == set(ids[:2])
    credit = data[f"{of}/credit?group=0%2Ft"]
    assert [rollout["episode"] for rollout in credit["rollouts"]] == ids[:2]
    assert credit["own"]["calls"].keys() == {"c0", "c1"}
    assert credit["notes"][-1].startswith("1 of the group's 3 rollouts are not in this file")
    assert "said by 1!" in text
    assert not re.search(r"said by [23]!|t2\.2|\bc2\b", text)
    for wrong in (str(tmp_path), "/", str(tmp_path / "none" / "a.html")):
        assert main(["traces", "html", str(made.path), "--out", wrong]) == 2
        assert "cannot write" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def digests(run: RunDirectory) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.path.rglob("*") if path.is_file()}


def test_the_next_port_is_taken_unless_one_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "lightning_rl.cli", "ui", "--port", port, "--no-open"],
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 2
    assert f"cannot listen at 127.0.0.1:{port}" in done.stderr
    assert "--port 0" in done.stderr


PAGE = '<!doctype html><meta name="csp-nonce" content=""><script src="./viewer.js"></script>'


@pytest.fixture
def page(tmp_path: Path) -> Path:
    folder = tmp_path / "page"
    folder.mkdir()
    for name, text in (("index.html", PAGE), ("viewer.js", "let a = 1;" * 9), ("viewer.css", "a {}")):
        (folder / name).write_text(text)
    return folder


def asked(
    run: RunDirectory,
    page: Path,
    host: str = "127.0.0.1",
    token: str | None = None,
    base: str = "http://127.0.0.1:7860",
) -> TestClient:
    library = Library(shelf_of(str(run.path)), None)
    return TestClient(build_app(library, Access(host, 7860, token), page), base_url=base, follow_redirects=False)


def test_the_page_has_a_nonce_of_its_own_each_time(run: RunDirectory, page: Path) -> None:
    client = asked(run, page)
    nonces = set()
    for _ in range(2):
        answer = client.get("/")
        (nonce,) = re.findall(r'csp-nonce" content="([^"]{16,})"', answer.text)
        assert f"'nonce-{nonce}'" in answer.headers["content-security-policy"]
        nonces.add(nonce)
    assert len(nonces) == 2
    script = client.get("/viewer.js")
    assert (script.text, script.headers["content-encoding"]) == ("let a = 1;" * 9, "gzip")
    assert client.get("/viewer.js", headers={"if-none-match": script.headers["etag"]}).status_code == 304
    assert client.get("/viewer.css", headers={"accept-encoding": ""}).text == "a {}"
    assert client.get("/index.html").status_code == 404


def test_a_page_that_is_not_built_says_how_to_build_it(run: RunDirectory, tmp_path: Path) -> None:
    answer = asked(run, tmp_path).get("/")
    assert answer.status_code == 503
    assert "make page" in answer.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 200), ({"host": "localhost:9"}, 200), ({"host": "[::1]:9"}, 200), ({"host": "127.1.2.3"}, 200),
     ({"host": "evil.example"}, 403), ({"host": "127.0.0.1.evil.example"}, 403), ({"host": "localhost.evil.example:7860"}, 403),
     ({"host": ""}, 403), ({"host": "a@127.0.0.1"}, 403),
     ({"origin": "http://127.0.0.1:7860"}, 200), ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403),
     ({"origin": "http://127.0.0.1:3000"}, 403), ({"sec-fetch-site": "same-origin"}, 200),
     ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "script"}, 403),
     ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors", "sec-fetch-dest": "empty"}, 403),
     ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}, 403),
     ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}, 200)],
)  # fmt: skip
def test_on_loopback_pages_of_other_sites_are_refused(
    run: RunDirectory, page: Path, headers: dict[str, str], status: int
) -> None:
    assert asked(run, page).get("/api/runs", headers=headers).status_code == status


def test_elsewhere_a_token_is_asked_for_and_kept_in_a_cookie(run: RunDirectory, page: Path) -> None:
    client = asked(run, page, host="0.0.0.0", token="right-token", base="http://box.lan:7860")
    assert client.get("/").status_code == 200, "the page holds nothing secret"
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"cookie": "lrl-ui-7860=wrong"},
        {"authorization": "right-token"},
    ):
        refused = client.get("/api/runs", headers=headers)
        assert (refused.status_code, "token" in refused.json()["error"]) == (401, True)
    assert client.get("/api/runs?token=right-token").status_code == 401, "addresses end up in logs"
    assert client.get("/api/runs", headers={"authorization": "bearer right-token"}).status_code == 200
    assert "set-cookie" not in client.get("/?token=wrong").headers
    answer = client.get("/?token=right-token")
    assert (answer.status_code, answer.headers["location"]) == (303, "./")
    assert answer.headers["set-cookie"] == "lrl-ui-7860=right-token; Path=/; HttpOnly; SameSite=Strict"
    assert client.get("/api/runs").status_code == 200
    assert client.get("/api/runs", headers={"origin": "http://evil.example"}).status_code == 403


def test_beyond_loopback_the_printed_link_has_a_token(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    process, link = start_viewer("--host", "0.0.0.0", "--port", "0", folder=tmp_path)
    try:
        base, _, token = link.partition("?token=")
        port = httpx.URL(base).port
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}")
        assert len(token) >= 32
        assert client.get("/api/runs").status_code == 401
        assert client.get("/api/runs", headers={"authorization": f"Bearer {token}"}).json()["runs"] == []
    finally:
        process.kill()
        rest = process.communicate()[0].splitlines()
        assert not [line for line in rest if token in line and not LINK.search(line)], (
            "it is in the links, and nowhere else"
        )


def test_loopback_is_told_from_what_looks_like_it() -> None:
    assert all(
        map(is_loopback, ("127.0.0.1", "localhost", "LOCALHOST.", "a.localhost", "::1", "[::1]", "::ffff:127.0.0.1"))
    )
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "localhost.evil", "127.0.0.1.evil", "10.0.0.1", "0x7f.1")))


def test_large_answers_are_packed_where_the_browser_unpacks(run: RunDirectory, page: Path) -> None:
    client = asked(run, page)
    key = client.get("/api/runs").json()["chosen"]
    run.metrics.write_text("".join(json.dumps({"step": step, "kl": step / 7}) + "\n" for step in range(1, 900)))
    path = f"/api/run/{key}"
    packed, plain = client.get(path), client.get(path, headers={"accept-encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.json() == plain.json()
    assert len(gzip.compress(plain.content, 1)) < len(plain.content) / 2


def test_few_stores_are_open_at_a_time_and_another_file_is_noticed(tmp_path: Path) -> None:
    places = []
    for number in range(MOST_OPEN + 2):
        folder = tmp_path / "runs" / f"r{number}"
        folder.mkdir(parents=True)
        with Store.open(folder / "episodes.db") as store:
            add_episode(store, 0, 1.0)
        places.append(folder)
    library = Library(shelf_of(str(tmp_path / "runs")), None)
    for folder in places:
        with library.reading(folder.name) as book:
            assert book.run.store.has_ended("train.0.t0.0")
    assert len(library._open) <= MOST_OPEN
    newest = places[-1]
    with library.reading(newest.name) as before, Store.open(newest / "new.db") as store:
        add_episode(store, 5, 1.0)
        store.close()
        (newest / "new.db").replace(newest / "episodes.db")
        with library.reading(newest.name) as book:
            assert book is not before
            assert book.run.store.start_of("train.0.t5.5") is not None
    library.close()


def test_a_store_of_an_earlier_version_is_left_as_it_is(tmp_path: Path, page: Path) -> None:
    folder = tmp_path / "runs" / "old"
    folder.mkdir(parents=True)
    with Store.open(folder / "episodes.db") as store:
        add_episode(store, 0, 1.0)
    with sqlite3.connect(folder / "episodes.db") as database:
        database.execute("ALTER TABLE calls DROP COLUMN alternatives")
        database.execute("ALTER TABLE calls DROP COLUMN entropies")
        database.execute("PRAGMA user_version = 4")
    database.close()
    before = (folder / "episodes.db").read_bytes()
    library = Library(shelf_of(str(folder)), None)
    with TestClient(build_app(library, Access("127.0.0.1", 7860, None), page), base_url="http://127.0.0.1") as client:
        answer = client.get("/api/run/old/episodes")
        assert answer.status_code == 400
        assert "`lrl traces list RUN`" in answer.json()["hint"]
        assert "earlier version" in client.get("/api/runs").json()["runs"][0]["note"]
    assert (folder / "episodes.db").read_bytes() == before
