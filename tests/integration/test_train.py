"""The circle end to end, on the smoke recipe: `lrl train` as a user starts it, killed in five places, resumed, compared."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rl.cli import main
from lightning_rl.ledger import Ledger
from lightning_rl.store import Store
from tests.forked import Forked
from trainers.run import latest_policy
from trainers.run_directory import RunDirectory, open_run

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "smoke.yaml"
WHOLE_RUN_S = 240

pytestmark = pytest.mark.timeout(900)


Process = subprocess.Popen[str] | Forked


def lrl(*arguments: object, cwd: Path) -> Forked:
    """`lrl` in a process that is there soon."""
    return Forked(list(map(str, arguments)), cwd, {**os.environ, "PYTHONPATH": str(ROOT)})


def lrl_from_scratch(*arguments: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """As a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_rl.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def here(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object, **environment: str) -> int:
    """`lrl` in this process, which has imported all that a process of its own would import first."""
    monkeypatch.chdir(folder)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return main(list(map(str, arguments)))


def finish(process: Process) -> str:
    output, _ = process.communicate(timeout=WHOLE_RUN_S)
    return output


def until(process: Process, words: str) -> str:
    """Read until a line has the words."""
    seen = []
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(line)
        if words in line:
            return "".join(seen)
    raise AssertionError(f"{words!r} never came:\n{''.join(seen)}")


