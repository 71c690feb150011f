"""Who is let in: keys in all their spellings, web pages by their origin, and what is told to those who are not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from rollout_server.api.front.routes import ROUTES
from tests.integration.served_web import CHAT, Served, hello, served

KEY = "sk-schlüssel"
ADMIN = "admin"
PAGE = "https://example.org"


@pytest.fixture(scope="module")
def web(tiny_llama: Path) -> Iterator[Served]:
    with served(tiny_llama, api_key=KEY, cors_origins=[PAGE]) as running:
        yield running


def status(web: Served, path: str = "/v1/models", *, method: str = "GET", **headers: str | bytes) -> int:
    lines = [f"{method} {path} HTTP/1.1".encode(), b"host: x", b"connection: close"]
    for name, value in headers.items():
        lines.append(name.replace("_", "-").encode() + b": " + (value.encode() if isinstance(value, str) else value))
    return int(web.raw(b"\r\n".join([*lines, b"", b""])).split()[1])


@pytest.mark.parametrize(
    "shown",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {KEY}"},
        {"authorization": f"BEARER   {KEY}  "},
        {"authorization": f"Bearer\t{KEY}"},
        {"x_api_key": KEY},
        {"x_api_key": KEY, "authorization": f"Bearer {KEY}"},
    ],
)
def test_a_key_is_let_in_however_it_is_spelt(web: Served, shown: dict[str, str]) -> None:
    assert status(web, **shown) == 200


@pytest.mark.parametrize(
    "shown",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": f"Bearer {KEY} {KEY}"},
        {"authorization": f"Bearer {KEY}".encode("latin-1")},
        {"authorization": b"Bearer \xff\xfe"},
        {"authorization": f"Bearer {ADMIN}"},
        {"x_api_key": ADMIN},
        {"x_api_key": KEY, "authorization": "Bearer other"},
    ],
)
def test_no_other_key_is_let_in(web: Served, shown: dict[str, str]) -> None:
    assert status(web, **shown) == 401


def test_every_route_but_health_needs_its_own_key(web: Served) -> None:
    """Also at its episodes' paths; and no key opens what is the other's."""
    assert status(web, "/health") == 200
    for route in ROUTES:
        if route.access == "open":
            continue
        other = KEY if route.access == "admin" else ADMIN
        for path in [route.path, *([f"/e/some{route.path}"] if route.recorded else [])]:
            path = path.replace(":path", "").replace("{", "").replace("}", "")
            assert status(web, path, method=route.method) == 401
            assert status(web, path, method=route.method, authorization=f"Bearer {other}") == 401


def test_a_model_is_found_by_a_name_with_a_slash(tiny_llama: Path) -> None:
    with served(tiny_llama, served_name="Qwen/Qwen3-0.6B", aliases=[]) as web:
        for name in ("Qwen/Qwen3-0.6B", "Qwen%2FQwen3-0.6B"):
            for root in ("", "/e/some"):
                assert web.get(f"{root}/v1/models/{name}").json()["id"] == "Qwen/Qwen3-0.6B"
        for name in ("", "Qwen", "Qwen/", "Qwen/Qwen3-0.6B/"):
            assert web.get(f"/v1/models/{name}").status_code == 404
        described = web.get("/openapi.json").json()["paths"]
        assert {"/v1/models/{model}", "/e/{episode}/v1/models/{model}"} <= set(described)


def test_refusals_say_how_to_ask_and_never_what_was_shown(web: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        refused = web.post(headers={"authorization": "Bearer sk-almost-right"})
        web.post(headers={b"authorization": f"Bearer {KEY}".encode()})
        web.get("/stats", headers={"authorization": f"Bearer {ADMIN}"})
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"] == {
        "message": "the API key is missing or wrong",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert not any(key in text for text in ours for key in ("almost-right", KEY, "sk-schl"))


def test_without_a_key_anybody_may_call_but_the_trainers_routes_stay_closed(tiny_llama: Path) -> None:
    with served(tiny_llama) as web:
        assert web.post().status_code == 200
        assert web.get("/metrics").status_code == 200
        assert web.get("/stats").status_code == 401
        assert web.post(headers={"origin": PAGE}).status_code == 403
        assert httpx.options(web.url + CHAT, headers={"origin": PAGE}).status_code == 403
        assert httpx.options(web.url + CHAT).status_code == 405


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", f"{PAGE}.evil.example", "http://example.org", "*", ""]
)
def test_web_pages_of_other_origins_are_refused_even_with_the_key(web: Served, origin: str) -> None:
    refused = web.post(headers={b"authorization": f"Bearer {KEY}".encode(), b"origin": origin.encode()})
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers
    asked = httpx.options(web.url + CHAT, headers={"origin": origin, "access-control-request-method": "POST"})
    assert asked.status_code == 403


def test_a_web_page_of_a_configured_origin_may_call(web: Served) -> None:
    asked = httpx.options(
        web.url + CHAT,
        headers={
            "origin": PAGE,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, content-type, x-stainless-os",
        },
    )
    assert (asked.status_code, asked.content) == (204, b"")
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert "x-stainless-os" in asked.headers["access-control-allow-headers"]
    for key, expected in ((KEY, 200), ("wrong", 401)):
        answer = web.post(headers={b"authorization": f"Bearer {key}".encode(), b"origin": PAGE.encode()})
        assert answer.status_code == expected
        assert answer.headers["access-control-allow-origin"] == PAGE


def test_prompts_are_in_no_error_and_in_no_log(web: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is wrong with the request, and when the server itself fails over it."""
    secret = "my-diary-says"
    shown = {b"authorization": f"Bearer {KEY}".encode()}
    bad = [
        hello(temperature=secret),
        hello(messages=[{"role": secret, "content": secret}]),
        hello(messages=[{"role": "user", "content": [{"type": "text", "text": 7, "more": secret}]}]),
        hello(messages=secret),
        hello(tools=[{"type": "function", "function": {"name": 3, "description": secret}}]),
        hello(stop=[[secret]]),
        hello(logit_bias={"1": secret}),
    ]
    with caplog.at_level(logging.DEBUG):
        for body in bad:
            refused = web.post(body=body, headers=shown)
            assert refused.status_code == 400
            assert secret not in refused.text
        raw = httpx.post(web.url + CHAT, content=f'{{"messages": "{secret}" oops'.encode(), headers=shown)
        assert (raw.status_code, secret in raw.text) == (400, False)
    assert not [record for record in caplog.records if secret in record.getMessage() + str(record.exc_text)]


def test_a_defect_is_logged_by_its_place_not_by_its_words(
    web: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "-".join(["my", "diary"])

    def fails(*args: object, **options: object) -> None:
        raise ValueError(words)

    monkeypatch.setattr(type(web.services.renderer), "prompt", fails)
    monkeypatch.setattr(type(web.services.conversations), "prompt", fails)
    with caplog.at_level(logging.DEBUG):
        failed = web.post(headers={b"authorization": f"Bearer {KEY}".encode()})
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "internal_error")
    logged = "\n".join(record.getMessage() + str(record.exc_text) for record in caplog.records)
    assert "ValueError" in logged
    assert "in begin" in logged
    assert words not in logged + failed.text
