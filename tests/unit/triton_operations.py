"""Kernels other than attention against the plain-torch reference. Run by `test_triton.py` under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from rollout_server.kernels import reference
from rollout_server.kernels.interface import Lora
from rollout_server.kernels.triton import backend, invariant
from tests.unit.triton_oracle import assert_near, random_batch, random_cache, random_tensor, round_as_hardware_does

round_as_hardware_does()

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(16, 4, 2), (64, 9, 3), (128, 8, 1)])
def test_rope_store(dtype: torch.dtype, dim: int, heads: int, kv_heads: int) -> None:
    batch = random_batch([(1, 40), (18, 18), (5, 70)])
    found, expected = (random_cache(batch, kv_heads, dim, dtype) for _ in range(2))
    wide = random_tensor(len(batch.ids), (heads + 2 * kv_heads) * dim + 8, dtype=dtype)
    qkv = wide[:, : (heads + 2 * kv_heads) * dim]
    angles = torch.outer(torch.arange(128.0), 1e4 ** (-torch.arange(0.0, 1.0, 2 / dim)))
    rope = (angles.cos(), angles.sin())
    q = backend.rope_store(qkv, rope, batch, found, heads)
    expected_q = reference.rope_store(qkv, rope, batch, expected, heads)
    for ours, theirs in zip((q, *found), (expected_q, *expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(5, 576), (19, 64), (1, 2048), (0, 64)])
@pytest.mark.parametrize("adds", [True, False])
def test_add_norm(dtype: torch.dtype, rows: int, width: int, adds: bool) -> None:
    x, delta, weight = (random_tensor(*s, dtype=dtype, seed=i) for i, s in enumerate([(rows, width)] * 2 + [(width,)]))
    found, expected = x.clone(), x.clone()
    ours = backend.add_norm(found, delta if adds else None, weight, 1e-5)
    theirs = reference.add_norm(expected, delta if adds else None, weight, 1e-5)
    assert torch.equal(found, expected)
    assert_near(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(3, 1536), (7, 40), (0, 8)])
def test_silu_mul(dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up = random_tensor(rows, 2 * width, dtype=dtype) * 4
    assert_near(backend.silu_mul(gate_up), reference.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(2050, 200), (40, 24)])
def test_lora(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    tokens = 60
    x, y = (random_tensor(tokens, n, dtype=dtype, seed=n) for n in (inputs, outputs))

    def adapter(rank: int, scale: float) -> Lora:
        down = random_tensor(rank, inputs, dtype=dtype, seed=rank) / inputs**0.5
        return Lora(down, random_tensor(outputs, rank, dtype=dtype, seed=rank + 1) / rank**0.5, scale)

    few, many, odd = adapter(4, 2.0), adapter(48, 0.5), adapter(7, 1.0)
    spans = [(0, 1, few), (1, 40, many), (43, 44, odd), (44, 60, few)]
    found, expected = y.clone(), y.clone()
    backend.add_lora(found, x, spans)
    reference.add_lora(expected, x, spans)
    assert torch.equal(found[40:43], y[40:43]), "tokens in no span"
    assert_near(found, expected)
    backend.add_lora(found, x, [])


def test_lora_refuses_what_it_would_misread() -> None:
    x, y = torch.zeros(1, 32), torch.zeros(1, 16)
    with pytest.raises(ValueError, match="contiguous"):
        backend.add_lora(y, x, [(0, 1, Lora(torch.zeros(32, 4).T, torch.zeros(16, 4), 1.0))])
    with pytest.raises(ValueError, match="float32"):
        backend.add_lora(y, x, [(0, 1, Lora(torch.zeros(4, 32), torch.zeros(16, 4, dtype=torch.bfloat16), 1.0))])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_invariant_linear(dtype: torch.dtype, has_bias: bool) -> None:
    x, weight = random_tensor(70, 200, dtype=dtype), random_tensor(90, 200, dtype=dtype, seed=3) / 14
    bias = random_tensor(90, dtype=dtype, seed=4) if has_bias else None
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_near(invariant.linear(x, invariant.pack(weight), bias), expected.to(dtype))
    assert torch.equal(invariant.linear(x[64:65], weight, bias), invariant.linear(x[64:], weight, bias)[:1])
    assert torch.equal(invariant.unpack(invariant.pack(weight)), weight)


def near_edges(logits: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The ids [B] at `uniforms` of the CDF in fp64, the oracle."""
    probs = torch.softmax(logits.double() / temperatures.double()[:, None], -1)
    return (probs.cumsum(-1) <= uniforms[:, None]).sum(-1).clamp(max=logits.shape[1] - 1)


@pytest.mark.parametrize("vocab", [50, 2048, 5000])
def test_sampling_is_the_inverse_cdf(vocab: int) -> None:
    rows = 24
    logits = random_tensor(rows, vocab, dtype=torch.float32) * 3
    temperatures = torch.linspace(0.3, 2.0, rows)
    uniforms = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids, logprobs, entropies = backend.log_softmax_sample(logits, temperatures, uniforms)
    assert torch.equal(ids, near_edges(logits, temperatures, uniforms))
    every = torch.log_softmax(logits / temperatures[:, None], -1)
    torch.testing.assert_close(logprobs, every.gather(1, ids[:, None])[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies, torch.special.entr(every.exp()).sum(-1), rtol=0, atol=1e-5)


def test_greedy_rows_take_the_first_of_the_likeliest_at_temperature_one() -> None:
    logits = random_tensor(3, 6000, dtype=torch.float32)
    logits[0, 100] = logits[0, 5000] = 9.0
    logits[1, 4097] = logits[1, 4098] = 9.0
    temperatures = torch.tensor([0.0, 0.0, 1.0])
    uniforms = torch.full((3,), 0.999, dtype=torch.float64)
    ids, logprobs, entropies = backend.log_softmax_sample(logits, temperatures, uniforms)
    assert ids[:2].tolist() == [100, 4097]
    every = torch.log_softmax(logits, -1)
    torch.testing.assert_close(logprobs, every.gather(1, ids[:, None])[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies, torch.special.entr(every.exp()).sum(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("uniform", [1e-17, 0.5, 1 - 2**-53])
def test_impossible_ids_are_never_drawn(uniform: float) -> None:
    """Whole blocks and both ends masked out; the uniform at the very edges."""
    logits = torch.full((2, 7000), -torch.inf)
    allowed = [3000, 3001, 6000]
    logits[:, allowed] = torch.tensor([0.1, 0.2, 0.3])
    ids, logprobs, entropies = backend.log_softmax_sample(
        logits, torch.tensor([1.0, 0.0]), torch.full((2,), uniform, dtype=torch.float64)
    )
    assert ids.tolist() == [3000 if uniform < 0.1 else 3001 if uniform < 0.6 else 6000, 6000]
    assert torch.isfinite(logprobs).all()
    possible = torch.softmax(logits[:, allowed], -1)
    torch.testing.assert_close(entropies, torch.special.entr(possible).sum(-1), rtol=0, atol=1e-5)


def test_allocated_caches_are_zero_and_paged() -> None:
    from rollout_server.models.catalog import resolve_model
    from rollout_server.models.config import read_config

    config = read_config(resolve_model("tiny-llama"))
    cache = backend.allocate(config, 3, 16, torch.bfloat16, torch.device("cpu"))
    assert len(cache) == config.layers
    assert cache[0].keys.shape == (3, config.kv_heads, 16, config.head_dim)
    assert not cache[0].values.any()
