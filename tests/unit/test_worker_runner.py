"""The runner alone, planned by hand: whatever way a sequence is computed in, its ids and log-probs are the same.

The oracle computes each sequence token by token from its whole prefix, alone, with plain sampling by the definitions.
"""

from __future__ import annotations

import gc
import io
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import zmq
from safetensors.torch import save_file
from typing_extensions import Buffer

from lightning_rl.errors import ModelError
from rollout_server import messages as m
from rollout_server.config import EngineConfig
from rollout_server.kernels import reference
from rollout_server.models.checksum import checksum
from rollout_server.models.config import read_config
from rollout_server.models.decoder import load_decoder
from rollout_server.models.weights import tensor_shapes
from rollout_server.worker import sharing
from rollout_server.worker.batch import flatten
from rollout_server.worker.kv_cache import KVCache
from rollout_server.worker.process import build_runner, choose_device, serve
from rollout_server.worker.runner import Runner
from rollout_server.worker.slots import Slots

SIZE = 4
VOCAB = 97
SHAPE = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "eos_token_id": 2,
}  # fmt: skip
LORA = {"peft_type": "LORA", "r": 3, "lora_alpha": 12}


def write_model(path: Path, seed: int = 0) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SHAPE))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.2 if len(shape) == 2 else 0.1) + (len(shape) == 1)
        for name, shape in tensor_shapes(read_config(path)).items()
    }
    save_file(tensors, path / "model.safetensors")
    return path


def write_adapter(path: Path, seed: int) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(LORA))
    generator = torch.Generator().manual_seed(seed)
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {}
    for layer in range(2):
        tensors[prefix.format(layer, "A")] = torch.randn(3, 64, generator=generator) * 0.2
        tensors[prefix.format(layer, "B")] = torch.randn(64, 3, generator=generator) * 0.2
    save_file(tensors, path / "adapter_model.safetensors")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(root / name, seed) for seed, name in enumerate(("a", "b"), start=1)}


