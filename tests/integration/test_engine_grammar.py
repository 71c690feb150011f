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
    for at, (token, logprob) in enumerate(zip(output.ids, output.logprobs, strict=True)):
        bits = torch.tensor(list(matcher.allowed((END,))), dtype=torch.int32)
        allowed = (bits[:, None] >> torch.arange(8)).bitwise_and(1).flatten()[: logits.shape[1]].bool()
        expected = torch.log_softmax(logits[at].masked_fill(~allowed, -torch.inf), -1)[token]
        assert logprob == pytest.approx(float(expected), abs=1e-4)
        if token != END:
            matcher.take(token)


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
