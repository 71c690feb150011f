"""One file of HTML: addresses as the page makes them, and content that can neither end its place nor run."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from lightning_rl.errors import LightningError
from trainers.viewer.one_file import address, of_run, one_file

INDEX = """\
<!doctype html>
<html lang="en">
  <head>
    <meta charset="utf-8" />
    <meta name="csp-nonce" content="" />
    <script type="module" crossorigin src="./viewer.js"></script>
    <link rel="stylesheet" crossorigin href="./viewer.css">
  </head>
  <body>
    <div id="root"></div>
  </body>
</html>
"""
HOSTILE = "</script><script>alert(1)</script><!-- \u2028 \\ \" ' & \ud800 😀"


class Elements(HTMLParser):
    """Tags with their attributes, and the texts of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag if tag in ("script", "style") else None
        if self._inside:
            self.texts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside:
            self.texts[-1] += data


def test_whatever_is_in_it_the_file_has_one_script_that_runs_and_the_data_as_it_was():
    code = 'const a = "</script><!--<script>"; /x<\\/SCRIPT>/'
    text = b"".join(
        one_file(INDEX, code, "a { content: '</style>' }", [(HOSTILE, {"text": HOSTILE, "nan": float("nan")})])
    )
    page = Elements(text.decode())
    script, style, data = page.texts
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "module"}, {"type": "application/json", "id": "lrl-data"}]
    assert "<script>alert" not in text.decode()
    said = HOSTILE.replace("\ud800", "\ufffd")
    assert json.loads(data) == {said: {"text": said, "nan": None}}
    assert style == r"a { content: '<\/style>' }"
    policy = next(attributes["content"] for _, attributes in page.tags if attributes.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert re.search(r"script-src[^;]*unsafe-inline", policy) is None
    assert [tag for tag, _ in page.tags].index("meta") < [tag for tag, _ in page.tags].index("script")


def test_a_page_that_is_put_together_in_another_way_is_refused():
    with pytest.raises(LightningError, match="not as expected"):
        list(one_file(INDEX.replace("crossorigin src", "data-src"), "", "", []))
    with pytest.raises(LightningError, match="not as expected"):
        list(one_file(INDEX.replace("</body>", ""), "", "", []))


IDS = ["train.3.a-7.2.0", "a b", "~*'()!", "ü/😀?#&=+%", "", "-._", "a\nb", 'q"<>\\^`{|}', "\ud800x"]


def test_addresses_are_those_that_the_page_makes():
    if shutil.which("node") is None and not os.environ.get("CI"):
        pytest.skip("node, which says what a browser would, is not here")
    program = """
        const ids = JSON.parse(process.argv[1]);
        const query = (pairs) => {
          const all = new URLSearchParams();
          for (const [name, value] of pairs) if (value !== "") all.append(name, value);
          return all.toString();
        };
        const run = (id) => { try { return encodeURIComponent(id.toWellFormed?.() ?? id); } catch { return "\\ufffd"; } };
        console.log(JSON.stringify(ids.map((id) => [run(id), query([["group", id], ["rule", id], ["rule", "b"]])])));
    """
    done = subprocess.run(["node", "-e", program, json.dumps(IDS)], capture_output=True, text=True, check=True)
    for id, (run, query) in zip(IDS, json.loads(done.stdout), strict=True):
        assert of_run(id, "call") == f"run/{run}/call"
        assert address("p", {"rule": [id, "b"], "group": id}) == f"p?{query}"


def test_an_address_without_arguments_is_its_path():
    assert address("runs") == address("runs", {"id": "", "rule": []}) == "runs"
