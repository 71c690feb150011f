"""Grammars through the engine: scheduler, worker and llguidance together, on a random model that would never fit one itself."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from rollout_server.messages import SamplingParams
from tests.harness import LocalEngine

END = 2
SCHEMA = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "colour": {"enum": ["red", "green"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["ok", "colour", "size"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
GRAMMAR = json.dumps({"grammars": [{"json_schema": SCHEMA}]})
PROMPT = list(range(300, 340))


def engine_of(model_dir: Path, **settings: object) -> LocalEngine:
    return LocalEngine(model_dir, **{"kv_tokens": 4096, "max_batch": 16, "max_step_tokens": 64, **settings})


@pytest.mark.parametrize("stop_ids", [(), (END,)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("lookahead", [0, 1])
def test_every_choice_fits_its_schema(
    tiny_llama: Path, stop_ids: tuple[int, ...], temperature: float, lookahead: int
) -> None:
    """Beside free sequences with the same prompt; with stop ids, the end is drawn like any id."""
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    engine = engine_of(tiny_llama, lookahead=lookahead)
    sampling = SamplingParams(temperature=temperature, max_tokens=60, stop_ids=stop_ids, seed=7)
    engine.submit("masked", PROMPT, sampling, n=4, grammar=GRAMMAR)
    engine.submit("free", PROMPT, sampling, n=2)
    engine.submit("words", PROMPT, sampling, grammar='start: ("yes" | "no") " thanks"?')
    outputs = engine.run()
    for key in ("masked", "masked/1", "masked/2", "masked/3"):
        output = outputs[key]
        assert output.finish_reason == "stop"
        assert (output.ids[-1] == END) == bool(stop_ids)
        jsonschema.validate(json.loads(tokenizer.decode(output.ids)), SCHEMA)
    assert tokenizer.decode(outputs["words"].ids) in ("yes", "no", "yes thanks", "no thanks")
    assert outputs["free"].finish_reason == "length"


def test_logprobs_are_those_of_the_masked_distribution(tiny_llama: Path) -> None:
    engine = engine_of(tiny_llama)
    engine.submit("a", PROMPT, SamplingParams(max_tokens=60, stop_ids=(END,), seed=3), grammar=GRAMMAR)
    output = engine.run()["a"]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + output.ids[:-1]])).logits[0, len(PROMPT) - 1 :]
    matcher = engine.grammars.matcher(GRAMMAR)
    for at, (token, logprob, entropy) in enumerate(zip(output.ids, output.logprobs, output.entropies, strict=True)):
        bits = torch.tensor(list(matcher.allowed((END,))), dtype=torch.int32)
        allowed = (bits[:, None] >> torch.arange(8)).bitwise_and(1).flatten()[: logits.shape[1]].bool()
        expected = torch.log_softmax(logits[at].masked_fill(~allowed, -torch.inf), -1)
        assert logprob == pytest.approx(float(expected[token]), abs=1e-4)
        assert entropy == pytest.approx(float(torch.special.entr(expected.exp()).sum()), abs=1e-4)
        if token != END:
            matcher.take(token)


def test_a_reply_that_would_stop_at_once_goes_on_for_min_tokens(tiny_llama: Path) -> None:
    """The likeliest id and half of the others are stop ids. Log-probs are of what may be drawn; look-ahead changes nothing."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)

    def logits_after(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(torch.tensor([ids])).logits[0, -1]
        return logits

    def run(lookahead: int) -> LocalEngine:
        engine = engine_of(tiny_llama, lookahead=lookahead, batch_invariant=True)
        for least in (0, 1, 5, 12):
            greedy = SamplingParams(temperature=0.0, max_tokens=12, stop_ids=stops, min_tokens=least)
            engine.submit(f"greedy {least}", PROMPT, greedy)
            drawn = SamplingParams(max_tokens=12, stop_ids=stops, min_tokens=least, seed=least, top_logprobs=3)
            engine.submit(f"drawn {least}", PROMPT, drawn, n=3)
        engine.run()
        return engine

    likeliest = int(logits_after(PROMPT).argmax())
    stops = (likeliest, *range(1 - likeliest % 2, model.config.vocab_size, 2))
    engine = run(0)
    assert engine.outputs["greedy 0"].ids == [likeliest]
    assert engine.outputs["greedy 12"].finish_reason == "length"
    assert "stop" in {output.finish_reason for key, output in engine.outputs.items() if " 5" in key}
    for key, output in engine.outputs.items():
        least = int(key.split()[1].split("/")[0])
        assert len(output.ids) >= min(least + 1, 12)
        assert not set(output.ids[:least]) & set(stops)
        for at, (token, logprob) in enumerate(zip(output.ids, output.logprobs, strict=True)):
            logits = logits_after(PROMPT + output.ids[:at])
            if at < least:
                logits[list(stops)] = -torch.inf
            assert logprob == pytest.approx(float(torch.log_softmax(logits, -1)[token]), abs=1e-4)
            assert token == int(logits.argmax()) or not key.startswith("greedy")
    for lookahead in (1, 4):
        assert run(lookahead).outputs == engine.outputs


def test_late_masks_change_no_draw(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> LocalEngine:
        engine = engine_of(tiny_llama, lookahead=1, batch_invariant=True)
        for i in range(6):
            stop_ids = (END,) * (i % 2)
            sampling = SamplingParams(max_tokens=20 + 20 * (i % 3), stop_ids=stop_ids, seed=i)
            engine.submit(f"masked {i}", PROMPT[i:], sampling, grammar=GRAMMAR)
        engine.submit("free", PROMPT, SamplingParams(max_tokens=30))
        engine.run()
        assert engine.scheduler.idle
        return engine

    in_time = run()
    monkeypatch.setattr("rollout_server.manager.scheduler.MASKS_S", 0.0)
    late = run()
    assert late.scheduler.counters.steps > 1.5 * in_time.scheduler.counters.steps
    assert late.outputs == in_time.outputs


def test_preemption_and_penalties_keep_the_grammar(tiny_llama: Path) -> None:
    """Too little memory for all; the same ids as with plenty."""
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    text = json.dumps({"grammars": [{"lark_grammar": "start: /[a-c]{150}/"}]})

    def run(kv_tokens: int) -> LocalEngine:
        engine = engine_of(tiny_llama, kv_tokens=kv_tokens, batch_invariant=True)
        for i in range(40):  # short ones first: what follows is expected to be short as well
            engine.submit(f"short {i}", [i + 5], SamplingParams(max_tokens=150), grammar='start: "yes"')
        engine.run()
        for i in range(6):
            sampling = SamplingParams(max_tokens=150, seed=i, frequency_penalty=0.1 * (i % 2))
            engine.submit(f"long {i}", [i + 5], sampling, grammar=text)
        engine.run()
        return engine

    little, plenty = run(256), run(8192)
    assert little.scheduler.counters.preemptions > 0
    for i in range(6):
        assert little.outputs[f"long {i}"].ids == plenty.outputs[f"long {i}"].ids
        assert len(tokenizer.decode(little.outputs[f"long {i}"].ids)) == 150


def test_a_grammar_that_needs_too_much_work_fails_its_request_alone(tiny_llama: Path) -> None:
    """Its states double with each character; the limit comes before the end."""
    engine = engine_of(tiny_llama)
    sampling = SamplingParams(max_tokens=600, seed=1)
    engine.submit("bad", PROMPT, sampling, n=2, grammar="start: /(.*a.{40}){9}/")
    engine.submit("good", PROMPT, SamplingParams(max_tokens=20))
    outputs = engine.run()
    assert outputs["bad"].failed == outputs["bad/1"].failed == "grammar_failed"
    assert len(outputs["good"].ids) == 20
    assert engine.scheduler.idle
    assert engine.scheduler.memory.available == engine.scheduler.memory.pool.total