def make_runner(
    model: Path, *, slots: int = 8, pages: int = 200, host_pages: int = 0, host_dir: Path | None = None
) -> Runner:
    config = read_config(model)
    cpu = torch.device("cpu")
    cache = KVCache(
        lambda count: reference.allocate(config, count, SIZE, torch.float32, cpu),
        pages,
        host_pages=host_pages,
        host_dir=host_dir,
    )
    decoder = load_decoder(model, config, torch.float32, reference)
    return Runner(decoder, cache, Slots(slots, 256 // SIZE, cache.scratch, VOCAB, cpu), SIZE)


@dataclass
class Sequence_:
    """What a manager knows of a sequence, and what came back."""

    slot: int
    prompt: list[int]
    sampling: m.SamplingParams
    index: int = 0
    adapter: str = ""
    pages: list[int] = field(default_factory=list)
    planned: int = 0
    """Positions whose keys and values are planned."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def open(self) -> m.Open:
        return m.Open(slot=self.slot, sampling=self.sampling, index=self.index, adapter=self.adapter)


class Manager:
    """Pages at random places, passes as the test wants them."""

    def __init__(self, runner: Runner, seed: int = 0) -> None:
        self.runner, self.random = runner, random.Random(seed)
        self.free = list(range(runner.cache.pages))
        self.random.shuffle(self.free)
        self.step = 0

    def row(self, sequence: Sequence_, ids: list[int], draws: list[m.Draw]) -> m.Row:
        start = sequence.planned
        sequence.planned += len(ids)
        first = len(sequence.pages)
        sequence.pages += [self.free.pop() for _ in range(first, -(-sequence.planned // SIZE))]
        return m.Row(
            slot=sequence.slot, ids=ids, start=start, pages=sequence.pages[first:], first_page=first, draws=draws
        )

    def run(self, rows: list[m.Row], owners: dict[int, Sequence_], **more: object) -> m.Forwarded:
        self.step += 1
        forward = m.Forward(step=self.step, rows=rows, **more)  # type: ignore[arg-type]
        forward = m.decode_to_worker(m.encode(forward))  # type: ignore[assignment]
        got = self.runner.execute(forward)
        assert got.step == self.step
        slots = [draw.slot for row in rows for draw in row.draws]
        assert len(got.ids) == len(got.logprobs) == len(slots)
        for slot, token, logprob in zip(slots, got.ids, got.logprobs, strict=True):
            owners[slot].ids.append(token)
            owners[slot].logprobs.append(logprob)
        return got

    def generate(self, sequences: Sequence[Sequence_], tokens: int, chunk: int = 1000, known: bool = False) -> None:
        """Prompts in chunks beside decodes, decodes by the id that the slot remembers unless `known`."""
        owners = {s.slot: s for s in sequences}
        opens = [s.open() for s in sequences]
        while waiting := [s for s in sequences if len(s.ids) < tokens]:
            rows = []
            self.random.shuffle(waiting)
            for s in waiting:
                left = s.prompt[s.planned : s.planned + chunk]
                ends = s.planned + len(left) >= len(s.prompt)
                ids = left or ([s.ids[-1]] if known else [-1])
                rows.append(self.row(s, ids, [m.Draw(slot=s.slot, at=len(s.ids))] if ends else []))
            self.run(rows, owners, opens=opens)
            opens = []


def alone(model: Path, s: Sequence_, tokens: int, adapter: Path | None = None) -> tuple[list[int], list[float]]:
    """Each token from its whole prefix, in a runner of its own, one row and one pass."""
    runner = make_runner(model, slots=1)
    if adapter is not None:
        runner.load(m.Load(source=m.Directory(path=str(adapter)), version=1, adapter=s.adapter))
    ids: list[int] = []
    logprobs: list[float] = []
    for at in range(tokens):
        prefix = s.prompt + ids
        row = m.Row(
            slot=0, ids=prefix, start=0, pages=list(range(-(-len(prefix) // SIZE))), draws=[m.Draw(slot=0, at=at)]
        )
        got = runner.execute(
            m.Forward(step=0, rows=[row], opens=[m.Open(slot=0, sampling=s.sampling, index=s.index, adapter=s.adapter)])
        )
        ids += got.ids
        logprobs += got.logprobs
    return ids, logprobs


def prompt(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, VOCAB) for _ in range(count)]


KINDS = [
    m.SamplingParams(temperature=0.0),
    m.SamplingParams(seed=1),
    m.SamplingParams(seed=2, temperature=0.7, top_p=0.9),
    m.SamplingParams(seed=3, top_k=5, logit_bias={4: 2.0}),
]


def same(s: Sequence_, want: tuple[list[int], list[float]]) -> None:
    assert s.ids == want[0]
    assert s.logprobs == pytest.approx(want[1], abs=1e-4)


@pytest.mark.parametrize(("chunk", "known"), [(1000, True), (1000, False), (3, False), (1, False)])
def test_however_it_is_planned(model: Path, chunk: int, known: bool) -> None:
    sequences = [Sequence_(slot, prompt(slot, 5 + 4 * slot), KINDS[slot % 4]) for slot in range(6)]
    Manager(make_runner(model), seed=chunk).generate(sequences, 8, chunk, known)
    for s in sequences:
        same(s, alone(model, s, 8))


def test_choices_of_one_prompt(model: Path) -> None:
    """Drawn together from the prompt's last row; the others go on in copies of its last page."""
    runner = make_runner(model)
    manager = Manager(runner)
    sampling = m.SamplingParams(seed=9, temperature=1.3, top_logprobs=3)
    choices = [Sequence_(slot, prompt(7, 10), sampling, index=slot) for slot in range(4)]
    owners = {s.slot: s for s in choices}
    row = manager.row(choices[0], choices[0].prompt, [m.Draw(slot=s.slot, at=0) for s in choices])
    got = manager.run([row], owners, opens=[s.open() for s in choices])
    assert [len(top) for top in got.top_logprobs] == [3] * 4
    assert len({tuple(top) for top in map(tuple, got.top_logprobs)}) == 1
    whole, tail = choices[0].pages[:2], choices[0].pages[2]
    copies = []
    for s in choices[1:]:
        s.pages, s.planned = [*whole, manager.free.pop()], 10
        copies.append((tail, s.pages[2]))
    for at in range(1, 6):
        rows = [manager.row(s, [-1], [m.Draw(slot=s.slot, at=at)]) for s in choices]
        if at == 1:
            rows = [
                rows[0],
                *(
                    m.Row(slot=s.slot, ids=[-1], start=10, pages=s.pages, draws=r.draws)
                    for s, r in zip(choices[1:], rows[1:], strict=True)
                ),
            ]
        manager.run(rows, owners, copies=copies)
        copies = []
    for s in choices:
        same(s, alone(model, s, 6))
    assert len({tuple(s.ids) for s in choices}) > 1


def test_adapters_mixed_in_one_pass(model: Path, adapters: dict[str, Path]) -> None:
    runner = make_runner(model)
    for name, path in adapters.items():
        loaded = runner.load(m.Load(source=m.Directory(path=str(path)), version=3, adapter=name))
        assert loaded.error is None
        assert loaded.checksum == checksum(runner.decoder.export(name))
    sequences = [
        Sequence_(slot, prompt(slot, 9), KINDS[slot % 2], adapter=["b", "", "a"][slot % 3]) for slot in range(8)
    ]
    Manager(runner).generate(sequences, 6, chunk=4)
    for s in sequences:
        same(s, alone(model, s, 6, adapters.get(s.adapter)))
    assert runner.unload(m.Unload(adapter="a")) == m.Acknowledged()
    assert "'a'" in str(runner.unload(m.Unload(adapter="a")).error)
    with pytest.raises(ModelError, match="'a'"):
        runner.execute(m.Forward(step=0, rows=[m.Row(slot=2, ids=[5], start=0, pages=[0])]))


@pytest.mark.parametrize("on_disk", [False, True])
def test_pages_come_back_from_the_host(model: Path, on_disk: bool, tmp_path: Path) -> None:
    """Half-way all pages go to the host, the device's are overwritten, and they come back to other places."""
    runner = make_runner(model, host_pages=64, host_dir=tmp_path if on_disk else None)
    manager = Manager(runner)
    sequences = [Sequence_(slot, prompt(slot, 6 + slot), KINDS[slot]) for slot in range(4)]
    owners = {s.slot: s for s in sequences}
    manager.generate(sequences, 4)
    used = [page for s in sequences for page in s.pages]
    manager.run([], owners, offloads=[(page, host) for host, page in enumerate(used)])
    for layer in runner.cache.layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    moved = {page: manager.free.pop() for page in used}
    restores = [(host, moved[page]) for host, page in enumerate(used)]
    for at in range(4, 8):
        rows = []
        for s in sequences:
            row = manager.row(s, [-1], [m.Draw(slot=s.slot, at=at)])
            if restores:
                s.pages = [moved.get(page, page) for page in s.pages]
                row = m.Row(slot=s.slot, ids=[-1], start=row.start, pages=s.pages, draws=row.draws)
            rows.append(row)
        manager.run(rows, owners, restores=restores)
        restores = []
    for s in sequences:
        same(s, alone(model, s, 8))


def test_order_within_a_pass(model: Path) -> None:
    """One device page is offloaded, taken by a restored one, and that is copied, before a row overwrites its first cell."""
    runner = make_runner(model, host_pages=3)
    keys = runner.cache.layers[0].keys
    keys.copy_(torch.arange(float(len(keys))).view(-1, 1, 1, 1).expand_as(keys))
    runner.execute(m.Forward(step=0, rows=[], offloads=[(7, 1)]))
    row = m.Row(slot=0, ids=[5], start=0, pages=[3])
    opens = [m.Open(slot=0, sampling=None)]
    moves = {"offloads": [(3, 0)], "restores": [(1, 3)], "copies": [(3, 5)]}
    runner.execute(m.Forward(step=1, rows=[row], opens=opens, **moves))  # type: ignore[arg-type]
    assert keys[5].unique().tolist() == [7]
    assert keys[3, :, 1:].unique().tolist() == [7]
    assert not bool((keys[3, :, 0] == 7).any())
    runner.execute(m.Forward(step=2, rows=[], restores=[(0, 8)]))
    assert keys[8].unique().tolist() == [3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shared_prefixes(model: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six sequences go on from the same pages, two of them from each other's branch, one from elsewhere: with and without
    shared-prefix attention they get the same, with the kernels of this machine."""
    monkeypatch.setattr(sharing, "MEASURED", sharing.Thresholds(4, 4, 1))
    outputs = []
    for shared in (True, False):
        engine = EngineConfig(
            ipc_dir="", model_dir=str(model), parent_pid=0, device="cpu", dtype=dtype, kv_tokens=2048, shared_prefix=shared
        )  # fmt: skip
        runner = build_runner(engine)
        common, branch = prompt(1, 128), prompt(2, 64)
        prefixes = [common + branch] * 5 + [common] * 2 + [prompt(3, 130)]
        sequences = [Sequence_(slot, prefix + prompt(slot, 3), KINDS[slot % 3]) for slot, prefix in enumerate(prefixes)]
        owners = {s.slot: s for s in sequences}
        first = m.Row(slot=0, ids=sequences[0].prompt, start=0, pages=list(range(13)), draws=[m.Draw(slot=0, at=0)])
        start = m.Forward(step=0, rows=[first], opens=[s.open() for s in sequences])
        sequences[0].ids += runner.execute(start).ids
        rows, free = [], iter(range(13, 128))
        for s, prefix in zip(sequences[1:], prefixes[1:], strict=True):
            known = {192: 12, 128: 8}.get(len(prefix), 0)
            fresh = [next(free) for _ in range(13 - known)]
            ids = s.prompt[known * 16 :]
            draws = [m.Draw(slot=s.slot, at=0)]
            rows.append(m.Row(slot=s.slot, ids=ids, start=known * 16, pages=[*range(known), *fresh], draws=draws))
        forward = m.Forward(step=1, rows=rows)
        for at in range(1, 5):
            got = runner.execute(forward)
            drawn = [draw.slot for row in forward.rows for draw in row.draws]
            for slot, token, logprob in zip(drawn, got.ids, got.logprobs, strict=True):
                owners[slot].ids.append(token)
                owners[slot].logprobs.append(logprob)
            forward = m.Forward(
                step=at + 1,
                rows=[
                    m.Row(slot=s.slot, ids=[-1], start=len(s.prompt) + at - 1, draws=[m.Draw(slot=s.slot, at=at)])
                    for s in sequences
                ],
            )
            if at == 1:
                spy = flatten(forward.rows, runner.slots, 16, shared=shared).batch.runs
                assert [(len(run.rows), run.first, run.last) for run in spy] == (
                    [(7, 0, 8), (5, 8, 12)] if shared else []
                )
        outputs.append([(s.ids, s.logprobs) for s in sequences])
    for (ids, logprobs), (plain_ids, plain_logprobs) in zip(*outputs, strict=True):
        assert ids == plain_ids
        assert logprobs == pytest.approx(plain_logprobs, abs=1e-4 if dtype == "float32" else 0.05)


def test_scores(model: Path) -> None:
    """In the order of rows, beside a row that samples, whole and in parts."""
    runner = make_runner(model)
    manager = Manager(runner)
    ids = prompt(1, 23)
    s = Sequence_(5, prompt(2, 4), KINDS[0])
    parts = [m.Row(slot=0, ids=ids[:10], start=0, pages=[60, 61, 62], targets=ids[1:11])]
    rest = m.Row(slot=0, ids=ids[10:], start=10, pages=[63, 64, 65], first_page=3, targets=ids[11:])
    whole = m.Row(slot=1, ids=ids, start=0, pages=[70, 71, 72, 73, 74, 75], targets=ids[1:])
    opens = [m.Open(slot=slot, sampling=None) for slot in (0, 1)]
    first = manager.run(
        [parts[0], manager.row(s, s.prompt, [m.Draw(slot=5, at=0)]), whole], {5: s}, opens=[*opens, s.open()]
    )
    second = manager.run([rest], {})
    assert [len(scores) for scores in first.scores] == [10, 22]
    assert first.scores[0] + second.scores[0] == pytest.approx(first.scores[1], abs=1e-5)
    want = []
    for at in range(1, len(ids)):
        greedy = Sequence_(0, ids[:at], m.SamplingParams(temperature=0.0, logit_bias={ids[at]: 1000.0}, top_logprobs=1))
        got = alone(model, greedy, 1)
        assert got[0] == [ids[at]]
        plain = make_runner(model, slots=1).execute(
            m.Forward(
                step=0,
                rows=[
                    m.Row(
                        slot=0, ids=ids[:at], start=0, pages=list(range(-(-at // SIZE))), draws=[m.Draw(slot=0, at=0)]
                    )
                ],
                opens=[m.Open(slot=0, sampling=m.SamplingParams(temperature=0.0, top_logprobs=VOCAB))],
            )
        )
        want.append(dict(plain.top_logprobs[0])[ids[at]])
    assert first.scores[1] == pytest.approx(want, abs=1e-4)
    same(s, alone(model, s, 1))


def test_new_weights_and_bad_weights(model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    runner = make_runner(model)
    base = checksum(runner.decoder.export(None))
    adapted = runner.load(m.Load(source=m.Directory(path=str(adapters["a"])), version=1))
    assert adapted.error is None
    assert adapted.checksum != base
    for source, name in ((tmp_path / "nothing", ""), (model, "x"), (tmp_path / "nothing", "x")):
        refused = runner.load(m.Load(source=m.Directory(path=str(source)), version=2, adapter=name))
        assert refused.error
        assert refused.checksum == ("" if name else adapted.checksum)
    other = write_model(tmp_path / "other", seed=5)
    replaced = runner.load(m.Load(source=m.Directory(path=str(other)), version=3))
    assert replaced == m.Loaded(version=3, checksum=checksum(make_runner(other).decoder.export()))
    s = Sequence_(0, prompt(1, 9), KINDS[1])
    Manager(runner).generate([s], 5)
    same(s, alone(other, s, 5))


def test_sleep_and_wake(model: Path, adapters: dict[str, Path]) -> None:
    """No memory is left in the decoder, and every bit comes back, adapters' too."""
    runner = make_runner(model)
    runner.load(m.Load(source=m.Directory(path=str(adapters["a"])), version=1, adapter="a"))
    before = [checksum(runner.decoder.export(name)) for name in (None, "a")]
    bits = [tensor.clone() for tensor in runner.decoder.tensors()]
    for weights in (False, True, True):
        runner.release(m.Release(weights=weights))
        assert runner.cache.layers == []
        gc.collect()
        assert all(tensor.is_meta == weights for tensor in runner.decoder.tensors())
        assert runner.reclaim() == m.Acknowledged()
        assert [checksum(runner.decoder.export(name)) for name in (None, "a")] == before
        assert all(torch.equal(a, b) for a, b in zip(runner.decoder.tensors(), bits, strict=True))
    s = Sequence_(0, prompt(1, 9), KINDS[1], adapter="a")
    Manager(runner).generate([s], 5)
    same(s, alone(model, s, 5, adapters["a"]))
    loaded = runner.load(m.Load(source=m.Directory(path=str(adapters["b"])), version=2, adapter="a"))
    assert loaded.error is None


def test_weights_that_have_no_room_elsewhere_stay(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is released then, and the same passes give the same as before."""
    runner = make_runner(model)
    layers, bits = runner.cache.layers, [tensor.clone() for tensor in runner.decoder.tensors()]
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", lambda **_: io.FileIO("/dev/full", "r+"))
        answer = runner.release(m.Release(weights=True))
    assert "No space left" in (answer.error or "")
    assert runner.cache.layers is layers
    assert all(torch.equal(a, b) for a, b in zip(runner.decoder.tensors(), bits, strict=True))
    s = Sequence_(0, prompt(1, 9), KINDS[1])
    Manager(runner).generate([s], 5)
    same(s, alone(model, s, 5))
    assert runner.release(m.Release(weights=True)) == m.Acknowledged()
    assert runner.reclaim() == m.Acknowledged()


def test_weights_are_written_and_read_in_as_many_parts_as_the_system_likes(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small(io.FileIO):
        def write(self, data: Buffer) -> int:
            return super().write(memoryview(data)[:1000])

        def readinto(self, data: Buffer) -> int:
            return super().readinto(memoryview(data)[:700])

    runner = make_runner(model)
    bits = [tensor.clone() for tensor in runner.decoder.tensors()]
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Small(os.memfd_create("weights"), "r+b"))
    assert runner.release(m.Release(weights=True)) == m.Acknowledged()
    assert runner.reclaim() == m.Acknowledged()
    assert all(torch.equal(a, b) for a, b in zip(runner.decoder.tensors(), bits, strict=True))


def test_the_process_answers_in_order(model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """The loop itself, in a thread: several passes queued, a load between them, then the end."""
    import threading

    engine = EngineConfig(
        ipc_dir=str(tmp_path), model_dir=str(model), parent_pid=0, kv_tokens=256, page_size=SIZE, max_batch=2, device="cpu",
        host_kv_tokens=64,
    )  # fmt: skip
    with zmq.Context.instance().socket(zmq.PAIR) as socket:
        address = f"ipc://{tmp_path}/worker.ipc"
        socket.bind(address)
        thread = threading.Thread(target=serve, args=(engine, address), daemon=True)
        thread.start()

        def receive() -> m.FromWorker:
            assert socket.poll(60_000)
            return m.decode_from_worker(socket.recv())

        ready = receive()
        assert isinstance(ready, m.Ready)
        assert (ready.num_pages, ready.host_pages, ready.vocab_size, ready.eos_ids) == (64, 16, VOCAB, [2])
        assert ready.checksum == checksum(make_runner(model).decoder.export())
        s = Sequence_(1, prompt(3, 7), KINDS[1])
        draw = lambda at: [m.Draw(slot=1, at=at)]  # noqa: E731
        messages: list[m.ToWorker] = [
            m.Forward(
                step=1, opens=[s.open()], rows=[m.Row(slot=1, ids=s.prompt, start=0, pages=[4, 2], draws=draw(0))]
            ),
            m.Forward(step=2, rows=[m.Row(slot=1, ids=[-1], start=7, draws=draw(1))]),
            m.Forward(step=3, rows=[m.Row(slot=1, ids=[-1], start=8, pages=[9], first_page=2, draws=draw(2))]),
            m.Load(source=m.Directory(path=str(adapters["a"])), version=4, adapter="a"),
            m.Unload(adapter="a"),
            m.Release(weights=True),
            m.Reclaim(),
            m.Forward(step=4, rows=[]),
            m.Shutdown(),
        ]
        for message in messages:
            socket.send(m.encode(message))
        answers = [receive() for _ in messages[:-1]]
        thread.join(30)
        assert not thread.is_alive()
    kinds = [type(answer) for answer in answers]
    assert kinds == [m.Forwarded] * 3 + [m.Loaded] + [m.Acknowledged] * 3 + [m.Forwarded]
    passes = [answer for answer in answers if isinstance(answer, m.Forwarded)]
    assert [p.step for p in passes] == [1, 2, 3, 4]
    want = alone(model, s, 3)
    assert [token for p in passes for token in p.ids] == want[0]
    assert [x for p in passes for x in p.logprobs] == pytest.approx(want[1], abs=1e-4)


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ModelError, match="not served"):
        choose_device("meta")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no GPU"):
            choose_device("cuda:1")
