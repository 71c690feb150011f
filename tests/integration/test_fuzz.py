"""Requests that nobody would write: whatever comes, the answer is typed, comes soon, and the next request is served.

Three ways to make them: from the server's own OpenAPI document, by putting something odd somewhere into a good request, and as raw
bytes on a socket. `LRL_FUZZ=50` does fifty times as much.
"""

from __future__ import annotations

import copy
import json
import os
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks

from lightning_rl.episode import EpisodeStart, Task
from lightning_rl.store import Store
from rollout_server import messages as m
from rollout_server.api.front.openapi import describing, openapi
from rollout_server.api.front.routes import ROUTES, shown
from tests.integration.scripted_manager import tokens
from tests.integration.served_web import CHAT, Served, hello, request, served

EFFORT = int(os.environ.get("LRL_FUZZ", "1"))
SOON_S = 30.0
HELD_S = 20.0
"""How long others may be kept waiting: much more than they are, for busy machines, and much less than for ever."""
ADMIN = {"authorization": "Bearer admin"}

DOCUMENT: dict[str, Any] = json.loads(json.dumps(openapi([*ROUTES, describing(ROUTES)])))
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = {operation.label: operation for found in SCHEMA.get_all_operations() for operation in [found.ok()]}

CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]

TOOL = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
        "strict": True,
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "calculator", "arguments": '{"a": 1}'}}
SAID: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "1+1?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "2"},
]
GOOD: list[tuple[str, dict[str, Any]]] = [
    (CHAT, hello(messages=SAID, tools=[TOOL], tool_choice="auto", n=2, stop=["x"], logit_bias={"5": 1.0}, seed=7)),
    (CHAT, hello(stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2)),
    (CHAT, hello(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}})),
    (CHAT, hello(structured_outputs={"regex": "[a-z]{1,5}"}, chat_template_kwargs={"a": 1})),
    ("/e/fuzzed" + CHAT, hello(messages=SAID, tools=[TOOL], max_tokens=5, metadata={"a": {"b": [1]}})),
    ("/v1/completions", {"model": "tiny", "prompt": [[5, 6], [7]], "max_tokens": 3, "logprobs": 1, "n": 2}),
    ("/v1/completions", {"model": "tiny", "prompt": "once", "stream": True, "temperature": 0.5, "top_p": 0.9}),
    (
        "/generate",
        {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 3, "stop": ["a"]}, "return_logprob": True},
    ),
    (
        "/v1/responses",
        {
            "model": "tiny",
            "instructions": "Be brief.",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "1+1?"}]},
                {"type": "function_call", "call_id": "c1", "name": "calculator", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "2"},
            ],
            "tools": [{"type": "function", "name": "calculator", "parameters": {"type": "object"}, "strict": True}],
            "text": {"format": {"type": "text"}},
            "reasoning": {"effort": "low"},
        },
    ),
    (
        "/v1/messages",
        {
            "model": "tiny",
            "max_tokens": 5,
            "system": [{"type": "text", "text": "Be brief."}],
            "messages": [
                {"role": "user", "content": "1+1?"},
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "c1", "name": "calculator", "input": {"a": 1}}],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "2"}]},
            ],
            "tools": [{"name": "calculator", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "auto"},
            "stop_sequences": ["x"],
        },
    ),
    ("/tokenize", {"messages": SAID, "tools": [TOOL], "return_token_strs": True}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
    ("/score", {"sequences": [[5, 6], [7, 8, 9]]}),
    ("/update_weights", {"version": 3, "source": {"type": "shared_memory", "block": "b", "tensors": []}}),
    ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/a", "load_inplace": True, "version": 1}),
]


