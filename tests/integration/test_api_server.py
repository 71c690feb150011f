"""The whole server as `launch` starts it: three processes, the real engine, the tiny model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_rl.episode import EpisodeStart, Sampling, Task
from lightning_rl.errors import ServerError
from lightning_rl.store import Store
from rollout_server.launch import RolloutServer

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(tiny_llama: Path, folder: Path) -> Iterator[RolloutServer]:
    store = folder / "episodes.db"
    with RolloutServer(
        tiny_llama, "tiny-llama", "float32", log_dir=folder, store=store, aliases=["*"], kv_tokens=8192, threads=1
    ) as running:
        yield running


def client(server: RolloutServer, episode: str | None = None) -> openai.OpenAI:
    prefix = f"/e/{episode}" if episode else ""
    return openai.OpenAI(base_url=f"{server.base_url}{prefix}/v1", api_key="x", max_retries=0, timeout=60)


def test_records_are_what_the_engine_scores(server: RolloutServer, folder: Path) -> None:
    """Sampled, recorded and scored log-probs agree, and the second turn extends the first token for token."""
    with Store.open(folder / "episodes.db") as store:
        task = Task(id="t", input={})
        store.begin(EpisodeStart(id="ep", task=task, phase="train", sampling=Sampling(seed=1, max_tokens=12)))
        messages = list(HELLO)
        for stream in (False, True):
            made: Any = client(server, "ep").chat.completions.create(model="gpt", messages=messages, stream=stream)
            text = (
                "".join(chunk.choices[0].delta.content or "" for chunk in made)
                if stream
                else made.choices[0].message.content
            )
            messages += [{"role": "assistant", "content": text}, *HELLO]
        first, second = store.episode("ep").calls
    said = first.prompt_ids + first.sampled_ids
    assert second.prompt_ids[: len(said)] == said
    assert second.parent_id == first.id
    assert second.cached_tokens > 0
    for call in (first, second):
        assert len(call.sampled_ids) == len(call.logprobs) == 12
        (scores,) = server.admin().score([call.prompt_ids + call.sampled_ids])
        assert call.logprobs == pytest.approx(scores[len(call.prompt_ids) - 1 :], abs=1e-4)


@pytest.mark.parametrize(("asked", "imposed"), [(0, 0), (2, 0), (0, 3), (5, 3)])
def test_entropies_and_alternatives_are_recorded(
    server: RolloutServer, folder: Path, tiny_llama: Path, asked: int, imposed: int
) -> None:
    """As many alternatives as the agent or the recipe asks for; the agent gets no more than it asked for."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    name = f"likeliest-{asked}-{imposed}"
    sampling = Sampling(seed=1, max_tokens=12, temperature=0.7, top_logprobs=imposed or None)
    wanted: dict[str, Any] = {"logprobs": True, "top_logprobs": asked} if asked else {}
    with Store.open(folder / "episodes.db") as store:
        store.begin(EpisodeStart(id=name, task=Task(id="t", input={}), phase="train", sampling=sampling))
        made = client(server, name).chat.completions.create(model="gpt", messages=HELLO, **wanted)
        (call,) = store.episode(name).calls
    with torch.inference_mode():
        logits = model(torch.tensor([call.prompt_ids + call.sampled_ids])).logits[0, len(call.prompt_ids) - 1 : -1]
    every = torch.log_softmax(logits / 0.7, -1)
    assert call.entropies == pytest.approx(torch.special.entr(every.exp()).sum(-1).tolist(), abs=1e-4)
    most = max(asked, imposed)
    assert len(call.alternatives) == (12 if most else 0)
    for likeliest, row in zip(call.alternatives, every, strict=False):
        assert [i for i, _ in likeliest] == row.topk(most).indices.tolist()
        assert [x for _, x in likeliest] == pytest.approx(row.topk(most).values.tolist(), abs=1e-4)
    told = made.choices[0].logprobs
    if asked:
        assert told is not None
        for token, likeliest in zip(told.content or [], call.alternatives, strict=True):
            assert [top.logprob for top in token.top_logprobs] == [x for _, x in likeliest[:asked]]
    else:
        assert told is None


def test_seeds_decide_whatever_else_runs(server: RolloutServer) -> None:
    def ask(seed: int) -> str:
        made = client(server).chat.completions.create(model="gpt", messages=HELLO, seed=seed, max_tokens=16)
        return made.choices[0].message.content or ""

    alone = [ask(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, [0, 1, 2, 3, 0, 1, 2, 3]))
    assert together == alone + alone
    assert len(set(alone)) == 4


