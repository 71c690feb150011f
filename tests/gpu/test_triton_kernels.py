"""Each Triton kernel, compiled, against the plain-torch reference on the same device."""

from __future__ import annotations

import pytest
import torch

from rollout_server.kernels import reference
from rollout_server.kernels.interface import Lora
from tests.unit.triton_oracle import PAGE, assert_near, random_batch, random_cache, random_tensor

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(128, 4, 8), (128, 7, 4), (64, 3, 3), (64, 1, 8), (128, 8, 1)]
DECODE = [(1, n) for n in (1, 15, 16, 17, 64, 65, 500, 2047)]
MIXED = [(1, 900), (130, 130), (1, 1), (0, 5), (77, 400), (1, 129), (512, 1024)]
PREFIX = 40
SHARED = [((0, 1, 2, 3, 4, 5), 0, 16), ((0, 2, 4), 16, PREFIX), ((1, 3), 16, 20)]


def gpu(*shape: int, dtype: torch.dtype, seed: int = 2) -> torch.Tensor:
    return random_tensor(*shape, dtype=dtype, seed=seed, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "group", "kv_heads"), SHAPES)
@pytest.mark.parametrize("rows", [DECODE[-1:], DECODE, DECODE * 16, MIXED], ids=["one", "decode", "many", "mixed"])
def test_attention(dtype: torch.dtype, dim: int, group: int, kv_heads: int, rows: list[tuple[int, int]]) -> None:
    from rollout_server.kernels.triton import backend, invariant

    batch = random_batch(rows, device="cuda")
    cache = random_cache(batch, kv_heads, dim, dtype)
    q = gpu(len(batch.ids), group * kv_heads, dim, dtype=dtype)
    expected = reference.attention(q, batch, cache)
    assert_near(backend.attention(q, batch, cache), expected)
    assert_near(invariant.attention(q, batch, cache), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "group", "kv_heads"), SHAPES)
@pytest.mark.parametrize("news", [[1] * 7, [1, 70, 1, 3, 1, 0, 200]], ids=["decode", "mixed"])
def test_shared_runs(dtype: torch.dtype, dim: int, group: int, kv_heads: int, news: list[int]) -> None:
    from rollout_server.kernels.triton import backend

    rows = [(new, PREFIX * PAGE + new + more) for new, more in zip(news, (1, 300, 2, 17, 16, 0, 5), strict=True)]
    batch = random_batch(rows, shared=SHARED, device="cuda")
    cache = random_cache(batch, kv_heads, dim, dtype)
    q = gpu(len(batch.ids), group * kv_heads, dim, dtype=dtype)
    assert_near(backend.attention(q, batch, cache), reference.attention(q, batch._replace(runs=[]), cache))


@pytest.mark.parametrize("dtype", DTYPES)
def test_invariant_attention_has_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    from rollout_server.kernels.triton import invariant

    rows = [(1, 40), (121, 585), (4, 70)]
    batch = random_batch(rows, shared=[((0, 1, 2), 0, 2)], device="cuda")
    cache = random_cache(batch, 2, 128, dtype)
    q = gpu(len(batch.ids), 8, 128, dtype=dtype)
    together = invariant.attention(q, batch, cache)
    for token in (1, 17, 60, 121):
        alone = batch._replace(
            ids=batch.ids[token : token + 1],
            positions=batch.positions[token : token + 1],
            cells=batch.cells[token : token + 1],
            offsets=torch.tensor([0, 1], dtype=torch.int32, device="cuda"),
            lines=batch.lines[1:2],
            lengths=batch.positions[token : token + 1] + 1,
            longest=585,
            most=1,
            runs=[],
        )
        assert torch.equal(invariant.attention(q[token : token + 1], alone, cache), together[token : token + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 6144), (14336, 4096), (576, 960)])
def test_invariant_linear_has_the_same_bits_alone_and_among_others(
    dtype: torch.dtype, inputs: int, outputs: int
) -> None:
    from rollout_server.kernels.triton import invariant

    x, weight = gpu(200, inputs, dtype=dtype), gpu(outputs, inputs, dtype=dtype, seed=3) / inputs**0.5
    together = invariant.linear(x, weight)
    assert_near(together, torch.nn.functional.linear(x, weight))
    for row in (0, 1, 63, 64, 199):
        assert torch.equal(invariant.linear(x[row : row + 1], weight), together[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "group", "kv_heads"), SHAPES)
