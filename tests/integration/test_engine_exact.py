"""The engine against transformers: same ids, same log-probs, whatever the path through scheduler and cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from rollout_server.kernels import reference
from rollout_server.messages import SamplingParams
from rollout_server.models.checksum import checksum
from tests.harness import LocalEngine

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def prompts(count: int, *, shared: int = 40, vocab: int = 1000, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, vocab, (n,), generator=generator).tolist()  # noqa: E731
    common = draw(shared)
    return [common + draw(5 + 7 * (i % 9)) for i in range(count)]


def oracle_greedy(model_dir: Path, ids: list[int], new: int) -> tuple[list[int], list[float]]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        full = model.generate(
            torch.tensor([ids]), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
            suppress_tokens=None,
        )[0].tolist()  # fmt: skip
        logits = model(torch.tensor([full[:-1]])).logits[0, len(ids) - 1 :]
    new_ids = full[len(ids) :]
    return new_ids, torch.log_softmax(logits, -1).gather(1, torch.tensor(new_ids)[:, None])[:, 0].tolist()


def random_checkpoint(config: object, path: Path) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    return path


SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=False),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_greedy_ids_and_logprobs_equal_transformers(family: str, kernels: str, tmp_path: Path) -> None:
    model_dir = random_checkpoint(FAMILIES[family], tmp_path / family)
    engine = LocalEngine(model_dir, kv_tokens=4096, max_step_tokens=64)
    if kernels == "reference":
        engine.runner.decoder.kernels = reference
    else:
        assert engine.runner.decoder.kernels.name == "native", "the C kernel was not built"
    cases = prompts(6)
    for i, ids in enumerate(cases):
        engine.submit(str(i), ids, GREEDY)
    outputs = engine.run()
    for i, ids in enumerate(cases):
        want_ids, want_logprobs = oracle_greedy(model_dir, ids, GREEDY.max_tokens)
        assert outputs[str(i)].ids == want_ids
        assert outputs[str(i)].logprobs == pytest.approx(want_logprobs, abs=1e-4)


def test_smollm2_greedy_equals_transformers(smollm2: Path) -> None:
    engine = LocalEngine(smollm2, kv_tokens=2048)
    ids = prompts(1, shared=24, vocab=40000)[0]
    engine.submit("a", ids, SamplingParams(temperature=0.0, max_tokens=12))
    want_ids, want_logprobs = oracle_greedy(smollm2, ids, 12)
    output = engine.run()["a"]
    assert output.ids == want_ids
    assert output.logprobs == pytest.approx(want_logprobs, abs=1e-4)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(FAMILIES["llama"], tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def plain(model_dir: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Sampled one at a time, without sharing: what every other path must reproduce."""
    found = {}
    for i, ids in enumerate(prompts(12)):
        engine = LocalEngine(model_dir, kv_tokens=1024)
        engine.submit(str(i), ids, SamplingParams(max_tokens=20, seed=i))
        output = engine.run()[str(i)]
        found[str(i)] = output.ids, output.logprobs
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_tokens": 8192, "max_step_tokens": 512},
        {"kv_tokens": 8192, "max_step_tokens": 16},
        {"kv_tokens": 272, "max_step_tokens": 64},
        {"kv_tokens": 8192, "max_batch": 3},
    ],
    ids=["batched", "chunked prefill", "preemption", "small batch"],
)
def test_sampling_does_not_depend_on_the_path(
    model_dir: Path, plain: dict[str, tuple[list[int], list[float]]], settings: dict[str, int]
) -> None:
    engine = LocalEngine(model_dir, **settings)
    for _ in range(2):  # the second time every prompt is in the prefix tree
        for i, ids in enumerate(prompts(12)):
            engine.submit(str(i), ids, SamplingParams(max_tokens=20, seed=i))
        outputs = engine.run()
        for key, (ids, logprobs) in plain.items():
            assert outputs[key].ids == ids
            assert outputs[key].logprobs == pytest.approx(logprobs, abs=1e-4)
    if settings.get("kv_tokens") == 272:
        assert engine.scheduler.counters.preemptions > 0


def test_batch_invariant_mode_is_exact_bit_for_bit(model_dir: Path) -> None:
    def run(together: bool, step_tokens: int) -> list[tuple[list[int], list[float]]]:
        engine = LocalEngine(model_dir, kv_tokens=8192, max_step_tokens=step_tokens, batch_invariant=True)
        for i, ids in enumerate(prompts(10)):
            engine.submit(str(i), ids, SamplingParams(max_tokens=16, seed=i, temperature=0.9))
            if not together:
                engine.run()
        outputs = engine.run()
        return [(outputs[str(i)].ids, outputs[str(i)].logprobs) for i in range(10)]

    alone = run(together=False, step_tokens=512)
    assert run(together=True, step_tokens=512) == alone
    assert run(together=True, step_tokens=23) == alone


def test_scores_equal_sampling_logprobs(model_dir: Path) -> None:
    engine = LocalEngine(model_dir, kv_tokens=4096, max_step_tokens=32)
    ids = prompts(1)[0]
    engine.submit("a", ids, SamplingParams(max_tokens=20, seed=3))
    output = engine.run()["a"]
    engine.submit("s", ids + output.ids, None)
    scores = engine.run()["s"].scores
    assert scores is not None
    assert len(scores) == len(ids) + 19
    assert scores[len(ids) - 1 :] == pytest.approx(output.logprobs, abs=1e-4)


def test_prefill_computes_each_shared_page_once(model_dir: Path) -> None:
    engine = LocalEngine(model_dir, kv_tokens=8192)
    ids = prompts(1, shared=160)[0]
    for i in range(8):  # a group that arrives at once
        engine.submit(str(i), ids, SamplingParams(max_tokens=4, seed=i))
    engine.run()
    pages = (len(ids) - 1) // 16
    assert engine.scheduler.counters.prefill_tokens == len(ids) + 7 * (len(ids) - 16 * pages)


def test_new_weights_never_meet_old_pages(model_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    other = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    other.save_pretrained(tmp_path / "v1")
    ids = prompts(1)[0]
    engine = LocalEngine(model_dir, kv_tokens=4096)
    engine.submit("before", ids, SamplingParams(temperature=0.0, max_tokens=40))
    for _ in range(10):
        engine.step()
    engine.runner.load(tmp_path / "v1")
    engine.scheduler.set_version(1)
    engine.scheduler.check_integrity()
    engine.submit("after", ids, SamplingParams(temperature=0.0, max_tokens=24))
    outputs = engine.run()
    kept = outputs["before"].versions.count(0)
    assert 0 < kept < 40
    # The tail is what the new weights say after the tokens that the old ones sampled.
    want, logprobs = oracle_greedy(tmp_path / "v1", ids + outputs["before"].ids[:kept], 40 - kept)
    assert outputs["before"].ids[kept:] == want
    assert outputs["before"].logprobs[kept:] == pytest.approx(logprobs, abs=1e-4)
    assert outputs["after"].ids == oracle_greedy(tmp_path / "v1", ids, 24)[0]
    assert checksum(engine.runner.decoder.export()) == checksum(other.state_dict())