@pytest.fixture(scope="module")
def web(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Says a few tokens to everything, among them halves of characters and tokens without a text."""
    store = tmp_path_factory.mktemp("fuzz") / "episodes.db"
    with Store.open(store) as episodes, served(tiny_llama, aliases=["*"], store=str(store)) as running:
        episodes.begin(EpisodeStart(id="fuzzed", task=Task(id="t", input={}), phase="train"))

        def says(submit: m.Submit) -> list[m.FromManager]:
            said = [200, 1, 3, 150, 2][: submit.sampling.max_tokens]
            return [tokens(submit, said, "length", index=at) for at in range(submit.n)]

        running.manager.script = says
        yield running


def check(answer: httpx.Response, path: str) -> None:
    """Refused or served, never broken; errors in the dialect's shape."""
    assert answer.elapsed.total_seconds() < SOON_S
    assert answer.status_code < 500, answer.text
    if answer.status_code == 200:
        return
    assert answer.headers["content-type"] == "application/json"
    told = answer.json()
    jsonschema.validate(
        told, DOCUMENT["components"]["schemas"]["Error" if "/v1/messages" not in path else "AnthropicError"]
    )


def still_serves(web: Served) -> None:
    assert web.post().status_code == 200
    assert web.services.admission.flows == 0


def test_the_document_is_sound() -> None:
    """Every reference leads somewhere, every schema is one, every route is there."""
    components = DOCUMENT["components"]["schemas"]
    for schema in components.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    references = {part.split('"')[0] for part in json.dumps(DOCUMENT).split('"$ref": "')[1:]}
    assert {reference.removeprefix("#/components/schemas/") for reference in references} <= set(components)
    assert len(OPERATIONS) == len(
        {operation["operationId"] for path in DOCUMENT["paths"].values() for operation in path.values()}
    )
    for route in ROUTES:
        assert route.method.lower() in DOCUMENT["paths"][shown(route.path)]
        assert ("/e/{episode}" + shown(route.path) in DOCUMENT["paths"]) == route.recorded


def test_the_document_is_served(web: Served) -> None:
    assert web.get("/openapi.json").json() == DOCUMENT


def _asked() -> list[tuple[str, GenerationMode]]:
    labels = [label for label in OPERATIONS if "/health" not in label and "/e/" not in label]
    fit = [(label, GenerationMode.POSITIVE) for label in labels]
    return fit + [(label, GenerationMode.NEGATIVE) for label in labels if label.startswith("POST")]


@pytest.mark.parametrize(("label", "mode"), _asked())
def test_requests_made_from_the_document(web: Served, label: str, mode: GenerationMode) -> None:
    operation = OPERATIONS[label]

    @settings(max_examples=8 * EFFORT, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        answer = case.call(base_url=web.url, headers=ADMIN, timeout=SOON_S)
        case.validate_response(answer, checks=CHECKS)

    ask()
    still_serves(web)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 1.5, -0.0, 1e308, 5e-324]),
    st.sampled_from(
        ["", "\0", "\ufeff", "\u202e", "<|im_end|>", "{{", "{% raw %}", "(a+)+$", "\U0010ffff", "x" * 5000]
    ),
    st.sampled_from([[], {}, [[]], {"": None}, {"$ref": "#"}, {"type": "object", "properties": {"a": {"$ref": "#"}}}]),
    st.text(max_size=20),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
)


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if here:
        yield here
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in entries:
        yield from places(child, (*here, key))


@st.composite
def nearly_good(draw: st.DrawFn, body: dict[str, Any]) -> dict[str, Any]:
    """A good body with one or two odd values, or a field too many, or one too few."""
    body = json.loads(json.dumps(body))
    for _ in range(draw(st.integers(1, 2))):
        *way, last = draw(st.sampled_from(list(places(body))))
        inside: Any = body
        for key in way:
            inside = inside[key]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"])):
            case "remove":
                del inside[last]
            case "add" if isinstance(inside, dict):
                inside[draw(st.text(max_size=8))] = copy.deepcopy(draw(ODD))
            case _:
                inside[last] = copy.deepcopy(draw(ODD))
        if not body:
            break
    return body


@pytest.mark.parametrize("number", range(len(GOOD)))
def test_good_requests_are_served(web: Served, number: int) -> None:
    """Otherwise what is made of them would not get far."""
    path, body = GOOD[number]
    assert httpx.post(web.url + path, json=body, headers=ADMIN).status_code == 200