def test_rope_store(dtype: torch.dtype, dim: int, group: int, kv_heads: int) -> None:
    from rollout_server.kernels.triton import backend

    batch, heads = random_batch(MIXED, device="cuda"), group * kv_heads
    found, expected = (random_cache(batch, kv_heads, dim, dtype) for _ in range(2))
    qkv = gpu(len(batch.ids), (heads + 2 * kv_heads) * dim, dtype=dtype)
    angles = torch.outer(torch.arange(2048.0), 1e4 ** (-torch.arange(0.0, 1.0, 2 / dim))).cuda()
    rope = (angles.cos(), angles.sin())
    q = backend.rope_store(qkv, rope, batch, found, heads)
    expected_q = reference.rope_store(qkv, rope, batch, expected, heads)
    for ours, theirs in zip((q, *found), (expected_q, *expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(256, 4096), (300 * 40, 128), (3, 576)])
def test_add_norm_and_silu_mul(dtype: torch.dtype, rows: int, width: int) -> None:
    from rollout_server.kernels.triton import backend

    x, delta, weight = gpu(rows, width, dtype=dtype), gpu(rows, width, dtype=dtype, seed=3), gpu(width, dtype=dtype)
    found, expected = x.clone(), x.clone()
    ours, theirs = (k.add_norm(into, delta, weight, 1e-5) for k, into in ((backend, found), (reference, expected)))
    assert torch.equal(found, expected)
    assert_near(ours, theirs)
    assert_near(backend.silu_mul(x), reference.silu_mul(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora(dtype: torch.dtype) -> None:
    from rollout_server.kernels.triton import backend

    tokens, inputs, outputs = 400, 4096, 6144
    x, y = (gpu(tokens, n, dtype=dtype, seed=n) for n in (inputs, outputs))
    spans = []
    for at, rank in enumerate((8, 16, 48, 64, 7)):
        down = gpu(rank, inputs, dtype=dtype, seed=rank) / inputs**0.5
        up = gpu(outputs, rank, dtype=dtype, seed=rank + 1) / rank**0.5
        spans.append((at * 75, at * 75 + 1 + at * 18, Lora(down, up, 0.5 * (at + 1))))
    found, expected = y.clone(), y.clone()
    backend.add_lora(found, x, spans)
    reference.add_lora(expected, x, spans)
    assert_near(found, expected)


@pytest.mark.parametrize("vocab", [49_152, 128_256, 151_936])
def test_sampling(vocab: int) -> None:
    """Ids of the fp64 inverse CDF, but where it comes so near to a uniform that fp32 sums decide: then a neighbour."""
    from rollout_server.kernels.triton import backend

    rows = 256
    logits = gpu(rows, vocab, dtype=torch.float32) * 3
    temperatures = torch.linspace(0.3, 2.0, rows, device="cuda")
    temperatures[::7] = 0.0
    uniforms = torch.rand(rows, dtype=torch.float64, device="cuda")
    ids, logprobs, entropies = backend.log_softmax_sample(logits, temperatures, uniforms)
    divisors = torch.where(temperatures == 0, 1.0, temperatures)[:, None]
    cdf = torch.softmax(logits.double() / divisors.double(), -1).cumsum(-1)
    greedy = temperatures == 0
    assert torch.equal(ids[greedy], logits[greedy].argmax(-1))
    at = cdf.gather(1, ids[:, None])[:, 0]
    before = torch.where(ids > 0, cdf.gather(1, (ids[:, None] - 1).clamp(min=0))[:, 0], 0.0)
    assert bool(((before - 1e-6 <= uniforms) & (uniforms <= at + 1e-6))[~greedy].all())
    expected = torch.log_softmax(logits / divisors, -1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-4)
    exact = torch.special.entr(torch.softmax(logits.double() / divisors.double(), -1)).sum(-1)
    torch.testing.assert_close(entropies.double(), exact, rtol=0, atol=1e-4)


def test_sampled_frequencies_are_the_distribution() -> None:
    from scipy.stats import chisquare

    from rollout_server.kernels.triton import backend

    draws, vocab = 100_000, 50
    logits = gpu(1, vocab, dtype=torch.float32).expand(draws, vocab)
    uniforms = torch.rand(draws, dtype=torch.float64, device="cuda", generator=torch.Generator("cuda").manual_seed(5))
    ids, _, _ = backend.log_softmax_sample(logits, torch.full((draws,), 0.7, device="cuda"), uniforms)
    expected = torch.softmax(logits[0].double() / 0.7, -1) * draws
    assert chisquare(torch.bincount(ids, minlength=vocab).cpu(), expected.cpu()).pvalue > 1e-3
