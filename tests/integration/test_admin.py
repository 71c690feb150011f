"""The trainer's routes over real HTTP, against one and two scripted managers: what reaches the engine, and what of its
answers reaches the trainer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import httpx
import msgspec
import openai
import pytest

from lightning_rl.errors import PublishError, ServerError
from rollout_server import messages as m
from rollout_server.admin_client import AdminClient
from rollout_server.api.config import WebConfig
from tests.integration.scripted_manager import ScriptedManager, serving_web, tokens
from tests.integration.test_api import wait_for

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
BROADCAST = m.Broadcast(
    init_method="tcp://127.0.0.1:1",
    world_size=3,
    rank=1,
    backend="gloo",
    tensors=[m.TensorSpec(name="w", dtype="bfloat16", shape=[2, 3])],
    adapter_config={"r": 4},
)
SHARED = m.SharedMemory(block="/b", tensors=BROADCAST.tensors)


@dataclass
class Site:
    url: str
    managers: list[ScriptedManager]

    @property
    def admin(self) -> AdminClient:
        return AdminClient(self.url, "admin")

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="x", max_retries=0, timeout=60)

    def changes(self) -> list[list[m.ToManager]]:
        heard = [manager.changes[:] for manager in self.managers]
        for manager in self.managers:
            manager.changes.clear()
        return heard

    def post(self, path: str, body: object = None, key: str = "admin") -> httpx.Response:
        return httpx.post(
            f"{self.url}{path}",
            headers={"Authorization": f"Bearer {key}"},
            content=None if body is None else json.dumps(body),
        )


def finish_at_once(submit: m.Submit) -> list[m.FromManager]:
    return [tokens(submit, [100], "stop", index=at) for at in range(submit.n)]


@contextmanager
def serving(model_dir: Path, folder: Path, replicas: int) -> Iterator[Site]:
    folders = [folder / str(number) for number in range(replicas)]
    for each in folders:
        each.mkdir()

    def config(listen_fd: int) -> WebConfig:
        return WebConfig(
            ipc_dirs=[str(each) for each in folders],
            model_dir=str(model_dir),
            parent_pid=os.getpid(),
            kv_tokens=4096,
            served_name="tiny",
            aliases=["gpt-*"],
            listen_fd=listen_fd,
            admin_key="admin",
        )

    with ExitStack() as stack:
        managers = [ScriptedManager(each) for each in folders]
        for manager in managers:
            manager.script = finish_at_once
            stack.callback(manager.stop)
        yield Site(stack.enter_context(serving_web(config)), managers)


@pytest.fixture(scope="module", params=[1, 2])
def shared_site(
    request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    with serving(tiny_llama, tmp_path_factory.mktemp("site"), request.param) as running:
        yield running


@pytest.fixture
def site(shared_site: Site) -> Iterator[Site]:
    """Tests share the servers; they leave no adapters and meet managers as new."""
    yield shared_site
    for manager in shared_site.managers:
        manager.reset()
        manager.script = finish_at_once
    for entry in shared_site.client().models.list():
        if (entry.model_extra or {})["parent"] is not None:
            shared_site.admin.unload_adapter(entry.id)
    shared_site.changes()


@pytest.fixture
def two(tiny_llama: Path, tmp_path: Path) -> Iterator[Site]:
    """Servers of one's own, for tests of routing."""
    with serving(tiny_llama, tmp_path, 2) as running:
        yield running


@pytest.mark.parametrize("source", [m.Directory(path="/w"), SHARED])
def test_every_replica_loads_from_the_source(site: Site, source: m.WeightSource) -> None:
    assert site.admin.update_weights(source, 4, running="abort", expected_checksum="sum-4") == "sum-4"
    expected = m.UpdateWeights(request_id=ANY, source=source, version=4, running="abort")
    assert site.changes() == [[expected]] * len(site.managers)


def test_replicas_receive_a_broadcast_as_ranks_of_their_own(site: Site) -> None:
    site.admin.update_weights(BROADCAST, 4, adapter="b", running="keep")
    for number, (update,) in enumerate(site.changes()):
        assert update == m.UpdateWeights(
            request_id=ANY,
            source=msgspec.structs.replace(BROADCAST, rank=1 + number),
            version=4,
            adapter="b",
            running="keep",
        )


def test_a_broadcast_that_leaves_a_replica_out_is_refused(site: Site) -> None:
    with pytest.raises(ServerError, match="world size of at least"):
        site.admin.update_weights(msgspec.structs.replace(BROADCAST, world_size=len(site.managers)), 4)
    assert site.changes() == [[]] * len(site.managers)


def test_checksums_must_be_the_publishers_and_agree(two: Site) -> None:
    with pytest.raises(PublishError, match=r"live with checksum sum-1, expected was other"):
        two.admin.update_weights("/w", 1, expected_checksum="other")
    two.managers[1].checksum = "bits"
    with pytest.raises(ServerError, match=r"different weights.*sum-2.*bits-2"):
        two.admin.update_weights("/w", 2)
    told = two.post("/update_weights", {"path": "/w", "version": 3}).json()["error"]
    assert told["code"] == "replicas_disagree"