@pytest.mark.parametrize("number", range(len(GOOD)))
def test_something_odd_somewhere_in_a_good_request(web: Served, number: int) -> None:
    path, good = GOOD[number]
    with httpx.Client(base_url=web.url, headers=ADMIN, timeout=SOON_S) as client:

        @settings(max_examples=30 * EFFORT, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(nearly_good(good))
        def ask(body: dict[str, Any]) -> None:
            check(client.post(path, json=body), path)

        ask()
    still_serves(web)


HOSTILE = {
    "nothing": b"",
    "no JSON": b"hello",
    "half": b'{"model": "tiny", "messages": [',
    "two": b"{}{}",
    "a list": b"[]",
    "a number": b"7",
    "UTF-8 cut off": b'{"model": "\xc3',
    "bytes that are no UTF-8": b'{"model": "\xff\xfe"}',
    "surrogates as bytes": b'{"model": "\xed\xa0\x80"}',
    "overlong": b'{"model": "\xc0\xaf"}',
    "UTF-16": '{"model": "tiny"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"model": "tiny"}',
    "a lone surrogate": rb'{"model": "tiny", "messages": [{"role": "user", "content": "\ud800"}]}',
    "surrogates the wrong way round": rb'{"model": "tiny", "messages": [{"role": "user", "content": "\udc00\ud800"}]}',
    "a raw zero byte": b'{"model": "ti\x00ny"}',
    "NaN": b'{"model": "tiny", "temperature": NaN}',
    "infinity": b'{"model": "tiny", "temperature": -Infinity}',
    "too large for a float": b'{"model": "tiny", "temperature": 1e400}',
    "an integer of 5,000 digits": b'{"model": "tiny", "seed": 1' + b"0" * 5000 + b"}",
    "an integer of 4,000 digits": b'{"model": "tiny", "seed": 1' + b"0" * 4000 + b"}",
    "a float of 100,000 digits": b'{"model": "tiny", "temperature": 0.' + b"1" * 100_000 + b"}",
    "100,000 brackets": b"[" * 100_000,
    "100,000 braces": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "500 deep": b'{"model": "tiny", "metadata": ' + b'{"a":' * 500 + b"1" + b"}" * 501,
    "a million dicts": b'{"metadata": {"a": [' + b"{}," * 1_000_000 + b"{}]}}",
    "ten million numbers": b'{"prompt": [' + b"1," * 10_000_000 + b"1]}",
    "comments": b'{"model": "tiny" /* here */}',
}


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/generate"])
@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_bodies_that_are_no_request(web: Served, path: str, body: bytes) -> None:
    began = time.monotonic()
    answer = httpx.post(web.url + path, content=body, timeout=SOON_S)
    assert time.monotonic() - began < SOON_S
    assert answer.status_code == 400
    check(answer, path)


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


SCHEMAS: dict[str, Any] = {
    "no type that there is": {"type": "thing"},
    "itself": {"$ref": "#"},
    "a reference to nowhere": {"$ref": "#/$defs/x"},
    "a reference out of the house": {"$ref": "http://127.0.0.1:1/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "two that need each other": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "a tree without an end": {
        "type": "object",
        "properties": {"a": {"$ref": "#"}, "b": {"$ref": "#"}},
        "required": ["a", "b"],
    },
    "30 deep": _deep(30),
    "10,000 properties": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(10_000)}},
    "20,000 choices": {"enum": [f"choice number {n}" for n in range(20_000)]},
    "many alternatives of alternatives": {"anyOf": [{"anyOf": [{"type": "array", "items": {}}] * 30}] * 30},
    "all of them": {"allOf": [{"type": "object", "properties": {f"p{n}": {"type": "string"}}} for n in range(500)]},
    "a long string": {"type": "string", "minLength": 10**9},
    "many items": {"type": "array", "minItems": 10**7, "items": {"type": "integer"}},
    "a hostile pattern": {"type": "string", "pattern": "^(((a{1,1000}){1,1000}){1,1000})$"},
    "patterns of names": {"type": "object", "patternProperties": {"^(a+)+$": {"type": "string"}}},
    "numbers of no size": {"type": "number", "multipleOf": 1e-300, "minimum": 1e300},
    "false": {"type": "object", "properties": {"a": False}, "required": ["a"]},
}
PATTERNS = [
    "(a+)+$",
    "(a|aa)*b",
    "((a{1,1000}){1,1000}){1,1000}",
    "a{1000000000}",
    "(" * 5000,
    "(" * 500 + "a" + ")" * 500,
    "[" * 1000,
    r"(?=a)b",
    r"(a)\1",
    r"\p{L}{1,10000}",
    "(.*a){50}",
    "[^\\x00-\\U0010ffff]",
    ".{1,100000}" * 10,
    "|".join(f"word{n}" for n in range(20_000)),
]


