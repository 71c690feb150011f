"""The C kernels against plain torch, operation by operation; and their promise that rows do not touch each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_server.kernels import native, reference
from rollout_server.kernels.interface import Batch, Lora, SharedRun
from rollout_server.models.config import ModelConfig

compiled = native.load()
pytestmark = pytest.mark.skipif(compiled is None, reason="the C kernels are not built")


@pytest.fixture(params=[2, 1, 0], ids=["avx512bf16", "avx2", "portable"], autouse=True, scope="module")
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every body that the dispatcher may choose, on a machine that may have all."""
    with compiled.at_most(request.param):
        yield


DTYPES = [torch.float32, torch.bfloat16]
SIZE = native.PAGE_SIZE


def near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = 2e-2 if dtype is torch.bfloat16 else 2e-5
    scale = expected.float().abs().max().clamp(min=1e-6)
    assert ((actual.float() - expected.float()).abs().max() / scale).item() < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 32), (40, 34), (7, 576), (331, 64), (192, 96)])
def test_linear_equals_torch_and_packing_loses_nothing(dtype: torch.dtype, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    packed = compiled.pack(weight)
    assert torch.equal(compiled.unpack(packed), weight)
    for rows in [*range(1, 18), 31, 64, 65, 130]:
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        exact = x.double() @ weight.double().T
        near(compiled.linear(x, packed), exact, dtype)
        near(compiled.linear(x, packed, bias), exact + bias.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_product_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    x = torch.randn(150, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed = compiled.pack(torch.randn(100, 96, generator=torch.Generator().manual_seed(2)).to(dtype))
    whole = compiled.linear(x, packed)
    for rows in (1, 2, 3, 7, 8, 9, 33, 64, 100):
        for first in (0, 5, 50):
            assert torch.equal(compiled.linear(x[first : first + rows], packed), whole[first : first + rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_are_no_work(dtype: torch.dtype) -> None:
    assert compiled.linear(torch.empty(0, 32, dtype=dtype), compiled.pack(torch.ones(48, 32, dtype=dtype))).shape == (
        0,
        48,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 40, 600, 601])
def test_low_rank_updates_of_mixed_spans_equal_torch(dtype: torch.dtype, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, y = random(90, 64), random(90, 80)
    pairs = [(random(rank, 64), random(80, rank), 0.5 + i) for i in range(3)]
    spans = [(0, 3), (3, 50), (60, 90)]
    expected = y.clone()
    reference.add_lora(expected, x, [(*span, Lora(*pair)) for span, pair in zip(spans, pairs, strict=True)])
    packed = [Lora(compiled.pack(down), compiled.pack(up), scale) for down, up, scale in pairs]
    compiled.add_lora(y, x, [(*span, lora) for span, lora in zip(spans, packed, strict=True)])
    near(y, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 60, 576])
def test_norm_and_activation_equal_torch(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x, delta = (torch.randn(37, width, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(width, generator=generator).to(dtype)
    for add in (None, delta):
        ours, theirs = x.clone(), x.clone()
        near(compiled.add_norm(ours, add, weight, 1e-5), reference.add_norm(theirs, add, weight, 1e-5), dtype)
        assert torch.equal(ours, theirs)
    gate_up = 4 * torch.randn(37, 2 * width, generator=generator).to(dtype)
    near(compiled.silu_mul(gate_up), reference.silu_mul(gate_up), dtype)


def config(heads: int, kv_heads: int, dim: int) -> ModelConfig:
    return ModelConfig(
        family="llama", hidden=heads * dim, layers=1, heads=heads, kv_heads=kv_heads, head_dim=dim, intermediate=16,
        vocab=16, max_positions=1024, rope_theta=1e4, norm_eps=1e-5, tied_embeddings=True, attention_bias=False,
        head_norm=False, eos_ids=(),
    )  # fmt: skip


class Paged:
    """Random rows over a paged cache: `shared` leading pages of row i are those of row parent[i]."""

    def __init__(self, rows: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        self.heads, self.dim, self.dtype = heads, dim, dtype
        self.config = config(heads, kv_heads, dim)
        self.rows = rows
        self.width = max(-(-(start + count) // SIZE) for start, count in rows)
        self.tables = torch.full((len(rows), self.width), 10**6, dtype=torch.int32)
        order = np.random.default_rng(0).permutation(sum(-(-(start + count) // SIZE) for start, count in rows))
        pages = iter(order.tolist())
        for r, (start, count) in enumerate(rows):
            for p in range(-(-(start + count) // SIZE)):
                self.tables[r, p] = next(pages)
        self.pages = len(order)
        angles = torch.outer(torch.arange(1024.0), 1e4 ** -(torch.arange(0, dim, 2) / dim))
        self.rope = (angles.cos().contiguous(), angles.sin().contiguous())

    def batch(self, rows: list[tuple[int, int]], runs: list[SharedRun] | None = None) -> Batch:
        positions = torch.tensor([p for start, count in rows for p in range(start, start + count)], dtype=torch.int32)
        line = torch.tensor([r for r, (_, count) in enumerate(rows) for _ in range(count)])
        return Batch(
            ids=torch.zeros(len(positions), dtype=torch.int64),
            positions=positions,
            cells=self.tables[line, positions.long() // SIZE].long() * SIZE + positions.long() % SIZE,
            offsets=torch.tensor(list(itertools.accumulate((c for _, c in rows), initial=0)), dtype=torch.int32),
            tables=self.tables,
            lines=torch.arange(len(rows), dtype=torch.int32),
            lengths=torch.tensor([start + count for start, count in rows], dtype=torch.int32),
            longest=max(start + count for start, count in rows),
            most=max(count for _, count in rows),
            runs=runs or [],
        )

    def run(self, kernels: object, batches: list[tuple[Batch, torch.Tensor]]) -> list[torch.Tensor]:
        cache = kernels.allocate(self.config, self.pages, SIZE, self.dtype, torch.device("cpu"))[0]
        out = []
        for batch, qkv in batches:
            q = kernels.rope_store(qkv, self.rope, batch, cache, self.heads)
            out.append(kernels.attention(q.contiguous(), batch, cache))
        return out

    def qkv(self, tokens: int, seed: int) -> torch.Tensor:
        width = (self.heads + 2 * self.config.kv_heads) * self.dim
        return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(self.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 2, 16), (4, 4, 128), (14, 2, 64), (8, 1, 96)])
def test_attention_over_pages_equals_torch(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    final = [(0, 1), (40, 30), (63, 1), (64, 1), (65, 2), (200, 1), (0, 130), (15, 1)]
    paged = Paged(final, heads, kv_heads, dim, dtype)
    context = paged.batch([(0, start) for start, _ in final])
    now = paged.batch(final)
    batches = [(context, paged.qkv(len(context.ids), 1)), (now, paged.qkv(len(now.ids), 2))]
    for ours, theirs in zip(paged.run(compiled, batches), paged.run(reference, batches), strict=True):
        near(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 48])
def test_what_stands_beyond_a_row_is_never_touched(dtype: torch.dtype, dim: int) -> None:
    """A page comes from another sequence as it was, and that may have had weights that were not numbers."""
    final = [(0, length) for length in (1, 2, 15, 16, 17, 63, 64, 65, 130)]
    paged = Paged(final, 6, 3, dim, dtype)
    now = paged.batch(final)
    qkv = paged.qkv(len(now.ids), 1)
    clean = paged.run(compiled, [(now, qkv)])[0]
    allocate = compiled.allocate

    class Dirty:
        rope_store, attention = compiled.rope_store, compiled.attention

        @staticmethod
        def allocate(*arguments: object) -> list[object]:
            caches = allocate(*arguments)
            for tensor in caches[0]:
                tensor.fill_(torch.nan)
            return caches

    assert torch.equal(paged.run(Dirty, [(now, qkv)])[0], clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_has_the_same_bits_in_chunks_and_in_any_company(dtype: torch.dtype) -> None:
    final = [(0, 150), (0, 70)]
    paged = Paged(final, 9, 3, 64, dtype)
    qkv = [paged.qkv(150, 1), paged.qkv(70, 2)]
    whole = paged.run(compiled, [(paged.batch(final), torch.cat(qkv))])[0]
    chunks = [(0, 33), (33, 1), (34, 66), (100, 50)]
    batches = [(paged.batch([(start, count), (0, 0)]), qkv[0][start : start + count]) for start, count in chunks]
    assert torch.equal(torch.cat(paged.run(compiled, batches)), whole[:150])


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Per row: blocks shared by all, blocks shared within its half, own tokens."""
    rows = draw(st.integers(2, 9))
    return (
        [draw(st.integers(0, 3))],
        [draw(st.integers(0, 2)) for _ in range(2)],
        [draw(st.integers(1, 90)) for _ in range(rows)],
    )


@settings(max_examples=25, deadline=None)
@given(trees(), st.sampled_from(DTYPES), st.sampled_from([(9, 3, 64), (4, 4, 32)]), st.integers(1, 3))
def test_attending_to_shared_pages_together_changes_no_bit(
    tree: tuple[list[int], list[int], list[int]], dtype: torch.dtype, shape: tuple[int, int, int], count: int
) -> None:
    (common,), halves, own = tree
    half = [r * 2 // len(own) for r in range(len(own))]
    final = [(64 * (common + halves[h]) + tokens, count) for h, tokens in zip(half, own, strict=True)]
    paged = Paged(final, *shape, dtype)
    runs = []
    if common:
        runs.append(SharedRun(list(range(len(own))), 0, 4 * common))
    for h in range(2):
        members = [r for r in range(len(own)) if half[r] == h]
        for r in members:
            paged.tables[r, : 4 * common] = paged.tables[0, : 4 * common]
            paged.tables[r, : 4 * (common + halves[h])] = paged.tables[members[0], : 4 * (common + halves[h])]
        if halves[h] and members:
            runs.append(SharedRun(members, 4 * common, 4 * (common + halves[h])))
    context = paged.batch([(0, start) for start, _ in final])
    qkv = paged.qkv(count * len(own), 3)
    fill = paged.qkv(paged.width * SIZE, 4)[context.positions.long()]  # rows agree on the pages they share
    alone = paged.run(compiled, [(context, fill), (paged.batch(final), qkv)])[1]
    together = paged.run(compiled, [(context, fill), (paged.batch(final, runs), qkv)])[1]
    assert torch.equal(alone, together)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5, 300, 4097])
def test_sampling_equals_the_reference(dtype: torch.dtype, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(200, vocab, generator=generator)).to(dtype)
    logits[:, vocab // 2] = -torch.inf
    temperatures = torch.tensor([0.0, 1.0, 0.5, 1.7] * 50)
    uniforms = torch.rand(200, generator=generator, dtype=torch.float64)
    ids, logprobs, entropies = compiled.log_softmax_sample(logits, temperatures, uniforms)
    expected, _, known = reference.log_softmax_sample(logits, temperatures, uniforms)
    assert (ids == expected).float().mean() > 0.98  # the rest fall on the other side of an edge by rounding
    exact = torch.log_softmax(logits.double() / torch.where(temperatures == 0, 1, temperatures)[:, None], -1)
    assert torch.allclose(logprobs.double(), exact.gather(1, ids[:, None])[:, 0], atol=2e-5)
    for told in (entropies, known):
        assert torch.allclose(told.double(), torch.special.entr(exact.exp()).sum(-1), atol=1e-5)
    below = torch.where(torch.arange(vocab) < ids[:, None], exact.exp(), 0.0).sum(-1)
    hot = temperatures > 0
    assert (below - uniforms)[hot].max() < 1e-5
    assert (uniforms - below - exact.exp().gather(1, ids[:, None])[:, 0])[hot].max() < 1e-5


@pytest.mark.parametrize("level", [0, 1, 2])
def test_entropies_of_few_possible_ids(level: int) -> None:
    """On every instruction set: one id, two equal ones far apart, next to no temperature, all alike."""
    logits = torch.full((4, 1003), -torch.inf)
    logits[0, 1002] = -5.0
    logits[1, [3, 1001]] = 80.0
    logits[2] = torch.linspace(-80.0, 80.0, 1003)
    logits[3] = 0.25
    temperatures, uniforms = torch.tensor([1.0, 0.7, 1e-30, 2.0]), torch.full((4,), 0.4, dtype=torch.float64)
    with compiled.at_most(level):
        entropies = compiled.log_softmax_sample(logits, temperatures, uniforms)[2]
    assert entropies.tolist() == pytest.approx([0.0, math.log(2), 0.0, math.log(1003)], abs=1e-6)
    assert (entropies >= 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_from_what_is_no_distribution_stays_within_the_vocabulary(temperature: float) -> None:
    logits = torch.full((3, 500), torch.nan)
    logits[1, :7] = 1.0
    logits[2] = -torch.inf
    ids, _, _ = compiled.log_softmax_sample(
        logits, torch.full((3,), temperature), torch.full((3,), 0.5, dtype=torch.float64)
    )
    assert ((ids >= 0) & (ids < 500)).all()


def test_a_recorded_pass_replays_the_same_operations() -> None:
    """New numbers in the same inputs give what computing them anew gives."""
    packed = compiled.pack(torch.randn(96, 64))
    weight = torch.randn(48)
    x = torch.randn(5, 64)

    def work() -> torch.Tensor:
        hidden = compiled.silu_mul(compiled.linear(x, packed))
        return compiled.add_norm(hidden, None, weight, 1e-5)

    with compiled.record() as tape:
        first = work()
    assert tape.whole
    assert torch.equal(first, work())
    for _ in range(3):
        x.copy_(torch.randn(5, 64))
        tape.replay()
        assert torch.equal(first, work())
