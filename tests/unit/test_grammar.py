"""Grammars over the real tokenizer: what is allowed, where a text may end, and that hostile ones cost little."""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer, models

import rollout_server.grammar
from rollout_server.grammar import KEPT, Grammars, Matcher
from rollout_server.grammar_limits import objection
from rollout_server.manager.masking import GrammarError

VOCABULARY = 49_159
"""Seven ids more than the tokenizer has, as in models whose embedding is padded."""
STOP = 2
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "colour": {"enum": ["red", "grün", 'a "quoted" one']},
    },
    "required": ["name", "size", "colour"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(tiny_llama: Path) -> Grammars:
    return Grammars(tiny_llama, VOCABULARY)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))


def of_schema(schema: object) -> str:
    return json.dumps({"grammars": [{"json_schema": schema}]})


def of_regex(regex: str) -> str:
    return f"start: /{regex}/"


def ids_of(mask: bytes) -> list[int]:
    assert len(mask) == -(-VOCABULARY // 8)
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    assert not bits[VOCABULARY:].any(), "ids beyond the vocabulary are allowed"
    return [int(i) for i in np.flatnonzero(bits)]


def draw(matcher: Matcher, rng: random.Random, stop_ids: tuple[int, ...], limit: int = 400) -> list[int]:
    """Ids drawn from the masks, without the stop id that ended them."""
    ids: list[int] = []
    while len(ids) < limit and not (matcher.ended and not stop_ids):
        allowed = ids_of(matcher.allowed(stop_ids))
        token = rng.choice(allowed)
        if token in stop_ids:
            break
        ids.append(token)
        matcher.take(token)
    return ids


@pytest.mark.parametrize("stop_ids", [(), (STOP,), (STOP, 0, VOCABULARY + 5)])
def test_what_is_drawn_from_masks_fits_the_schema(
    grammars: Grammars, tokenizer: Tokenizer, stop_ids: tuple[int, ...]
) -> None:
    rng = random.Random(len(stop_ids))
    for _ in range(10):
        compact = of_schema({**SCHEMA, "x-guidance": {"whitespace_flexible": False}})
        text = tokenizer.decode(draw(grammars.matcher(compact), rng, stop_ids))
        jsonschema.validate(json.loads(text), SCHEMA)


def test_what_is_drawn_from_masks_fits_the_regex(grammars: Grammars, tokenizer: Tokenizer) -> None:
    regex = r"(ab|c[0-9]{2}){1,5}(é|日本)?"
    for seed in range(20):
        text = tokenizer.decode(draw(grammars.matcher(of_regex(regex)), random.Random(seed), (STOP,)))
        assert re.fullmatch(regex, text), text


def test_stop_ids_are_allowed_exactly_where_the_text_may_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Ids of common text too; and the tokenizer's own end is allowed only where it is asked for."""
    digit, letter = (tokenizer.encode(text).ids[0] for text in ("7", "a"))
    matcher = grammars.matcher(of_regex("[a-z]+[0-9]+"))
    stops = (digit, STOP)
    assert not set(stops) & set(ids_of(matcher.allowed(stops)))
    matcher.take(letter)
    assert digit in ids_of(matcher.allowed(()))
    assert not set(stops) & set(ids_of(matcher.allowed(stops))), (
        "a stop id that the grammar wants would end it too soon"
    )
    other = tokenizer.encode("8").ids[0]
    matcher.take(other)
    assert set(stops) <= set(ids_of(matcher.allowed(stops)))
    assert not {0, STOP} & set(ids_of(matcher.allowed(())))
    assert not matcher.ended


def test_an_ended_text_allows_nothing_but_stop_ids(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher = grammars.matcher('start: "yes" | "no"')
    (yes,) = tokenizer.encode("yes").ids
    assert not matcher.ended
    matcher.take(yes)
    assert matcher.ended
    assert ids_of(matcher.allowed((STOP,))) == [STOP]
    with pytest.raises(GrammarError, match="no token"):
        matcher.allowed(())


def test_forks_go_their_own_ways(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher = grammars.matcher('start: "ab" | "cd"')
    before = matcher.allowed(())
    fork = matcher.fork()
    fork.take(tokenizer.encode("a").ids[0])
    assert matcher.allowed(()) == before
    assert ids_of(fork.allowed(())) == [tokenizer.encode("b").ids[0]]
    with pytest.raises(GrammarError, match="does not fit"):
        fork.take(tokenizer.encode("x").ids[0])


@pytest.mark.parametrize(
    "grammar",
    [
        "",
        "start: ",
        "start: /(/",
        "{",
        '{"grammars": 7}',
        of_schema({"type": "nothing"}),
        of_schema({"$ref": "#"}),
        'start: ""',
        of_schema({"type": "string", "pattern": "(?=a)b"}),
        "no: lark",
        "\x00",
        "start: <|no such token|>",
    ],
)
def test_what_is_no_grammar_is_said_to_be_none(grammars: Grammars, grammar: str) -> None:
    why = grammars.check(grammar)
    assert why
    assert len(why) < 300
    with pytest.raises(GrammarError):
        grammars.matcher(grammar)


def chain(length: int, link: Any) -> dict[str, object]:
    """Definitions that refer to one another."""
    definitions = {f"{i:x}": link({"$ref": f"#/$defs/{i + 1:x}"}) for i in range(length)}
    return {"$defs": {**definitions, f"{length:x}": {"type": "integer"}}, "$ref": "#/$defs/0"}


def nested(levels: int, link: Any) -> object:
    value: object = {"type": "integer"}
    for _ in range(levels):
        value = link(value)
    return value


HOSTILE = {
    "a huge enum": of_schema({"enum": [f"{i:x}" for i in range(10_000)]}),
    "a huger enum": of_schema({"enum": list(range(100_000))}),
    "long constants": of_schema({"enum": ["ab" * 8000, "ac" * 8000, "ad" * 8000]}),
    "a longer constant": of_schema({"const": "ab" * 60_000}),
    "deep objects": of_schema(nested(60, lambda inner: {"type": "object", "properties": {"a": inner}})),
    "very deep arrays": '{"grammars":[{"json_schema":' + '{"items":' * 14_000 + "{}" + "}" * 14_000 + "}]}",
    "a long chain of references": of_schema(chain(3900, lambda inner: inner)),
    "a long chain of arrays": of_schema(chain(2800, lambda inner: {"items": inner})),
    "a long chain of alternatives": of_schema(chain(2000, lambda inner: {"anyOf": [inner, {"type": "string"}]})),
    "nested alternatives": of_schema(nested(50, lambda inner: {"anyOf": [inner, {"type": "object"}]})),
    "a tree that doubles": of_schema(chain(40, lambda inner: {"properties": {"a": inner, "b": inner}})),
    "alternatives that double": of_schema(chain(40, lambda inner: {"anyOf": [inner, inner]})),
    "a circle": of_schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    "many properties": of_schema({"type": "object", "properties": {f"{i:x}": {} for i in range(2500)}}),
    "too many properties": of_schema({"type": "object", "properties": {f"{i:x}": {} for i in range(9000)}}),
    "many patterns of properties": of_schema(
        {"type": "object", "patternProperties": {f"^(a|b){{{i}}}x.*y$": {"type": "string"} for i in range(1, 60)}}
    ),
    "a product of alternatives": of_schema(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(8)]} for i in range(8)]}
    ),
    "a large divisor": of_schema({"type": "integer", "multipleOf": 999_983}),
    "two divisors": of_schema({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}], "type": "integer"}),
    "a hidden divisor": of_schema({"type": "integer", "multipleOf": 999_983}).replace("999983", "999983e0"),
    "long strings": of_schema({"type": "string", "minLength": 1_000_000_000}),
    "long arrays": of_schema({"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000}),
    "numbers beyond numbers": of_schema({"type": "integer", "minimum": 0}).replace("0}", "1" + "0" * 5000 + "}"),
    "a schema's nested repeats": of_schema({"type": "string", "pattern": "^(([a-z]{1,100}){1,100}){1,100}$"}),
    "patterns at once": of_schema({"allOf": [{"type": "string", "pattern": f"^.*{i}x.*$"} for i in range(12)]}),
    "nested repeats": of_regex("((a{1,1000}){1,1000}){1,1000}"),
    "a huge repeat": of_regex("a{1000000000}"),
    "a large repeat": of_regex("(ab|cd|.e){5000,10000}"),
    "an exponential automaton": of_regex("(a|b)*a(a|b){60}"),
    "an exponential automaton of everything": of_regex("(.*a.{30}){5}"),
    "optional parts": of_regex("a?" * 2000 + "a" * 2000),
    "many words": of_regex("|".join(f"{i:05x}" for i in range(16_000 // 6))),
    "nested groups": of_regex("(" * 200 + "a" + ")" * 200),
    "very nested groups": of_regex("(" * 8000 + "a" + ")" * 8000),
    "classes of unicode": of_regex("(\\w{1,50}\\W{1,50}){1,50}"),
    "a chain of rules": "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(6000)) + '\nr6000: "a"',
    "terms that double": "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(40)) + '\nT40: "a"',
    "rules in brackets": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_cost_little(grammars: Grammars, name: str) -> None:
    """Refused or served: no crash, about a second to compile (0.1 s a mask), and a typed error when it is too much."""
    grammars.check('start: "a"')  # the tokenizer is ready
    started = time.process_time()
    why = grammars.check(HOSTILE[name])
    compiled = time.process_time()
    assert compiled - started < 3, f"{compiled - started:.1f} s to compile"
    slowest, rng = 0.0, random.Random(0)
    if why is None:
        matcher = grammars.matcher(HOSTILE[name])
        with contextlib.suppress(GrammarError):
            for _ in range(40):
                started = time.process_time()
                if matcher.ended:
                    break
                token = rng.choice(ids_of(matcher.allowed((STOP,))))
                if token == STOP:
                    break
                matcher.take(token)
                slowest = max(slowest, time.process_time() - started)
    assert slowest < 0.3, f"{slowest:.2f} s a mask"


def test_what_agents_ask_for_is_not_refused() -> None:
    """A hundred tools with ten arguments each; an enum of a thousand; long descriptions; money."""
    argument = {"type": "string", "description": "What it is for. " * 4}
    tool = {"type": "object", "properties": {f"argument_{i}": argument for i in range(10)}, "required": ["argument_0"]}
    assert objection(of_schema({"anyOf": [tool] * 100})) is None
    assert objection(of_schema({"enum": [f"value number {i}" for i in range(1000)]})) is None
    assert objection(of_schema({"type": "string", "description": "x" * 50_000})) is None
    assert objection(of_schema({"type": "number", "multipleOf": 0.01})) is None
    assert objection('start: "{" %json {"const": "{999999}"} "}"') is None


def test_limits_are_found_in_schemas_within_lark() -> None:
    for schema in ({"multipleOf": 99_991}, {"const": "x" * 20_000}, {"pattern": "a{20000}"}):
        assert objection("start: " + '"x" ' + "%json " + json.dumps({"properties": {"a": schema}}) + ' "</x>"')
        assert objection(json.dumps({"grammars": [{"lark_grammar": "start: %json " + json.dumps(schema)}]}))


def test_what_only_looks_like_a_schema_is_none(grammars: Grammars) -> None:
    """In a regular expression, a string or a comment; and what comes after it is still looked at."""
    text = '%json [{"multipleOf":99991}]'
    for literal in ("/" + text + "/", "/\\/" + text + "/", json.dumps(text), '"a\\\\" /' + text + "/"):
        assert objection(f"start: {literal}") is None
        assert objection(f'start: {literal} "/" {text}') is not None
        assert grammars.check(f"start: {literal}") is None
    assert objection(f'start: "a" // {text}\n') is None
    started = time.process_time()
    objection('start: "' + '\\"' * 60_000)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("number", ["1e9999999", "-1e-9999999", "1e99999999999999999999", "NaN"])
def test_numbers_beyond_the_decimal_modules_are_refused(grammars: Grammars, number: str) -> None:
    assert grammars.check("start: %json {" + f'"multipleOf":{number}' + "}") is not None
    grammars.check('start: /%json \\{"multipleOf":' + number + "}/")


@pytest.mark.parametrize("kind", [RuntimeError, BaseException])
def test_a_defect_is_the_fault_of_one_grammar(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    secret = "a " + "secret"

    def fails(grammar: str) -> None:
        raise kind(secret)

    with monkeypatch.context() as patch:
        patch.setattr("rollout_server.grammar.objection", fails)
        with pytest.raises(GrammarError, match=kind.__name__):
            grammars.matcher(f'start: "{kind.__name__}"')
    assert secret not in caplog.text
    assert grammars.check(f'start: "{kind.__name__}"') is None


@pytest.mark.parametrize(
    "model",
    [models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"), models.Unigram([("?", 0.0), ("a", -1.0)], unk_id=0)],
)
def test_a_tokenizer_that_llguidance_cannot_read_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: models.Model
) -> None:
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tried: list[int] = []
    made = rollout_server.grammar.LLTokenizer
    monkeypatch.setattr(
        rollout_server.grammar, "LLTokenizer", lambda *given, **named: (tried.append(1), made(*given, **named))[1]
    )
    grammars = Grammars(tmp_path, 3)
    for text in ("a", "b"):
        with pytest.raises(GrammarError, match="tokenizer is of a kind that grammars cannot use"):
            grammars.matcher(f'start: "{text}"')
    assert len(tried) == 1


def test_grammars_are_kept_and_old_ones_are_forgotten(tiny_llama: Path) -> None:
    grammars = Grammars(tiny_llama, VOCABULARY)
    for number in range(KEPT + 20):
        assert grammars.check(f'start: "{number}"') is None
    assert len(grammars._known) == KEPT
    assert grammars.kept('start: "0"') is None
    assert grammars.kept(f'start: "{KEPT}"') is not None
    grammars.check("start: /(/")
    with pytest.raises(GrammarError):
        grammars.kept("start: /(/")


def test_threads_share_grammars(tiny_llama: Path, tokenizer: Tokenizer) -> None:
    grammars = Grammars(tiny_llama, VOCABULARY)
    texts: list[str] = []

    def work(seed: int) -> None:
        for number in range(5):
            ids = draw(grammars.matcher(of_regex(f"[a-c]{{{number + 1}}}")), random.Random(seed), (STOP,))
            texts.append(tokenizer.decode(ids))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(len, texts)) == sorted([1, 2, 3, 4, 5] * 8)


def test_a_model_without_a_tokenizer_has_no_grammars(tmp_path: Path) -> None:
    assert "tokenizer.json cannot be read" in (Grammars(tmp_path, 100).check('start: "a"') or "")