def test_a_client_that_goes_away_frees_its_pages(server: RolloutServer) -> None:
    before = server.admin().stats()["sampled_tokens"]
    stream = client(server).chat.completions.create(
        model="gpt", messages=HELLO, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_for(lambda: server.admin().stats()["running"] == 0)
    assert server.admin().stats()["sampled_tokens"] - before < 2000


def test_new_weights_are_live_and_versioned(server: RolloutServer, tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    ids = list(range(20, 60))
    (before,) = server.admin().score([ids])
    weights = load_file(tiny_llama / "model.safetensors")
    save_file({name: w + 0.05 * torch.randn_like(w) for name, w in weights.items()}, tmp_path / "model.safetensors")
    changed = server.admin().update_weights(tmp_path, 1)
    (after,) = server.admin().score([ids])
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1e-2
    made = client(server).chat.completions.create(
        model="gpt", messages=HELLO, max_tokens=3, extra_body={"return_token_ids": True}
    )
    assert (made.choices[0].model_extra or {})["weight_versions"] == [{"version": 1, "start": 0, "end": 3}]
    with pytest.raises(ServerError, match="nowhere"):
        server.admin().update_weights(tmp_path / "nowhere", 2)
    assert server.admin().update_weights(tiny_llama, 2) != changed
    assert server.admin().score([ids])[0] == pytest.approx(before, abs=1e-5)


def test_a_port_in_use_is_said_before_anything_starts(server: RolloutServer, tiny_llama: Path, tmp_path: Path) -> None:
    port = int(server.base_url.rsplit(":", 1)[1])
    with pytest.raises(ServerError, match=f"port {port} .*in use") as caught:
        RolloutServer(tiny_llama, "tiny", "float32", log_dir=tmp_path, port=port).start()
    assert caught.value.hint is not None
    with pytest.raises(ServerError, match="without an API key"):
        RolloutServer(tiny_llama, "tiny", "float32", log_dir=tmp_path, host="0.0.0.0")


def test_a_process_that_cannot_start_is_named_with_its_last_words(tiny_llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (broken / name).symlink_to(tiny_llama / name)
    (broken / "model.safetensors").write_bytes(b"nonsense")
    server = RolloutServer(broken, "broken", "float32", log_dir=tmp_path)
    with pytest.raises(ServerError, match=r"(?s)worker process ended .*last words:\n.*Error"):
        server.start()
    assert server.pids == {}


@pytest.mark.parametrize("name", ["web", "manager"])
def test_a_dead_process_is_noticed_and_close_ends_the_others(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    """A dead worker is not the end: see `test_restart`."""
    with RolloutServer(tiny_llama, "tiny", "float32", log_dir=tmp_path, kv_tokens=1024, threads=1) as server:
        pids = server.pids
        assert list(pids) == ["manager", "web", "worker"]
        server.check()
        os.kill(pids[name], signal.SIGKILL)
        wait_for(lambda: not _runs(server.check))
        with pytest.raises(ServerError, match=f"{name} process ended with signal 9"):
            server.check()
    wait_for(lambda: not any(map(_alive, pids.values())))


def test_serve_prints_where_and_no_process_outlives_it(tmp_path: Path) -> None:
    code = "import sys; from lightning_rl.cli import main; sys.exit(main())"
    arguments = ["serve", "--model", "tiny-llama", "--port", "0", "--threads", "1", "--log-dir", str(tmp_path)]
    for how in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        line = next(line for line in process.stdout if "serving" in line)
        url = line.split(" at ")[1].split("/v1")[0]
        assert "curl" in process.stdout.readline()
        assert httpx.get(f"{url}/health").status_code == 200
        children = _children(process.pid)
        children += [worker for child in children for worker in _children(child)]
        assert len(children) == 3
        os.killpg(process.pid, how)
        assert process.wait(60) == (0 if how == signal.SIGINT else -how)
        wait_for(lambda children=children: not any(map(_alive, children)))  # type: ignore[misc]
        process.stdout.close()


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def _runs(check: Callable[[], None]) -> bool:
    try:
        check()
    except ServerError:
        return False
    return True


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sockets_are_private(server: RolloutServer) -> None:
    engine = server._directory / "0"
    for directory in (server._directory, engine):
        assert directory.stat().st_mode & 0o777 == 0o700
        assert (directory / "config.json").stat().st_mode & 0o077 == 0
    names = {path.name for path in engine.iterdir()}
    assert names <= {"config.json", "web.ipc", "worker-0.ipc", "worker.pid", "weights"}
    with socket.create_connection(("127.0.0.1", int(server.base_url.rsplit(":", 1)[1]))):
        pass