def _ask_beside_others(web: Served, body: dict[str, Any]) -> None:
    """It is refused or served; meanwhile nobody else waits."""
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=web.url, timeout=60) as other:
        other.get("/v1/models")
        asked = pool.submit(httpx.post, web.url + CHAT, json=body, timeout=60)
        while not asked.done():
            began = time.monotonic()
            other.get("/v1/models")
            assert time.monotonic() - began < HELD_S
        check(asked.result(), CHAT)
        assert asked.result().status_code in (200, 400)


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
def test_hostile_schemas(web: Served, schema: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    _ask_beside_others(web, hello(response_format=wanted))
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    _ask_beside_others(web, hello(tools=[tool], tool_choice="required"))
    still_serves(web)


@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
def test_hostile_patterns(web: Served, pattern: str) -> None:
    _ask_beside_others(web, hello(structured_outputs={"regex": pattern}))
    still_serves(web)


def test_what_is_odd_but_json_is_served(web: Served) -> None:
    for content in (r"\ud83d\ude00", r"\u0000", r"\uffff", r"\/", "﷽" * 100):
        raw = f'{{"model": "a", "model": "tiny", "messages": [{{"role": "user", "content": "{content}"}}]}}'
        assert httpx.post(web.url + CHAT, content=raw.encode()).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "a", "json"]
)
def test_another_type_of_content_is_refused(web: Served, kind: str) -> None:
    answer = httpx.post(web.url + CHAT, content=b"{}", headers={"content-type": kind})
    assert answer.status_code == 415
    check(answer, CHAT)


def test_unknown_paths_and_methods_are_refused_in_shape(web: Served) -> None:
    for path in (
        "/",
        "//",
        "/v1",
        "/v1/",
        CHAT + "/",
        "/e//v1/models",
        "/%00",
        "/..%2f..%2fetc",
        "/é",
    ):
        answer = web.get(path)
        assert answer.status_code == 404
        check(answer, path)
    answer = httpx.put(web.url + "/v1/responses/x")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET")
    check(answer, "/v1/responses/x")
    assert httpx.get(web.url + "/v1/messages").json()["type"] == "error"
    assert httpx.head(web.url + "/v1/models").status_code == 200


def test_a_body_of_32_mb_does_not_hold_up_others(web: Served) -> None:
    """While it is read and refused, somebody else's requests are answered."""
    numbers = b'{"model": "tiny", "prompt": [' + b"1," * 1_900_000 + b"1]}"
    text = b'{"model": "tiny", "prompt": "' + b"word " * 6_000_000 + b'"}'
    chat = b'{"model": "tiny", "messages": [{"role": "user", "content": "' + b"word " * 6_000_000 + b'"}]}'
    for path, body in (("/v1/completions", numbers), ("/v1/completions", text), (CHAT, chat)):
        with web.connect() as line, httpx.Client(base_url=web.url, timeout=60) as other:
            other.get("/v1/models")
            line.settimeout(60)
            line.sendall(request(path, body))
            slowest = 0.0
            line.setblocking(False)
            while True:
                began = time.monotonic()
                other.get("/v1/models")
                slowest = max(slowest, time.monotonic() - began)
                try:
                    head = line.recv(64)
                    break
                except BlockingIOError:
                    time.sleep(0.01)
            assert head.split()[1] == b"400"
            print(path, slowest)
            assert slowest < HELD_S, path


PIECES = st.sampled_from(
    [
        b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n",
        b"content-length: 5\r\n",
        b"content-length: -1\r\n",
        b"content-length: 99999999999999999999999\r\n",
        b"transfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked, identity\r\n",
        b"expect: 100-continue\r\n",
        b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: x\r\nsec-websocket-version: 13\r\n",
        b"connection: upgrade\r\nupgrade: h2c\r\n",
        b"\r\n",
        b"{}",
        b"5\r\nhello\r\n0\r\n\r\n",
        b"ffffffffffffffff\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        b"GET http://other/health HTTP/1.1\r\nhost: x\r\n\r\n",
        b"x" * 300,
        b"\0",
    ]
)


@settings(max_examples=40 * EFFORT, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(PIECES | st.binary(max_size=40), min_size=1, max_size=6), st.booleans())
def test_bytes_that_are_hardly_http(web: Served, pieces: list[bytes], resets: bool) -> None:
    """Whole or cut off, politely or not; then a good request on another connection."""
    with web.connect() as line:
        if resets:
            line.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SO_LINGER: close sends a reset
        try:
            for piece in pieces:
                line.sendall(piece)
            if not resets:
                line.settimeout(0.02)
                answer = line.recv(65536)
                assert not answer or int(answer.split()[1]) < 500
        except (TimeoutError, ConnectionError):
            pass
    still_serves(web)
