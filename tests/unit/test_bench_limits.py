"""The machine's limit, against numbers worked out by hand and against facts that hold for any machine."""

from __future__ import annotations

import msgspec
import pytest

from lightning_rl.errors import ModelError
from rollout_server.bench.limits import (
    Gemm,
    Limits,
    Shape,
    Wave,
    best,
    decode_step_s,
    least_seconds,
    prefill_s,
    shape_of,
    waves,
)
from rollout_server.bench.scenarios import Conversation, Scenario, Turn
from rollout_server.bench.transcript import Choice, Exchange, Transcript
from rollout_server.models.config import ModelConfig, MoeConfig

SMOLLM2 = ModelConfig(
    family="llama",
    hidden=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    intermediate=1536,
    vocab=49152,
    max_positions=8192,
    rope_theta=1e5,
    norm_eps=1e-5,
    tied_embeddings=True,
    attention_bias=False,
    head_norm=False,
    eos_ids=(2,),
)
TINY = Shape(
    body=(Gemm("all", 10, 10, 2),),
    head=Gemm("head", 10, 30, 1),
    layers=2,
    attention_width=8,
    kv_width=4,
    element_bytes=2,
)
MACHINE = Limits(read_bytes_s=1000.0, gemm_flop_s={16: 1e4, 64: 2e4}, prefill_flop_s=5e4)


def test_smollm2() -> None:
    shape = shape_of(SMOLLM2, 2)
    assert shape.body_parameters == 30 * (576 * 960 + 576 * 576 + 576 * 3072 + 1536 * 576)
    assert shape.body_parameters + shape.head.parameters == 134_479_872
    assert shape.kv_bytes == 23_040
    one = Wave(prompts=1, prefill_tokens=0, prefill_pairs=0, rows=1, steps=1, context=256.0, distinct_context=256.0)
    step = decode_step_s(shape, Limits(21e9, {16: 468e9}, 468e9), one)
    assert step == pytest.approx((268_959_744 + 256 * 23_040) / 21e9)  # 76 tokens/s: bound by memory


def test_a_mixture_of_experts_is_refused() -> None:
    moe = MoeConfig(experts=4, top_k=2, intermediate=8, layers=(0,), normalise=True, wide_weights=False)
    with pytest.raises(ModelError, match="dense"):
        shape_of(msgspec.structs.replace(SMOLLM2, moe=moe), 2)


def test_a_decode_step_by_hand() -> None:
    """500 parameters of 2 bytes; 2 · 2 layers · 4 · 2 bytes = 32 a cached token; 4 · 2 · 8 = 64 operations a token pair."""
    few = Wave(prompts=0, prefill_tokens=0, prefill_pairs=0, rows=1, steps=1, context=10.0, distinct_context=10.0)
    assert decode_step_s(TINY, MACHINE, few) == pytest.approx(max((1000 + 320) / 1000, (1000 + 640) / 1e4))
    many = Wave(prompts=0, prefill_tokens=0, prefill_pairs=0, rows=64, steps=1, context=640.0, distinct_context=100.0)
    assert decode_step_s(TINY, MACHINE, many) == pytest.approx(max((1000 + 3200) / 1000, (64_000 + 40_960) / 2e4))
    assert decode_step_s(TINY, MACHINE, many) == pytest.approx(5.248)  # by arithmetic
    alone = many._replace(distinct_context=640.0)
    assert decode_step_s(TINY, MACHINE, alone) == pytest.approx(21.48)  # by memory, when nothing is shared


def test_a_prefill_by_hand() -> None:
    wave = Wave(prompts=2, prefill_tokens=100, prefill_pairs=5050, rows=2, steps=0, context=0.0, distinct_context=0.0)
    assert prefill_s(TINY, MACHINE, wave) == pytest.approx((2 * 200 * 100 + 2 * 300 * 2 + 64 * 5050) / 5e4)
    assert prefill_s(TINY, MACHINE, wave._replace(prefill_tokens=1, prefill_pairs=1)) == pytest.approx(
        1.0
    )  # the weights
    assert least_seconds(TINY, MACHINE, [wave, wave]) == pytest.approx(2 * prefill_s(TINY, MACHINE, wave))


def test_rates_are_taken_at_the_next_measured_row_count() -> None:
    assert [MACHINE.rate(rows) for rows in (1, 16, 17, 64, 256)] == [1e4, 1e4, 2e4, 2e4, 2e4]


def test_the_best_of_several_measurements() -> None:
    other = Limits(read_bytes_s=2000.0, gemm_flop_s={16: 9e3, 64: 3e4}, prefill_flop_s=4e4)
    assert best([MACHINE, other]) == Limits(2000.0, {16: 1e4, 64: 3e4}, 5e4)


def test_waves_of_a_group() -> None:
    """Two tasks of n = 2 behind a common prompt of 4, two of their own; 3 out: two steps, at contexts 7 and 8."""
    talks = [Conversation(turns=[Turn(append=[1, 2, 3, 4, task, task], max_tokens=3, n=2)]) for task in (5, 6)]
    exchanges = [
        Exchange(conversation=c, turn=0, submitted=0.0, choices=[Choice(ids=[7, 8, 9], arrivals=[1.0] * 3)] * 2)
        for c in (0, 1)
    ]
    scenario = Scenario(name="group", concurrency=2, seed=0, conversations=talks)
    (wave,) = waves(scenario, Transcript(wall_s=1.0, exchanges=exchanges, prefill_tokens=8))
    assert wave == Wave(
        prompts=2,
        prefill_tokens=8,
        prefill_pairs=(1 + 2 + 3 + 4 + 5 + 6) + (5 + 6),
        rows=4,
        steps=2,
        context=4 * 7.5,
        distinct_context=8 + 4 * 1.5,
    )


def test_waves_follow_turns_and_concurrency() -> None:
    talk = Conversation(turns=[Turn(append=[1, 2], max_tokens=2), Turn(append=[3], max_tokens=2)])
    exchanges = [
        Exchange(
            conversation=c,
            turn=t,
            submitted=10.0 * c + 5.0 * t,
            choices=[Choice(ids=[c, 9], arrivals=[10.0 * c + 5.0 * t + 1.0] * 2)],
        )
        for c in range(3)
        for t in range(2)
    ]
    scenario = Scenario(name="turns", concurrency=2, seed=0, conversations=[talk] * 3)
    made = list(waves(scenario, Transcript(wall_s=30.0, exchanges=exchanges, prefill_tokens=None)))
    assert [(w.prompts, w.rows, w.steps) for w in made] == [(2, 2, 1), (1, 1, 1), (2, 2, 1), (1, 1, 1)]
    assert [w.prefill_tokens for w in made] == [2, 0, 4, 2]  # later: the last sampled id and what is appended
