"""Kill processes of a rollout at random, go on, and see what the store says: `python -m tests.chaos --kills 50`.

A driver (server, store, runner pool) plays a fixed set of episodes of a small agent. Whatever process the dice choose is killed
with SIGKILL: the driver itself, the fork server, an agent, web, manager or worker; a database crashes and starts again. A driver
that ends is started again on the same store. What must hold is in `verify`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil

from lightning_rl.episode import Episode, EpisodeStart, Outcome, Sampling, Task
from lightning_rl.store import Store
from tests.postgres import PostgresServer

ROOT = Path(__file__).parents[1]
AGENT = """
import json, os, time
from pathlib import Path
from openai import OpenAI

def solve(task):
    client = OpenAI(max_retries=0, timeout=30)
    messages = [{"role": "user", "content": task["question"]}]
    for _ in range(3):
        said = client.chat.completions.create(model="policy", messages=messages, max_tokens=8)
        with open(task["seen"], "a") as seen:
            seen.write(os.environ["OPENAI_BASE_URL"].split("/e/")[1].split("/")[0] + " " + said.id + "\\n")
        messages += [said.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "And then?"}]
        time.sleep(0.05)
    return len(messages)

def score(task, episode):
    return {"calls": len(episode.calls)}
"""
WAIT_S = (0.3, 2.0)
"""Between a driver that plays and the next kill."""


def starts(folder: Path, episodes: int) -> list[EpisodeStart]:
    from trainers.runner.pool import episode_id

    return [
        EpisodeStart(
            id=episode_id("train", 0, f"t{number // 4}", number % 4),
            task=Task(id=f"t{number // 4}", input={"question": f"Number {number}?", "seen": str(folder / "seen.txt")}),
            phase="train",
            sample=number % 4,
            group=f"t{number // 4}",
            sampling=Sampling(temperature=1.0, seed=number),
        )
        for number in range(episodes)
    ]


def drive(folder: Path, store_url: str, episodes: int) -> None:
    """The process that is killed and started again."""
    from rollout_server.launch import RolloutServer
    from rollout_server.models.catalog import resolve_model
    from trainers.runner.pool import RunnerPool

    model = resolve_model("tiny-llama")
    with (
        Store.open(store_url) as store,
        RolloutServer(
            model, "policy", "float32", log_dir=folder, store=store_url, kv_tokens=8192, threads=1, device="cpu"
        ) as server,
        RunnerPool(
            agent_function=(folder / "agent.py", "solve"),
            reward_function=(folder / "agent.py", "score"),
            store=store,
            server_url=server.base_url,
            concurrency=4,
            timeout_s=60,
            max_attempts=1000,
        ) as pool,
    ):
        print(json.dumps({"pids": server.pids}), flush=True)
        pool.run(starts(folder, episodes), check=server.check)
    print("done", flush=True)


@dataclass
class Chaos:
    folder: Path
    store_url: str
    episodes: int
    dice: random.Random
    database: PostgresServer | None = None
    """Its server is among the victims, and started again."""
    killed: Counter[str] = field(default_factory=Counter)
    settled: dict[str, bytes] = field(default_factory=dict)
    """Episodes that the store has shown as ended, by id: they must stay as they were."""

    def run(self, kills: int, say: Callable[[str], None]) -> None:
        (self.folder / "agent.py").write_text(AGENT)
        driver = self._start()
        while self.killed.total() < kills:
            time.sleep(self.dice.uniform(*WAIT_S))
            if driver.poll() is None:
                if self.database is not None and (self.killed.total() == 0 or self.dice.random() < 0.3):
                    self._crash(self.database)
                else:
                    self._kill_one(driver.pid)
                say(f"{self.killed.total()}/{kills} killed: {dict(self.killed)}")
                time.sleep(0.2)
            self._look()
            if driver.poll() is not None:
                if self._all_settled():
                    return
                driver = self._start()
        while driver.wait(timeout=300) != 0:
            driver = self._start()
        self._look()

    def _start(self) -> subprocess.Popen[str]:
        arguments = ["--drive", str(self.folder), "--store", self.store_url, "--episodes", str(self.episodes)]
        with (self.folder / "driver.log").open("a") as log:
            driver = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos", *arguments],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert driver.stdout is not None
        driver.stdout.readline()  # it plays, or it has ended
        return driver

    def _kill_one(self, driver: int) -> None:
        family = {"driver": [driver]}
        for process in psutil.Process(driver).children(recursive=True):
            try:
                family.setdefault(_role(process), []).append(process.pid)
            except psutil.NoSuchProcess:
                continue
        role = self.dice.choice(sorted(family))
        victim = self.dice.choice(family[role])
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.killed[role] += 1

    def _crash(self, database: PostgresServer) -> None:
        database.stop("immediate")
        time.sleep(self.dice.uniform(0, 1))
        database.start()
        self.killed["database"] += 1

    def _look(self) -> None:
        with Store.open(self.store_url) as store:
            found = {episode.id: episode for episode in store.episodes()}
        for episode_id, digest in self.settled.items():
            assert _digest(found[episode_id]) == digest, f"{episode_id} has changed after its end"
        self.settled |= {i: _digest(episode) for i, episode in found.items() if episode.outcome is not None}

    def _all_settled(self) -> bool:
        with Store.open(self.store_url) as store:
            return sum(summary.counted for summary in store.starts()) == self.episodes

    def verify(self) -> dict[str, int]:
        """Raises AssertionError; what was counted otherwise."""
        with Store.open(self.store_url) as store:
            episodes = store.episodes()
        counted = [episode for episode in episodes if episode.counted]
        places = Counter((episode.start.task.id, episode.start.sample) for episode in counted)
        assert len(places) == self.episodes, "a task's sample has no attempt that counts"
        assert set(places.values()) == {1}, "a sample counts twice"
        assert all(episode.outcome is not None for episode in episodes), "an attempt without an outcome"
        assert all(e.outcome is Outcome.COMPLETED and e.answer == 7 and len(e.calls) == 3 for e in counted)
        assert all([reward.value for reward in episode.rewards] == [3.0] for episode in counted)
        stored = {(episode.id, call.response_id) for episode in episodes for call in episode.calls}
        lines = (self.folder / "seen.txt").read_text().splitlines()
        seen = {tuple(line.split()) for line in lines if len(line.split()) == 2}
        assert seen <= stored, f"replies that agents saw are not in the store: {sorted(seen - stored)[:3]}"
        ids = [call.id for episode in episodes for call in episode.calls]
        assert len(ids) == len(set(ids))
        return {"episodes": len(counted), "attempts": len(episodes), "replies seen": len(seen), "calls": len(ids)}


def _role(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    for mark, role in (
        ("rollout_server.api.process", "web"),
        ("rollout_server.manager.process", "manager"),
        ("rollout_server.worker.process", "worker"),
    ):
        if mark in line:
            return role
    if "trainers.runner.fork_server" in line:
        parent = process.parent()
        above = " ".join(parent.cmdline()) if parent else ""
        return "agent" if "trainers.runner.fork_server" in above else "fork server"
    return "other"


def _digest(episode: Episode) -> bytes:
    return msgspec.json.encode(episode)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--episodes", type=int, default=0, help="0: enough for the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", default="")
    parser.add_argument("--drive", type=Path)
    options = parser.parse_args()
    if options.drive is not None:
        drive(options.drive, options.store, options.episodes)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = options.store or str(Path(folder) / "episodes.db")
        chaos = Chaos(Path(folder), store, options.episodes or 100 + 30 * options.kills, random.Random(options.seed))
        chaos.run(options.kills, lambda line: print(line, flush=True))
        print(chaos.verify(), dict(chaos.killed))


if __name__ == "__main__":
    main()
