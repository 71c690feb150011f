"""What `lrl export` writes, read by plain transformers and PEFT."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rl.errors import LightningError
from tests.integration.learning import LORA, random_ids, with_active_adapter
from trainers.export import export
from trainers.policy import load_policy, score_sequence
from trainers.publish import write_policy

IDS = random_ids(60, torch.Generator().manual_seed(4))


def published(tiny_llama, tmp_path, lora):
    policy = with_active_adapter(load_policy(tiny_llama, "float32", lora, seed=0))
    if lora is None:
        with torch.no_grad():
            policy.causal_lm.model.norm.weight.mul_(1.1)
    write_policy(policy, tmp_path / "published", tiny_llama)
    return policy, tmp_path / "published"


def assert_scores_like(policy, plain):
    with torch.no_grad():
        logprobs = plain(input_ids=torch.tensor([IDS])).logits[0, :-1].float().log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(score_sequence(policy, IDS)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_plain_transformers_loads_a_whole_checkpoint(tiny_llama, tmp_path, lora):
    policy, source = published(tiny_llama, tmp_path, lora)
    out = export(source, tiny_llama, tmp_path / "out", merged=True)
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert_scores_like(policy, plain)
    untrained = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert plain.dtype == untrained.dtype
    with pytest.raises(AssertionError):
        assert_scores_like(policy, untrained)
    text = [{"role": "user", "content": "What is 17 * 23?"}]
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(tiny_llama)
    assert ours.apply_chat_template(text, tokenize=False) == theirs.apply_chat_template(text, tokenize=False)


def test_peft_loads_an_adapter(tiny_llama, tmp_path):
    policy, source = published(tiny_llama, tmp_path, LORA)
    out = export(source, tiny_llama, tmp_path / "out", merged=False)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assert_scores_like(policy, PeftModel.from_pretrained(base, out))


def test_merging_into_bfloat16_rounds_once(tiny_llama, tmp_path):
    """The merged weights are the nearest bf16 numbers to W + B A · alpha/rank."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(base)
    policy = with_active_adapter(load_policy(base, "bfloat16", LORA, seed=0))
    write_policy(policy, tmp_path / "published", base)
    out = export(tmp_path / "published", base, tmp_path / "out", merged=True)
    name = "model.layers.1.mlp.up_proj"
    adapter = load_file(tmp_path / "published" / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    weight = load_file(base / "model.safetensors")[f"{name}.weight"].float()
    merged = load_file(out / "model.safetensors")[f"{name}.weight"]
    exact = weight + (b @ a) * (LORA.alpha / LORA.rank)
    assert merged.dtype == torch.bfloat16
    differs = merged != exact.to(torch.bfloat16)
    assert float(differs.float().mean()) < 1e-3  # a different order of additions at a tie, at most


def test_nothing_is_overwritten_and_nothing_half_written(tiny_llama, tmp_path):
    _, source = published(tiny_llama, tmp_path, LORA)
    (tmp_path / "out").mkdir()
    with pytest.raises(LightningError, match="exists already"):
        export(source, tiny_llama, tmp_path / "out", merged=True)
    assert not any((tmp_path / "out").iterdir())
    _, full = published(tiny_llama, tmp_path / "full", None)
    with pytest.raises(LightningError, match="no adapter"):
        export(full, tiny_llama, tmp_path / "other", merged=False)
    assert not (tmp_path / "other").exists()
