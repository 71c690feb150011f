"""Secrets taken out of texts, JSON, spans and token ids, in bounded time."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lightning_rl import redact
from lightning_rl.episode import Reward, Span
from lightning_rl.errors import RecipeError
from lightning_rl.redact import REDACTED, Redactor, environment_keys, store_passwords
from rollout_server.api.redaction import Redaction
from rollout_server.models.catalog import resolve_model
from tests.unit.domain import make_call

PATTERN = r"sk-[a-z0-9]{6,}"
KEY = 'hunter2"key'
words = st.sampled_from(["a", "b ", "sk-", "abc123", "é", "🙂", "\n", KEY, json.dumps(KEY), "[redacted]"])
texts = st.lists(words, max_size=8).map("".join)
values = st.recursive(
    texts | st.integers() | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
    max_leaves=8,
)


def leaves(value):
    match value:
        case dict():
            return [leaf for item in value.values() for leaf in leaves(item)]
        case list():
            return [leaf for item in value for leaf in leaves(item)]
        case _:
            return [value]


@given(values)
def test_nothing_that_fits_is_left_in_any_value_and_nothing_else_is_touched(value):
    redactor = Redactor([PATTERN], [KEY])
    kept = redactor.value(value)
    for before, after in zip(leaves(value), leaves(kept), strict=True):
        found = isinstance(before, str) and redactor.found(before)
        assert not redactor.found(str(after))
        assert KEY not in str(after)
        assert json.dumps(KEY)[1:-1] not in str(after)
        assert (after == before) is not bool(found)
    assert (kept is value) is (kept == value)


def test_matches_that_touch_are_one_and_the_rest_stays():
    redactor = Redactor([r"\d+", r"[a-f\d]+x", "redacted"])
    assert redactor.text("call 12abcx now, 7") == f"call {REDACTED} now, {REDACTED}"
    assert redactor.value({"redacted": "12", "n": 12}) == {"redacted": REDACTED, "n": 12}


def test_spans_and_rewards_are_redacted_everywhere():
    redactor = Redactor([PATTERN])
    span = Span(id="s", episode_id="e", name="t", kind="tool", attributes={"a": ["sk-abcdef"]}, error="x sk-abcdef")
    (told,) = redactor.spans([span])
    assert (told.name, told.attributes, told.error) == ("t", {"a": [REDACTED]}, f"x {REDACTED}")
    (reward,) = redactor.rewards([Reward(episode_id="e", name="sk-abcdef", value=1.0)])
    assert reward.name == REDACTED


@pytest.mark.parametrize(("pattern", "told"), [("(", "is no regular expression"), ("a*", "fits the empty text")])
def test_a_pattern_that_cannot_be_used_is_named(pattern, told):
    with pytest.raises(RecipeError, match=re.escape(f"{pattern!r} {told}")):
        Redactor([pattern])


def test_only_what_is_long_enough_counts_as_a_key():
    assert Redactor([], ["lrl", None, ""]).text("lrl") == "lrl"
    found = environment_keys({"OPENAI_API_KEY": "sk-" + "a" * 20, "HF_TOKEN": "short", "PATH": "/" * 30})
    assert found == ["sk-" + "a" * 20]


@pytest.mark.parametrize(
    "name",
    [
        "API_KEY",
        "TOKEN",
        "PGPASSWORD",
        "GITHUB_PAT",
        "AZURE_OPENAI_KEY",
        "OPENAI_API_KEY_2",
        "DB_PASSWD",
        "openai-keys",
    ],
)
def test_a_variable_is_a_keys_by_a_word_in_its_name(name):
    assert environment_keys({name: "x" * 16}) == ["x" * 16]


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "PATTERN", "KEYBOARD", "SSL_KEY_FILE", "TOKEN_URL", "HOME"])
def test_other_variables_are_no_keys(name):
    assert environment_keys({name: "x" * 16}) == []


def test_passwords_in_urls_and_headers_are_keys():
    environment = {
        "DATABASE_URL": "postgresql+psycopg://me:pass%2Fw0rd@host/db?a=b",
        "HTTPS_PROXY": "see http://proxy:3128 and http://u:postgres@h",
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20abcdef-0123456789,content-type=application/json,a=b",
    }
    found = {"Bearer%20abcdef-0123456789", "Bearer abcdef-0123456789", "abcdef-0123456789", "pass%2Fw0rd", "pass/w0rd"}
    assert set(environment_keys(environment)) == found
    assert store_passwords("postgresql://me:${PASS}@host/db", {"PASS": "pass/w0rd"}) == ["pass%2Fw0rd", "pass/w0rd"]
    assert store_passwords("${WHOLE}?run=x", {"WHOLE": "postgresql://me:passw0rd@host/db"}) == ["passw0rd"] * 2
    assert store_passwords(None, {}) == store_passwords("runs/episodes.db", {}) == []


def test_a_key_in_two_parts_of_a_message_is_taken_out_of_both():
    parts = [{"type": "text", "text": "my hunt"}, {"type": "text", "text": 'er2"key!'}]
    image = {"type": "image_url", "image_url": {"url": "x"}}
    told = Redactor([], [KEY]).value({"content": [image, *parts]})["content"]
    assert told == [image, {**parts[0], "text": f"my {REDACTED}"}, {**parts[1], "text": f"{REDACTED}!"}]
    apart = [parts[0], image, parts[1]]
    assert Redactor([], [KEY]).value(apart) is apart


def test_a_text_that_cannot_be_searched_in_time_is_withheld_whole(monkeypatch):
    redactor = Redactor([r"(a|a)*b$"])
    with monkeypatch.context() as patch:
        patch.setattr(redact, "SECONDS", 0.2)
        began = time.monotonic()
        assert redactor.value({"hostile": "a" * 60 + "cb!", "next": "harmless"})["hostile"] == REDACTED
    assert time.monotonic() - began < 60
    assert redactor.text("harmless") == "harmless"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(resolve_model("tiny-llama") / "tokenizer.json"))


@given(prompt=texts, said=texts)
def test_ids_of_a_redacted_call_do_not_spell_the_secret(tokenizer, prompt, said):
    redaction = Redaction(Redactor([PATTERN], [KEY]), tokenizer, 2)
    prompt_ids, sampled_ids = (tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, said))
    call = make_call(prompt_ids, sampled_ids, request={"prompt": prompt_ids}, response={"content": said})
    kept = redaction.call(call)
    assert (len(kept.prompt_ids), len(kept.sampled_ids)) == (len(prompt_ids), len(sampled_ids))
    spelled = [tokenizer.decode(kept.prompt_ids + kept.sampled_ids, skip_special_tokens=hide) for hide in (True, False)]
    assert not any(Redactor([PATTERN], [KEY]).found(text) for text in spelled)
    assert not Redactor([PATTERN], [KEY]).found(tokenizer.decode(kept.request["prompt"]))
    assert kept.redacted is (kept is not call)
    if not Redactor([PATTERN], [KEY]).found(tokenizer.decode(prompt_ids + sampled_ids, skip_special_tokens=False)):
        assert kept is call


def test_only_the_ids_of_the_secret_are_replaced(tokenizer):
    before, secret, after = (tokenizer.encode(t, add_special_tokens=False).ids for t in ("Hello ", "sk-abc123", " end"))
    kept = Redaction(Redactor([PATTERN]), tokenizer, 2).ids([*before, *secret, *after])
    assert kept[: len(before)] == before
    assert kept[len(before) : -len(after)] == [2] * len(secret)
    assert kept[-len(after) :] == after


def test_a_key_of_an_earlier_turn_is_not_in_the_ids_although_the_request_is_clean(tokenizer):
    """As with the Responses API's `previous_response_id`; no pattern is set."""
    prompt = tokenizer.encode(f"my key is {KEY}. go on", add_special_tokens=False).ids
    recorded = {"entropies": [1.5], "alternatives": [[(5, -0.5), (6, -1.0)]]}
    request = {"input": "go on", "previous_response_id": "r"}
    call = make_call(prompt, [5], request=request, response={"content": "x"}, **recorded)
    kept = Redaction(Redactor([], [KEY]), tokenizer, 2).call(call)
    assert (kept.redacted, kept.entropies, kept.alternatives) == (True, [], [])
    assert KEY not in tokenizer.decode(kept.prompt_ids)
    assert Redaction(Redactor([], ["another-key"]), tokenizer, 2).call(call) is call