def test_refused_weights(site: Site) -> None:
    site.managers[-1].refuses[m.UpdateWeights] = m.Failed(
        request_id="", code="weights_rejected", message="no such file"
    )
    with pytest.raises(ServerError, match="no such file"):
        site.admin.update_weights("/w", 1)
    answer = site.post("/update_weights", {"path": "/w", "version": 1})
    expected = (400, "weights_rejected") if len(site.managers) == 1 else (500, "replicas_disagree")
    assert (answer.status_code, answer.json()["error"]["code"]) == expected
    answer = site.post("/v1/load_lora_adapter", {"lora_name": "refused", "lora_path": "/a"})
    assert answer.status_code == 400
    assert [entry.id for entry in site.client().models.list()] == ["tiny"]


@pytest.mark.parametrize(
    "body",
    [
        {"version": 1},
        {"version": 1, "path": "/w", "source": {"type": "directory", "path": "/w"}},
        {"version": 1, "source": {"type": "carrier_pigeon"}},
        {"version": 1, "source": {"type": "shared_memory", "block": "b"}},
        {"version": 1, "path": "/w", "running": "jump"},
        {
            "version": 1,
            "source": {"type": "shared_memory", "block": "b", "tensors": [], "adapter_config": {"r": 2**64}},
        },
        {"version": 1, "path": "/w", "made_up": 1},
        {"path": "/w"},
        {"version": 1, "path": "/w", "adapter": "tiny"},
    ],
)
def test_updates_that_make_no_sense(site: Site, body: dict[str, Any]) -> None:
    answer = site.post("/update_weights", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert site.changes() == [[]] * len(site.managers)


def test_adapters_come_serve_and_go(site: Site) -> None:
    admin, client = site.admin, site.client()
    assert admin.load_adapter("french", "/lora/french") == "sum-1"
    assert admin.load_adapter("gpt-x", "/lora/x", version=7) == "sum-7"
    assert admin.load_adapter("french", "/lora/better") == "sum-2"
    for heard in site.changes():
        assert [(u.adapter, u.version, u.source) for u in heard if isinstance(u, m.UpdateWeights)] == [
            ("french", 1, m.Directory(path="/lora/french")),
            ("gpt-x", 7, m.Directory(path="/lora/x")),
            ("french", 2, m.Directory(path="/lora/better")),
        ]
    listed = {entry.id: entry.model_extra for entry in client.models.list()}
    assert {name: (extra or {})["parent"] for name, extra in listed.items()} == {
        "tiny": None,
        "french": "tiny",
        "gpt-x": "tiny",
    }

    made = client.chat.completions.create(model="french", messages=HELLO, n=2)
    assert made.model == "french"
    assert client.completions.create(model="gpt-x", prompt="x").model == "gpt-x"  # before the alias gpt-*
    assert client.chat.completions.create(model="gpt-5", messages=HELLO).model == "tiny"
    submitted = [submit for manager in site.managers for submit in manager.submitted]
    assert sorted((submit.adapter, submit.n) for submit in submitted) == [("", 1), ("french", 2), ("gpt-x", 1)]
    assert admin.score([[1, 2]], adapter="french") == [[-2.0]]

    admin.unload_adapter("french")
    assert site.changes() == [[m.UnloadAdapter(request_id=ANY, adapter="french")]] * len(site.managers)
    with pytest.raises(openai.NotFoundError, match=r"'french' does not exist; .*gpt-x"):
        client.chat.completions.create(model="french", messages=HELLO)
    assert admin.load_adapter("french", "/lora/french") == "sum-3"  # a name's versions never come again


def test_adapter_routes_speak_vllms_names(site: Site) -> None:
    body = {"lora_name": "a", "lora_path": "/a"}
    assert site.post("/v1/load_lora_adapter", body).json() == {"lora_name": "a", "version": 1, "checksum": "sum-1"}
    again = site.post("/v1/load_lora_adapter", body)
    assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")
    assert site.post("/v1/load_lora_adapter", {**body, "load_inplace": True}).json()["version"] == 2
    for name in ("", "tiny"):
        assert site.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "/a"}).status_code == 400
    assert site.post("/v1/unload_lora_adapter", {"lora_name": "a"}).json() == {"lora_name": "a"}
    gone = site.post("/v1/unload_lora_adapter", {"lora_name": "a"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


def test_an_adapter_that_the_engine_lost_is_a_404(site: Site) -> None:
    for manager in site.managers:
        manager.script = lambda submit: [
            m.Failed(request_id=submit.request_id, code="model_not_found", message="no adapter")
        ]
    with pytest.raises(openai.NotFoundError, match="no adapter"):
        site.client().chat.completions.create(model="tiny", messages=HELLO)


def test_pause_and_sleep_reach_every_replica(site: Site) -> None:
    admin = site.admin
    admin.pause()
    admin.pause("abort")
    admin.resume()
    admin.sleep()
    admin.sleep(2)
    admin.wake_up()
    expected: list[m.ToManager] = [
        m.Pause(request_id=ANY, running="keep"),
        m.Pause(request_id=ANY, running="abort"),
        m.Resume(request_id=ANY),
        m.Sleep(request_id=ANY, level=1),
        m.Sleep(request_id=ANY, level=2),
        m.Wake(request_id=ANY),
    ]
    assert site.changes() == [expected] * len(site.managers)
    assert site.post("/pause").json() == {"paused": True, "mode": "keep"}
    for path, body in (("/pause", {"mode": "x"}), ("/sleep", {"level": 3}), ("/resume", {"a": 1})):
        assert site.post(path, body).status_code == 400


def test_stats_are_summed_and_can_check(two: Site) -> None:
    two.managers[0].stats = {"version": 3.0, "running": 2.0, "prefill_tokens": 10.0}
    two.managers[1].stats = {"version": 4.0, "running": 5.0, "prefill_tokens": 1.0}
    stats = two.admin.stats()
    assert (stats["running"], stats["prefill_tokens"], stats["version"], stats["replicas"]) == (7.0, 11.0, 3.0, 2.0)
    assert (stats["replica_0.running"], stats["replica_1.running"]) == (2.0, 5.0)
    two.managers[1].refuses[m.GetStats] = m.Failed(request_id="", code="integrity", message="page 3 leaked")
    with pytest.raises(ServerError, match="page 3 leaked"):
        two.admin.stats(check=True)
    key = {"Authorization": "Bearer admin"}
    assert httpx.get(f"{two.url}/stats?check=1", headers=key).status_code == 500
    assert httpx.get(f"{two.url}/stats?check=maybe", headers=key).status_code == 400


def test_all_of_it_needs_the_admin_key(site: Site) -> None:
    paths = [
        "update_weights",
        "v1/load_lora_adapter",
        "v1/unload_lora_adapter",
        "pause",
        "resume",
        "sleep",
        "wake_up",
        "score",
    ]
    for path in paths:
        assert site.post(f"/{path}", {}, key="x").status_code == 401
    for path in ("stats", "checksums"):
        assert httpx.get(f"{site.url}/{path}").status_code == 401


def test_checksums_of_the_live_weights(two: Site) -> None:
    assert two.admin.checksums() == {"base": "sum"}
    two.managers[1].checksum = "bits"
    with pytest.raises(ServerError, match="different weights"):
        two.admin.checksums()


def test_prefixes_stay_on_their_replica_and_load_is_given_back(two: Site) -> None:
    """Two long prompts settle on a replica each; their follow-ups go where they are."""
    client = two.client()
    prompts = [[at + 20 + number for at in range(200)] for number in (0, 500)]
    homes = []
    for round_ in range(4):
        for number, prompt in enumerate(prompts):
            client.completions.create(model="tiny", prompt=prompt + [7] * round_, n=16)
            (home,) = [at for at, manager in enumerate(two.managers) if manager.submitted]
            assert two.managers[home].submitted.pop().n == 16
            homes.append((number, home))
    assert len(set(homes)) == 2
    assert len({home for _, home in homes}) == 2


def test_a_busy_replica_sheds_and_a_cancelled_request_frees_its_place(two: Site) -> None:
    client = two.client()
    for manager in two.managers:
        manager.script = lambda submit: [tokens(submit, [100], index=at) for at in range(submit.n)]
    prompt = list(range(20, 220))
    streams = [client.completions.create(model="tiny", prompt=prompt, n=16, stream=True) for _ in range(3)]
    heard = [len(manager.submitted) for manager in two.managers]
    assert sorted(heard) == [1, 2]
    for stream in streams:
        next(iter(stream))
        stream.close()
    wait_for(lambda: sum(len(manager.cancelled) for manager in two.managers) == 3)
    for manager in two.managers:
        manager.submitted.clear()
        manager.script = finish_at_once
    for _ in range(4):
        client.completions.create(model="tiny", prompt=prompt, n=16)
    assert sorted(len(manager.submitted) for manager in two.managers) == [0, 4]


def test_the_last_replica_that_dies_fails_what_comes_next(two: Site) -> None:
    two.managers[1].stop()
    wait_for(lambda: "1" in str(httpx.get(f"{two.url}/health").json()))
    assert httpx.get(f"{two.url}/health").status_code == 200
    two.managers[0].stop()
    wait_for(lambda: httpx.get(f"{two.url}/health").status_code == 503)
    with pytest.raises(ServerError, match="went away"):
        two.admin.update_weights("/w", 1)