def descendants(pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, todo = set(), [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            found.add(child)
            todo.append(child)
    return found


def gone(pids: set[int], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that nobody interrupts, with W&B offline."""
    home = tmp_path_factory.mktemp("whole")
    process = lrl_from_scratch("train", RECIPE, "tracking.wandb.mode=offline", cwd=home, WANDB_MODE="offline")
    output = finish(process)
    assert process.returncode == 0, output
    return open_run(home / "runs" / "smoke")


def test_a_run_leaves_what_it_promises(whole: RunDirectory) -> None:
    summary = json.loads(whole.summary.read_text())
    for label in ("base", "warm_start", "final"):
        score = summary[f"success_{label}"]
        assert score["n"] == 4
        assert score["ci95"][0] <= score["value"] <= score["ci95"][1]
    assert summary["steps"] == 3
    assert summary["seed"] == 0
    assert {"evaluate", "warm_start", "rollout", "train", "publish"} <= summary["seconds"].keys()
    assert summary["rollout_tokens_per_second"] > 0
    assert summary["train_tokens_per_second"] > 0
    lines = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    assert [line["evaluation"] for line in lines if "evaluation" in line] == ["base", "warm_start", "final"]
    rows = [line for line in lines if "evaluation" not in line]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["gradient_norm"] > 0 for row in rows)
    assert all(row["logprob_gap"]["published"] < 1e-3 for row in rows)
    assert [row["policy_version"] for row in rows] == [2, 3, 4]
    assert whole.curve.read_bytes().startswith(b"\x89PNG")
    assert list(whole.path.glob("wandb/offline-run-*"))


def test_every_sampled_token_is_accounted_for(whole: RunDirectory) -> None:
    summary = json.loads(whole.summary.read_text())
    ledger = Ledger.from_dict(summary["ledger"])
    ledger.check("run")
    with Store.open(whole.store) as store:
        calls = [call for episode in store.episodes(phase="train") for call in episode.calls]
    assert ledger.sampled == sum(len(call.sampled_ids) for call in calls) > 0
    assert ledger.trained > 0
    for call in calls:
        assert len(call.sampled_ids) == len(call.logprobs) == len(call.versions)


def test_each_step_was_sampled_from_the_policy_before_it(whole: RunDirectory) -> None:
    with Store.open(whole.store) as store:
        for step in range(3):
            versions = {v for e in store.episodes(phase="train", step=step) for c in e.calls for v in c.versions}
            assert versions == {step + 1}


def test_eval_measures_the_same_policy_the_same(whole: RunDirectory, tmp_path: Path) -> None:
    process = lrl("eval", whole.path, cwd=tmp_path)
    output = finish(process)
    assert process.returncode == 0, output
    final = json.loads(whole.summary.read_text())["success_final"]
    again = json.loads((open_run(tmp_path / "runs" / "smoke-eval").summary).read_text())["success"]
    assert again == final


def test_export_is_a_checkpoint_that_transformers_loads(
    whole: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert here(tmp_path, monkeypatch, "export", whole.path, "--out", tmp_path / "merged") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    with Store.open(whole.store) as store:
        call = store.episodes(phase="eval-final")[0].calls[0]
    ids = torch.tensor([call.prompt_ids + call.sampled_ids])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    assert logprobs[-len(call.sampled_ids) :].tolist() == pytest.approx(call.logprobs, abs=1e-4)
    assert tokenizer.decode(call.prompt_ids).startswith("<|im_start|>system")


def test_replaying_a_run_makes_its_policy_again_bit_for_bit(whole: RunDirectory, tmp_path: Path) -> None:
    words = ["replay", whole.path, "--train", "--out", "again", "--json", "steps.json"]
    process = lrl("traces", *words, cwd=tmp_path)
    output = finish(process)
    assert process.returncode == 0, output
    steps = [json.loads(line) for line in (tmp_path / "steps.json").read_text().splitlines()]
    lived = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    lived = [line for line in lived if "evaluation" not in line]
    for replayed, live in zip(steps, lived, strict=True):
        assert all(call["then"] == call["now"] for e in replayed["episodes"] for call in e["calls"].values())
        assert replayed["ledger"]["now"] == live["ledger"]
        assert (replayed["train"]["loss"], replayed["train"]["gradient_norm"]) == (live["loss"], live["gradient_norm"])
    ours, theirs = (load_file(latest_policy(run) / "adapter_model.safetensors")
                    for run in (open_run(tmp_path / "again"), whole))  # fmt: skip
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours), "the replayed run has other weights"


def test_traces_shows_what_happened(
    whole: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here(tmp_path, monkeypatch, "traces", "list", whole.path, COLUMNS="200") == 0
    assert "eval-final" in capsys.readouterr().out
    with Store.open(whole.store) as store:
        episode = store.episodes(phase="train", step=0)[0]
    assert here(tmp_path, monkeypatch, "traces", "show", whole.path, episode.id, COLUMNS="200") == 0
    output = capsys.readouterr().out
    assert episode.id in output
    assert "vowels" in output


def test_killed_five_times_and_resumed_it_is_the_same_run(whole: RunDirectory, tmp_path: Path) -> None:
    moments = ["evaluate: base", "warm start", "step 1/3: rollout", "step 2/3: train", "step 3/3: publish"]
    process = lrl("train", RECIPE, cwd=tmp_path)
    for moment in moments:
        until(process, moment)
        time.sleep(0.3)
        family = descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert gone(family), "a process outlived lrl"
        process = lrl("train", "--resume", "runs/smoke", cwd=tmp_path)
    output = finish(process)
    assert process.returncode == 0, output
    run = open_run(tmp_path / "runs" / "smoke")

    Ledger.from_dict(json.loads(run.summary.read_text())["ledger"]).check("resumed run")
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert sorted(line["evaluation"] for line in lines if "evaluation" in line) == ["base", "final", "warm_start"]
    rows = [line for line in lines if "evaluation" not in line]
    assert [row["step"] for row in rows] == [1, 2, 3], "a step was lost or taken twice"
    with Store.open(run.store) as store:
        counted = [(e.start.step, e.start.task.id, e.start.sample) for e in store.episodes(phase="train") if e.counted]
    assert len(counted) == len(set(counted)) == 3 * 2 * 4
    ours, theirs = (load_file(r.published / "v00004" / "adapter_model.safetensors") for r in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours), "the resumed run has other weights"


SHORT = ["warm_start=null", "train.steps=2", "evaluate.tasks=2"]


def run_short(home: Path, *overrides: str) -> RunDirectory:
    home.mkdir()
    process = lrl("train", RECIPE, *SHORT, *overrides, cwd=home)
    output = finish(process)
    assert process.returncode == 0, output
    return open_run(home / "runs" / "smoke")


def test_two_ranks_are_as_one_whichever_process_dies(tmp_path: Path) -> None:
    """A dead worker is replaced; a dead rank and a dead manager end the run with words."""
    one = run_short(tmp_path / "one")
    (tmp_path / "two").mkdir()
    process = lrl("train", RECIPE, *SHORT, "train.world_size=2", cwd=tmp_path / "two")
    until(process, "step 1/2: rollout")
    kill(process, "worker.process")
    until(process, "step 2/2: rollout")
    kill(process, "trainers.ranks")
    output = finish(process)
    assert process.returncode == 2
    assert "trainer rank 1 ended with code -9" in output
    assert "go on with: lrl train --resume" in output
    process = lrl("train", "--resume", "runs/smoke", cwd=tmp_path / "two")
    until(process, "step 2/2: train")
    kill(process, "manager.process")
    output = finish(process)
    assert process.returncode == 2
    assert "manager process ended with signal 9" in output
    assert "lrl train --resume runs/smoke" in output.replace("\n", " ")
    resumed = lrl("train", "--resume", "runs/smoke", cwd=tmp_path / "two")
    output = finish(resumed)
    assert resumed.returncode == 0, output
    two = open_run(tmp_path / "two" / "runs" / "smoke")
    ours, theirs = (load_file(run.published / "v00003" / "adapter_model.safetensors") for run in (two, one))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-5), name


def test_full_fine_tuning_with_one_setting(tmp_path: Path, tiny_llama: Path) -> None:
    run = run_short(tmp_path / "full", "train.lora=null")
    first, second = (load_file(run.published / f"v0000{version}" / "model.safetensors") for version in (2, 3))
    before = load_file(tiny_llama / "model.safetensors")
    assert "model.layers.0.mlp.down_proj.weight" in first
    assert any(not first[name].equal(before[name]) for name in first)
    assert any(not second[name].equal(first[name]) for name in first), "the second step was not published"


def kill(run: Process, what: str) -> None:
    """The one process below it that has this in its command."""
    (pid,) = [pid for pid in descendants(run.pid) if what in command(pid)]
    os.kill(pid, signal.SIGKILL)


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
    except OSError:
        return ""


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = lrl("train", RECIPE, "warm_start=null", cwd=tmp_path)
    until(process, "evaluate: base")
    family = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "lrl train --resume" in output
    assert gone(family)


def test_a_process_that_outlives_its_time_is_ended(tmp_path: Path) -> None:
    """Here what ends runs that hang, lest a suite wait for them."""
    process = lrl("serve", "--model", "tiny-llama", "--port", "0", "--threads", 1, cwd=tmp_path)
    until(process, "serving")
    family = descendants(process.pid)
    with pytest.raises(AssertionError, match=r"goes on after 0\.5 s"):
        process.communicate(timeout=0.5)
    assert process.returncode == -signal.SIGKILL
    assert gone(family)


def test_an_unreadable_checkpoint_is_named(whole: RunDirectory, tmp_path: Path) -> None:
    copy = tmp_path / "runs" / "smoke" / "copy"
    shutil.copytree(whole.path, copy, ignore=shutil.ignore_patterns("wandb"))
    newest = sorted((copy / "checkpoints").glob("step-*"))[-1]
    for file in newest.rglob("*.pt"):
        file.write_bytes(b"torn")
    process = lrl("train", "--resume", copy, cwd=tmp_path)
    output = " ".join(finish(process).split())
    assert process.returncode == 2
    assert newest.name in output
    assert "step-00002" in output, "the older complete checkpoint is not named"


def test_two_processes_cannot_share_a_run(
    whole: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; from pathlib import Path; from trainers.run_directory import open_run\n"
    code += "with open_run(Path(sys.argv[1])).lock(): print('locked', flush=True); sys.stdin.read()"
    before = signal.getsignal(signal.SIGTERM)
    with subprocess.Popen(
        [sys.executable, "-c", code, whole.path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            until(other, "locked")
            assert here(tmp_path, monkeypatch, "train", "--resume", whole.path) == 2
        finally:
            signal.signal(signal.SIGTERM, before)
            other.kill()
    assert "in use" in capsys.readouterr().err


def test_a_broken_recipe_fails_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.yaml"
    text = RECIPE.read_text().replace("agents/", f"{RECIPE.parent}/agents/").replace("learning_rate", "learning_rat", 1)
    broken.write_text(text)
    assert here(tmp_path, monkeypatch, "train", broken) == 2
    output = capsys.readouterr().err
    assert "broken.yaml:" in output
    assert "did you mean 'learning_rate'" in output
    assert not (tmp_path / "runs").exists()
