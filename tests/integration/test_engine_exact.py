"""The engine against transformers: same ids, same log-probs, whatever the path through scheduler, cache and kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from rollout_server import messages as m
from rollout_server.kernels import reference
from rollout_server.messages import SamplingParams
from rollout_server.models.checksum import checksum
from rollout_server.worker import process
from tests.harness import LocalEngine

GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


def prompts(count: int, *, shared: int = 70, vocab: int = 1000, seed: int = 0) -> list[list[int]]:
    """Prompts of mixed length that begin alike."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, vocab, (n,), generator=generator).tolist()  # noqa: E731
    common = draw(shared)
    return [common + draw(1 + 7 * (i % 9)) for i in range(count)]


def assert_greedy(model: torch.nn.Module, prompt: list[int], ids: list[int], logprobs: list[float]) -> None:
    """Each id is the likeliest after those before it, and has that log-prob: what greedy generation means."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids[:-1]])).logits[0, len(prompt) - 1 :]
    assert logits.argmax(-1).tolist() == ids
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def random_checkpoint(config: PreTrainedConfig, path: Path) -> Path:
    """Weights wide enough that the likeliest id stands out."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
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
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **SHAPE, head_dim=32, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True
    ),
}


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_and_logprobs_equal_transformers(
    family: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "reference":
        monkeypatch.setattr(process.native, "load", lambda: None)
    model_dir = random_checkpoint(FAMILIES[family], tmp_path / family)
    engine = LocalEngine(model_dir, kv_tokens=16384, max_step_tokens=200)
    assert engine.runner.decoder.kernels.name == kernels, "the C kernels were not built"
    cases = prompts(64)
    for i, ids in enumerate(cases):
        engine.submit(str(i), ids, GREEDY)
    outputs = engine.run()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for i, ids in enumerate(cases):
        assert_greedy(model, ids, outputs[str(i)].ids, outputs[str(i)].logprobs)


def test_smollm2_greedy_equals_transformers(smollm2: Path) -> None:
    engine = LocalEngine(smollm2, kv_tokens=2048)
    ids = prompts(1, shared=24, vocab=40000)[0]
    engine.submit("a", ids, SamplingParams(temperature=0.0, max_tokens=12))
    output = engine.run()["a"]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert_greedy(model, ids, output.ids, output.logprobs)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(FAMILIES["llama"], tmp_path_factory.mktemp("llama"))


Sampled = dict[str, tuple[list[int], list[float], list[float]]]


@pytest.fixture(scope="module")
def plain(model_dir: Path) -> Sampled:
    """Sampled one at a time, without sharing, chunks or look-ahead: what every other path must reproduce."""
    found = {}
    for i, ids in enumerate(prompts(24)):
        engine = LocalEngine(model_dir, kv_tokens=1024, lookahead=0, shared_prefix=False)
        engine.submit(str(i), ids, SamplingParams(max_tokens=20, seed=i))
        output = engine.run()[str(i)]
        found[str(i)] = output.ids, output.logprobs, output.entropies
    return found


PATHS: dict[str, dict[str, int | bool]] = {
    "batched": {},
    "chunked prefill": {"max_step_tokens": 23},
    "no look-ahead": {"lookahead": 0},
    "far look-ahead": {"lookahead": 4},
    "shared prefix attention": {"shared_prefix": True},
    "batches of 3": {"max_batch": 3},
    "one by one": {"max_batch": 1},
    "preemption": {"kv_tokens": 400, "max_step_tokens": 128},
    "offload": {"kv_tokens": 400, "max_step_tokens": 128, "host_kv_tokens": 4096},
}


@pytest.mark.parametrize("path", PATHS)
def test_sampling_does_not_depend_on_the_path(model_dir: Path, plain: Sampled, path: str) -> None:
    engine = LocalEngine(
        model_dir, **{"kv_tokens": 8192, "max_step_tokens": 512, "batch_invariant": True} | PATHS[path]
    )
    for _ in range(2):  # the second time prompts are in the prefix tree
        for i, ids in enumerate(prompts(24)):
            engine.submit(str(i), ids, SamplingParams(max_tokens=20, seed=i))
        outputs = engine.run()
        for key, (ids, logprobs, entropies) in plain.items():
            assert outputs[key].ids == ids
            assert outputs[key].logprobs == logprobs, "batch-invariant mode is exact bit for bit"
            assert outputs[key].entropies == entropies
    counters = engine.scheduler.counters
    if path == "offload":
        assert counters.offloaded_pages > 0
        assert counters.restored_pages > 0
    if path == "batched":
        assert counters.cached_tokens > counters.prefill_tokens


def test_recorded_passes_follow_adapters_that_change(model_dir: Path, tmp_path: Path) -> None:
    """Loaded, replaced and unloaded between passes that are replayed: what counts is what is live."""
    engine = LocalEngine(model_dir, kv_tokens=4096)
    ids = prompts(1)[0]
    directories = [adapter_directory(tmp_path / str(seed), model_dir, seed, 4) for seed in range(2)]
    answers = []
    for version, directory in enumerate([None, *directories, directories[0]]):
        if directory is not None:
            engine.load(directory, version)
        engine.submit(str(version), ids, SamplingParams(temperature=0.0, max_tokens=12))
        answers.append(engine.run()[str(version)])
    for directory, answer in zip([None, *directories, directories[0]], answers, strict=True):
        merged_dir = merged(model_dir, directory, tmp_path / f"{directory.name}-merged") if directory else model_dir
        model = AutoModelForCausalLM.from_pretrained(merged_dir, dtype=torch.float32)
        assert_greedy(model, ids, answer.ids, answer.logprobs)


def test_weights_that_are_not_numbers_are_refused(model_dir: Path, tmp_path: Path) -> None:
    engine = LocalEngine(model_dir, kv_tokens=4096)
    before = checksum(engine.runner.decoder.export())
    broken = adapter_directory(tmp_path / "broken", model_dir, 0, 4)
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match="not finite"):
        engine.load(broken, 1)
    assert checksum(engine.runner.decoder.export()) == before


