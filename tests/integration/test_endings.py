"""What clients' SDKs and the administrator are told when something goes wrong for good, or takes its time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import anthropic
import openai
import pytest

from rollout_server import messages as m
from rollout_server.api.front.limits import Limits
from tests.integration.served_web import Served, at_once, eventually, served


@pytest.fixture(scope="module")
def web(tiny_llama: Path) -> Iterator[Served]:
    with served(tiny_llama) as running:
        yield running


@pytest.fixture(autouse=True)
def as_new(web: Served) -> None:
    web.manager.reset()
    web.manager.script = at_once


def test_sdks_do_not_send_again_what_killed_workers(web: Served) -> None:
    web.manager.script = lambda submit: [
        m.Failed(request_id=submit.request_id, code="worker_failed", message="the worker died twice")
    ]
    with pytest.raises(openai.InternalServerError) as caught:
        openai.OpenAI(base_url=f"{web.url}/v1", api_key="x", max_retries=2).completions.create(model="tiny", prompt="a")
    assert caught.value.status_code == 503
    assert "retry-after" not in caught.value.response.headers
    assert len(web.manager.submitted) == 1
    with pytest.raises(anthropic.InternalServerError):
        anthropic.Anthropic(base_url=web.url, api_key="x", max_retries=2).messages.create(
            model="tiny", max_tokens=4, messages=[{"role": "user", "content": "hello"}]
        )
    assert len(web.manager.submitted) == 2


def test_what_passes_is_sent_again(web: Served) -> None:
    web.manager.script = lambda submit: [
        m.Failed(request_id=submit.request_id, code="weights_lost", message="publish them")
    ]
    answer = web.post()
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert "x-should-retry" not in answer.headers


def test_what_the_administrator_asks_for_takes_as_long_as_it_takes(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tiny_llama, limits=Limits(request_timeout_s=0.5)) as hasty:
        answers = hasty.manager._answers

        def slowly(message: m.ToManager) -> list[m.FromManager]:
            if isinstance(message, m.UpdateWeights):
                time.sleep(1.2)
            return answers(message)

        monkeypatch.setattr(hasty.manager, "_answers", slowly)
        admin = {"authorization": "Bearer admin"}
        body = {"lora_name": "slow", "lora_path": "/a"}
        assert hasty.post("/v1/load_lora_adapter", body, headers=admin).status_code == 200
        assert "slow" in hasty.services.engine.adapters
        assert hasty.post("/v1/unload_lora_adapter", {"lora_name": "slow"}, headers=admin).status_code == 200


def test_an_adapter_whose_loader_hung_up_is_known(web: Served) -> None:
    with web.connect() as line:
        body = b'{"lora_name": "left", "lora_path": "/a"}'
        head = f"POST /v1/load_lora_adapter HTTP/1.1\r\nhost: x\r\nauthorization: Bearer admin\r\ncontent-length: {len(body)}"
        line.sendall(head.encode() + b"\r\n\r\n" + body)
    eventually(lambda: "left" in web.services.engine.adapters)


def test_lrl_eval_is_ended_in_order_by_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    from trainers import run

    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run, "load_recipe", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        signal.signal(signal.SIGTERM, lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            run.evaluate_policy(Path("some.yaml"), [], None)
    finally:
        signal.signal(signal.SIGTERM, before)
