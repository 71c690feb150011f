"""A checkpoint is whole or not there, and training goes on from it as if it had never stopped."""

import hashlib
import shutil

import pytest
import torch

from lightning_rl.errors import ResumeError
from tests.integration.learning import LORA, STEPS, new_engine, one_rank, take_steps, tensors_of
from trainers.checkpoint import (
    TrainState,
    checkpoint_path,
    checkpoints,
    load_checkpoint,
    read_state,
    save_checkpoint,
)


@pytest.fixture(scope="module", autouse=True)
def _distributed():
    with one_rank():
        yield


def state_after(step):
    return TrainState(step=step, version=step + 1, world_size=1, history=[{"success": 0.5}])


@pytest.fixture(scope="module")
def saved(tiny_llama, tmp_path_factory):
    """Two checkpoints, after the first step and after the second."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    engine = new_engine(tiny_llama)
    for step in (0, 1):
        take_steps(engine, [step])
        save_checkpoint(engine, directory, state_after(step + 1), keep=2)
    engine.close()
    return directory


@pytest.mark.parametrize(("dtype", "lora"), [("float32", LORA), ("bfloat16", LORA), ("bfloat16", None)])
def test_going_on_from_a_checkpoint_changes_no_bit(tiny_llama, tmp_path, dtype, lora):
    """Weights, and random numbers; the engine that goes on started from other weights."""
    torch.manual_seed(11)
    straight = new_engine(tiny_llama, dtype, lora)
    take_steps(straight, [0, 1])
    save_checkpoint(straight, tmp_path, state_after(2), keep=1)
    numbers = torch.rand(5)
    take_steps(straight, range(2, STEPS))
    expected = tensors_of(straight)
    straight.close()
    resumed = new_engine(tiny_llama, dtype, lora, seed=7)
    torch.rand(3)
    load_checkpoint(resumed, checkpoint_path(tmp_path, 2))
    assert torch.equal(torch.rand(5), numbers)
    take_steps(resumed, range(2, STEPS))
    actual = tensors_of(resumed)
    resumed.close()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_holds_what_is_trained_and_what_the_loop_knows(saved):
    newest = checkpoints(saved)[-1]
    assert read_state(newest) == state_after(2)
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    assert size < 2_000_000  # 17,920 trained parameters of 3.4 million


def test_only_the_last_ones_are_kept(tiny_llama, tmp_path):
    engine = new_engine(tiny_llama)
    take_steps(engine, [0])
    for step in range(1, 5):
        save_checkpoint(engine, tmp_path, state_after(step), keep=2)
    engine.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00003", "step-00004"]


def test_a_checkpoint_that_was_being_written_is_not_one(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "checkpoints")
    shutil.copytree(directory / "step-00002", directory / ".step-00003.tmp")
    assert [path.name for path in checkpoints(directory)] == ["step-00001", "step-00002"]


def files_of(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_a_damaged_checkpoint_is_named_and_so_are_the_older_ones(tiny_llama, saved, tmp_path):
    """Whichever of its files is cut short, altered or gone; nothing older is taken instead."""
    engine = new_engine(tiny_llama)
    names = files_of(saved / "step-00002")
    assert len(names) >= 4
    for name in names:
        for damage in ("cut", "changed", "gone"):
            directory = shutil.copytree(saved, tmp_path / f"{name.replace('/', '-')}-{damage}")
            broken = directory / "step-00002"
            if damage == "cut":
                (broken / name).write_bytes((broken / name).read_bytes()[:-40])
            elif damage == "changed":
                content = bytearray((broken / name).read_bytes())
                content[len(content) // 2] ^= 1
                (broken / name).write_bytes(content)
            else:
                (broken / name).unlink()
            with pytest.raises(
                ResumeError, match=f"step-00002 cannot be read: .*{name if name != 'files.json' else ''}"
            ) as e:
                load_checkpoint(engine, broken)
            assert "step-00001" in e.value.hint
    engine.close()


def test_another_number_of_processes_is_refused(tiny_llama, saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "checkpoints")
    state = directory / "step-00002" / "state.json"
    digests = directory / "step-00002" / "files.json"
    before = hashlib.blake2b(state.read_bytes(), digest_size=16).hexdigest()
    state.write_text(state.read_text().replace('"world_size":1', '"world_size":2'))
    after = hashlib.blake2b(state.read_bytes(), digest_size=16).hexdigest()
    digests.write_text(digests.read_text().replace(before, after))
    engine = new_engine(tiny_llama)
    with pytest.raises(ResumeError, match="2 trainer processes") as caught:
        load_checkpoint(engine, directory / "step-00002")
    assert "train.world_size to 2" in caught.value.hint
    engine.close()