def test_paths_agree_without_batch_invariant_arithmetic(
    model_dir: Path, plain: Sampled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process.native, "load", lambda: None)
    engine = LocalEngine(model_dir, kv_tokens=8192)
    assert engine.runner.decoder.kernels.name == reference.name
    for i, ids in enumerate(prompts(24)):
        engine.submit(str(i), ids, SamplingParams(max_tokens=20, seed=i))
    outputs = engine.run()
    for key, (ids, logprobs, entropies) in plain.items():
        assert outputs[key].ids == ids
        assert outputs[key].logprobs == pytest.approx(logprobs, abs=1e-4)
        assert outputs[key].entropies == pytest.approx(entropies, abs=1e-4)


def test_choices_of_a_request_share_one_prefill_and_differ_by_index(model_dir: Path) -> None:
    ids = prompts(1, shared=160)[0]
    together = LocalEngine(model_dir, kv_tokens=8192)
    together.submit("g", ids, SamplingParams(max_tokens=12, seed=5), n=16)
    group = together.run()
    assert together.scheduler.counters.prefill_tokens == len(ids)
    assert together.scheduler.counters.recomputed_tokens == 0
    few_slots = LocalEngine(model_dir, kv_tokens=8192, max_batch=3)
    few_slots.submit("g", ids, SamplingParams(max_tokens=12, seed=5), n=16)
    again = few_slots.run()
    assert {key: (o.ids, o.logprobs) for key, o in group.items()} == {
        key: (o.ids, o.logprobs) for key, o in again.items()
    }
    assert len({tuple(output.ids) for output in group.values()}) > 8


def test_growing_conversations_compute_each_prompt_token_once(model_dir: Path) -> None:
    engine = LocalEngine(model_dir, kv_tokens=16384)
    histories = {str(i): ids for i, ids in enumerate(prompts(6, shared=37))}
    computed_by_decoding = 0
    generator = torch.Generator().manual_seed(3)
    seen: set[tuple[int, ...]] = set()
    for turn in range(4):
        for key, history in histories.items():
            engine.submit(f"{key}.{turn}", history, SamplingParams(max_tokens=9, seed=turn))
        outputs = engine.run()
        for key, history in histories.items():
            ids = outputs[f"{key}.{turn}"].ids
            seen |= {tuple(history[: end + 1]) for end in range(len(history))}
            known = len(history) + len(ids) - 1  # the last sampled token's keys are not computed until the next turn
            decoded = {tuple((history + ids)[: end + 1]) for end in range(len(history), known)}
            computed_by_decoding += len(decoded - seen)
            seen |= decoded
            histories[key] = history + ids + torch.randint(3, 1000, (11,), generator=generator).tolist()
    assert engine.scheduler.counters.prefill_tokens == len(seen) - computed_by_decoding


