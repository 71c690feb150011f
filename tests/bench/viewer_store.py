"""A large episode store for the viewer's benches and browser tests: as a long run of several agents leaves it, made in bulk.

Written row by row past `Store`, which would take half an hour for a million calls; what is read is the same, differences to
earlier calls included. The content is the same for the same numbers.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lightning_rl.store import Store

TASKS, SAMPLES = 32, 8
"""Of each step."""
VOCABULARY = 5000
STARTED = 1_750_000_000.0
AGENTS = ("planner", "researcher", "critic")
TOOLS = ("search", "calculator", "read_file")
_SYSTEM = {
    "planner": "You plan how to answer the question and hand parts of it to others.",
    "researcher": "You look up what is asked and report only what you found.",
    "critic": "You look for mistakes in an answer and say where they are.",
}
_OFFERED = json.dumps(
    [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
        for name in TOOLS
    ],
    separators=(",", ":"),
)
_COLUMNS = {
    "episodes": "id phase step task_id sample attempt group sampling started_at outcome counted ended_at task_input answer error",
    "calls": "id episode_id index model sampled_tokens temperature finish_reason parent_id relation parted_at span_id agent "
    "response_id upstream redacted restricted cached_tokens started_at ended_at base_id base_tokens prompt_ids sampled_ids "
    "logprobs versions entropies request response",
    "spans": "episode_id id name kind parent_id started_at ended_at attributes error",
    "rewards": "number episode_id name value time call_id span_id source key",
}
_CHUNK = 2000
Row = tuple[Any, ...]


def make_store(path: Path, episodes: int = 100_000, calls_per_episode: int = 10) -> Path:
    """The store at `path`; one that is there is kept as it is. About ten calls an episode take 1.7 kB each on the disk."""
    if path.exists():
        return path
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    Store.open(unfinished).close()
    raw = sqlite3.connect(unfinished, isolation_level=None)
    for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -200000"):
        raw.execute(f"PRAGMA {pragma}")
    maker = _Maker(calls_per_episode)
    for start in range(0, episodes, _CHUNK):
        raw.execute("BEGIN")
        rows: dict[str, list[Row]] = {"episodes": [], "calls": [], "spans": [], "rewards": []}
        for number in range(start, min(start + _CHUNK, episodes)):
            maker.episode(number, is_last=number >= episodes - 4, into=rows)
        for table, made in rows.items():
            columns = _COLUMNS[table].split()
            names, marks = ", ".join(f'"{column}"' for column in columns), ", ".join("?" * len(columns))
            raw.executemany(f"INSERT INTO {table} ({names}) VALUES ({marks})", made)
        raw.execute("COMMIT")
    raw.execute("PRAGMA journal_mode = WAL")
    raw.close()
    unfinished.rename(path)
    return path


def ids(episodes: int) -> Iterator[str]:
    """Of the episodes that `make_store` makes, in order."""
    return (_name(number) for number in range(episodes))


def _name(number: int) -> str:
    step, task, sample = _place(number)
    return f"train.{step}.task-{task:05}.{sample}.0"


def _place(number: int) -> tuple[int, int, int]:
    step, within = divmod(number, TASKS * SAMPLES)
    return step, (step * TASKS + within // SAMPLES) % 10_000, within % SAMPLES


def _message(**fields: str) -> str:
    return json.dumps(fields, separators=(",", ":"))


class _Maker:
    def __init__(self, calls: int) -> None:
        self._calls = calls
        random = self._random = np.random.default_rng(0)
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
        words = ["".join(random.choice(letters, random.integers(2, 10))) for _ in range(VOCABULARY)]
        weights = 1 / np.arange(1, VOCABULARY + 1)
        drawn = random.choice(VOCABULARY, size=400_000, p=weights / weights.sum())
        self._words = [words[at] for at in drawn]
        self._ids = random.integers(3, 49_000, 100_000, dtype="<i4").tobytes()
        self._logprobs = (-random.exponential(0.4, 50_000)).astype("<f8").tobytes()
        self._entropies = random.exponential(0.5, 50_000).astype("<f4").tobytes()

    def episode(self, number: int, is_last: bool, into: dict[str, list[Row]]) -> None:
        step, task, sample = _place(number)
        id = _name(number)
        random = self._random
        started = STARTED + 30.0 * step + 0.01 * (number % (TASKS * SAMPLES))
        draw = float(random.random())
        outcome = "completed" if draw < 0.93 else "agent_error" if draw < 0.97 else "timeout"
        count = max(1, int(random.poisson(self._calls)))
        ended = started + 0.8 * count
        question = json.dumps({"question": self._text(20), "answer": int(random.integers(1000))}, separators=(",", ":"))
        end = (None, False, 0.0) if is_last else (outcome, True, ended)
        error = None if outcome == "completed" else f"Traceback (most recent call last):\n{outcome}: {self._text(6)}"
        sampling = json.dumps({"temperature": 1.0, "top_p": 1.0, "max_tokens": 64, "seed": number})
        group = f"train-{step}-task-{task:05}"
        answer = json.dumps(self._text(8)) if outcome == "completed" else None
        into["episodes"].append(
            (id, "train", step, f"task-{task:05}", sample, 0, group, sampling, started, *end, question, answer, error)
        )
        spans = self._spans(id, started, ended, error)
        into["spans"] += spans
        call_ids = [f"{number:07x}{index:04x}" for index in range(count)]
        into["calls"] += self._conversations(id, call_ids, step, started, question)
        if outcome != "timeout" and not is_last:
            into["rewards"] += self._rewards(number, id, call_ids, ended, outcome == "completed")

    def _spans(self, id: str, started: float, ended: float, error: str | None) -> list[Row]:
        rows: list[Row] = [(id, "s0", AGENTS[0], "agent", None, started, ended, "{}", error)]
        for at, agent in enumerate(AGENTS[1:], 1):
            rows.append((id, f"s{at}", agent, "agent", "s0", started + at, ended, "{}", None))
        for at in range(int(self._random.integers(1, 4))):
            said = {"arguments": {"query": self._text(4)}, "result": self._text(12)}
            row = (id, f"t{at}", TOOLS[at], "tool", f"s{at % 3}", started + at, started + at + 0.5)
            rows.append((*row, json.dumps(said, separators=(",", ":")), None))
        return rows

    def _conversations(self, id: str, call_ids: list[str], step: int, started: float, question: str) -> list[Row]:
        """Each agent has one of its own; now and then one goes on from the call before the last."""
        rows: list[Row] = []
        history: dict[int, list[tuple[str, int, int]]] = {}
        for index, call_id in enumerate(call_ids):
            who = 0 if index < 3 else int(self._random.integers(len(AGENTS)))
            mine = history.setdefault(who, [])
            is_fork = len(mine) > 1 and self._random.random() < 0.08
            sampled, asked = int(self._random.integers(15, 66)), int(self._random.integers(20, 60))
            if mine:
                base, tokens, length = mine[-2 if is_fork else -1]
                own = "," + _message(role="assistant", content=self._text(45))
                own += "," + _message(role="tool", tool_call_id=f"t{index}", content=self._text(30))
                places = [("model", 8, 0, 0), ("messages", length - 1, 1, len(own)), ("tools", len(_OFFERED), 0, 0)]
                relation, length = "fork" if is_fork else "extension", length + len(own)
            else:
                base, tokens, relation, asked = None, 0, "root", 3 * asked
                system = _message(role="system", content=_SYSTEM[AGENTS[who]])
                messages = f"[{system},{_message(role='user', content=question)}]"
                length, own = len(messages), '"policy"' + messages + _OFFERED
                places = [("model", 0, 0, 8), ("messages", 0, 0, length), ("tools", 0, 0, len(_OFFERED))]
            request = json.dumps(places, separators=(",", ":")) + "\n" + own
            mine.append((call_id, tokens + asked + sampled, length))
            reply = _message(role="assistant", content=self._text(45))
            begun = started + 0.8 * index
            place = (call_id, id, index, "policy", sampled, 1.0, "stop", base, relation, tokens if is_fork else None)
            maker = (f"s{who}", AGENTS[who], f"r-{call_id}", "", False, "[]", tokens, begun, begun + 0.7, base, tokens)
            ids = (self._packed(self._ids, 4, asked), self._packed(self._ids, 4, sampled))
            versions = step.to_bytes(4, "little") * sampled
            chances = (self._packed(self._logprobs, 8, sampled), versions, self._packed(self._entropies, 4, sampled))
            rows.append((*place, *maker, *ids, *chances, request, reply))
        return rows

    def _rewards(self, number: int, id: str, call_ids: list[str], time: float, completed: bool) -> Iterator[Row]:
        given = (
            ("correct", float(completed and self._random.random() < 0.6), None),
            ("well_formed", float(self._random.random() < 0.9), call_ids[-1]),
            ("brevity", round(float(self._random.normal(-0.2, 0.1)), 4), None),
        )
        for at, (name, value, call) in enumerate(given):
            yield (3 * number + at + 1, id, name, value, time, call, None, "function", str(at))

    def _text(self, words: int) -> str:
        at = int(self._random.integers(len(self._words) - words))
        return " ".join(self._words[at : at + words])

    def _packed(self, pool: bytes, width: int, count: int) -> bytes:
        at = width * int(self._random.integers(len(pool) // width - count))
        return pool[at : at + width * count]