def adapter_directory(path: Path, model_dir: Path, seed: int, rank: int) -> Path:
    config = json.loads((model_dir / "config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (out, inputs) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.1
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.1
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(m.split(".")[1] for m in shapes),
    }
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def merged(model_dir: Path, adapter: Path, out: Path) -> Path:
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return out


def test_adapters_mixed_in_a_batch_equal_merged_weights(model_dir: Path, tmp_path: Path) -> None:
    engine = LocalEngine(model_dir, kv_tokens=16384, max_step_tokens=150)
    names = ["", "a", "b", "c"]
    for seed, (name, rank) in enumerate([("a", 4), ("b", 16), ("c", 3)]):
        engine.load(adapter_directory(tmp_path / name, model_dir, seed, rank), seed + 1, adapter=name)
    cases = prompts(12)
    for i, ids in enumerate(cases):
        engine.submit(str(i), ids, SamplingParams(temperature=0.0, max_tokens=16), adapter=names[i % 4])
    outputs = engine.run()
    for which, name in enumerate(names):
        directory = merged(model_dir, tmp_path / name, tmp_path / f"{name}-merged") if name else model_dir
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        for i in range(which, 12, 4):
            output = outputs[str(i)]
            assert_greedy(model, cases[i], output.ids, output.logprobs)
            with torch.no_grad():
                logits = model(torch.tensor([cases[i] + output.ids[:-1]])).logits[0, len(cases[i]) - 1 :]
            exact = torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(output.ids)[:, None])[:, 0]
            assert output.logprobs == pytest.approx(exact.tolist(), abs=1e-5)
            assert set(output.versions) == {which}


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


@pytest.fixture(scope="module")
def other_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    other = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    path = tmp_path_factory.mktemp("other")
    other.save_pretrained(path)
    return path


@pytest.mark.parametrize("running", ["reprefill", "keep", "abort"])
def test_new_weights_never_meet_old_pages_unless_told_to_keep_them(
    model_dir: Path, other_dir: Path, running: m.Running
) -> None:
    ids = prompts(1)[0]
    engine = LocalEngine(model_dir, kv_tokens=4096)
    engine.submit("before", ids, SamplingParams(temperature=0.0, max_tokens=40))
    for _ in range(10):
        engine.step()
    updated = engine.load(other_dir, 1, running=running)
    engine.scheduler.check_integrity()
    engine.submit("after", ids, SamplingParams(temperature=0.0, max_tokens=24))
    outputs = engine.run()
    after, before = outputs["after"], outputs["before"]
    new = AutoModelForCausalLM.from_pretrained(other_dir, dtype=torch.float32)
    assert_greedy(new, ids, after.ids, after.logprobs)
    assert updated.checksum == checksum(new.state_dict())
    old_tokens = before.versions.count(0)
    assert before.versions == sorted(before.versions)
    if running == "abort":
        assert before.failed == "aborted"
        return
    assert 0 < old_tokens < 40 == len(before.ids)
    if running == "reprefill":
        # The tail is what the new weights say after the tokens that the old ones sampled.
        assert_greedy(new, ids + before.ids[:old_tokens], before.ids[old_tokens:], before.logprobs[old_tokens:])
    else:
        with pytest.raises(AssertionError):
            assert_greedy(new, ids + before.ids[:old_tokens], before.ids[old_tokens:], before.logprobs[old_tokens:])


def test_sleep_frees_the_memory_and_waking_changes_nothing(model_dir: Path, plain: Sampled) -> None:
    engine = LocalEngine(model_dir, kv_tokens=8192)
    before = checksum(engine.runner.decoder.export())
    for i, ids in enumerate(prompts(24)):
        engine.submit(str(i), ids, SamplingParams(max_tokens=20, seed=i))
    for _ in range(6):
        engine.step()
    engine.ask(m.Sleep(request_id="sleep", level=2))
    assert not engine.step()
    engine.ask(m.Wake(request_id="wake"))
    outputs = engine.run()
    for key, (ids, logprobs, entropies) in plain.items():
        assert (outputs[key].ids, outputs[key].logprobs, outputs[key].entropies) == (ids, logprobs, entropies)
    assert checksum(engine.runner.decoder.export()) == before
