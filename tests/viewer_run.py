"""A run as agents leave one, small and full of cases, for tests that open the viewer: made with `Store`, as the server and
the runner write it, in the tokens of the built-in `tiny-llama`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lightning_rl.episode import Call, EpisodeStart, Outcome, Reward, Span, Task
from lightning_rl.recipe import load_recipe
from lightning_rl.store import Store
from rollout_server.models.catalog import resolve_model

SMOKE = Path(__file__).parents[1] / "recipes" / "smoke.yaml"
GROUP = "1/trip"
STARTED = 1_790_000_000.0
LONG_CALLS, LONG_TOKENS = 200, 30_000
HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "<a href='javascript:window.hacked = 3'>click</a>\x1b[31mred\x1b[0m \u202eright to left\u202c \x00 {{7*7}} ${window.hacked = 4}"
)
HUGE = "A long line that never ends. " * 370_000
"""About 10 MB."""
TRACEBACK = 'Traceback (most recent call last):\n  File "tools.py", line 7, in book\n    raise ValueError(seat)\nValueError: 13F\n'


def make_run(folder: Path) -> Path:
    """A run directory. Its episodes: `trip.0` … `trip.3` (a group: agents, tools, a handoff, a fork, an edit, an error), `long`
    (200 calls), `tokens` (a call of 30,000 tokens), `hostile`, and `running`, which has not ended."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        load_recipe(
            SMOKE, ["warm_start=null", "train.samples_per_task=4", "reward.weights={vowels: 1.0, polite: 0.5}"]
        ).to_yaml()
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _metrics()))
    with Store.open(folder / "episodes.db") as store:
        write = _Writer(store)
        for sample in range(4):
            write.trip(sample)
        write.long()
        write.tokens()
        write.hostile()
        write.begin("running", "waiting")
        write.call("running", 0, [_user("Are we there yet?")], "Not yet.")
    return folder


def end_running(folder: Path) -> None:
    """What the runner does when the agent has ended."""
    with Store.open(folder / "episodes.db") as store:
        store.end(
            "running",
            Outcome.COMPLETED,
            answer="We have arrived.",
            counted=True,
            rewards=[Reward(episode_id="running", name="vowels", value=0.75)],
            ended_at=STARTED + 60,
        )


class _Writer:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._tokenizer = Tokenizer.from_file(str(resolve_model("tiny-llama") / "tokenizer.json"))
        self._sequences: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def begin(self, id: str, task: str, step: int = 1, sample: int = 0, group: str = "") -> None:
        start = EpisodeStart(
            id=id,
            task=Task(id=task, input={"question": f"The question of {task}: where to?"}),
            phase="train",
            step=step,
            sample=sample,
            group=group or f"{step}/{task}",
            started_at=STARTED + sample,
        )
        self._store.begin(start)

    def call(
        self,
        episode: str,
        index: int,
        messages: Sequence[dict[str, Any]],
        reply: str,
        *,
        sampled: list[int] | None = None,
        tool_calls: Sequence[dict[str, Any]] = (),
        extends: int | None = None,
        relation: str = "root",
        parted_at: int | None = None,
        span: str | None = None,
        agent: str = "",
    ) -> str:
        id = f"{episode}.c{index}"
        before = [] if extends is None else self._sequences[f"{episode}.c{extends}"]
        said = "".join(str(message["content"] or "") for message in messages[-2:])
        prompt = [*before[:parted_at], *self.ids(said[:20_000])]
        ids = self.ids(reply) if sampled is None else sampled
        logprobs = [-(1 + place * 37 % 50) / 16 for place in range(len(ids))]
        told = len(ids) < 1000  # of the others nobody asked for more than log-probs
        self._sequences[id] = [*prompt, *ids]
        at = STARTED + 2 * index
        self._store.add_call(
            Call(
                id=id,
                episode_id=episode,
                index=index,
                model="tiny-llama",
                prompt_ids=prompt,
                sampled_ids=ids,
                logprobs=logprobs,
                versions=[3 if place < len(ids) // 2 else 4 for place in range(len(ids))],
                temperature=1.0,
                finish_reason="tool_calls" if tool_calls else "stop",
                parent_id=None if extends is None else f"{episode}.c{extends}",
                relation="extension" if relation == "root" and extends is not None else relation,
                parted_at=parted_at,
                span_id=span,
                agent=agent,
                response_id=f"r-{id}",
                cached_tokens=len(before) // 2,
                entropies=[-logprob / 2 for logprob in logprobs] if told else [],
                alternatives=[_likeliest(*token) for token in zip(ids, logprobs, strict=True)] if told else [],
                request={"model": "tiny-llama", "messages": list(messages), "temperature": 1.0},
                response={"role": "assistant", "content": reply, "tool_calls": list(tool_calls)},
                started_at=at,
                ended_at=at + 1.5,
            )
        )
        return id

    def trip(self, sample: int) -> None:
        """A planner hands over to a booker, whose tool fails in one sample; a history is forked, and one is edited."""
        id = f"trip.{sample}"
        self.begin(id, "trip", sample=sample, group=GROUP)

        def span(name: str, kind: str, parent: str | None, start: float, **values: Any) -> Span:
            return Span(
                id=f"{id}.{name}",
                episode_id=id,
                name=name,
                kind=kind,
                parent_id=None if parent is None else f"{id}.{parent}",
                started_at=STARTED + start,
                ended_at=STARTED + values.pop("until", start + 1.0),
                **values,
            )

        failed = TRACEBACK if sample == 2 else None
        booked = {"arguments": {"seat": "13F"}, **({} if failed else {"result": {"seat": "13F", "price": 40 + sample}})}
        self._store.add_spans(
            [
                span("planner", "agent", None, 0, until=12.0),
                span("transfer", "handoff", "planner", 3.6, until=3.7, attributes={"to_agent": "booker"}),
                span("booker", "agent", "planner", 4, until=12.0),
                span("book", "tool", "booker", 6, attributes={"tool_call_id": "t1", **booked}, error=failed),
            ]
        )
        asked = [_system("You plan trips."), _user("From Basel to Genoa, please.")]
        plan = ["By train.", "By train, along the coast.", "By train.", "I would rather not say."][sample]
        self.call(id, 0, asked, plan, span=f"{id}.planner", agent="planner")
        more = [*asked, _said(plan), _user("And a seat?")]
        use = {"id": "t1", "type": "function", "function": {"name": "book", "arguments": '{"seat": "13F"}'}}
        self.call(
            id,
            1,
            more,
            "",
            tool_calls=[use],
            extends=0,
            span=f"{id}.booker",
            agent="booker",
            sampled=self.ids("book 13F"),
        )
        result = {"role": "tool", "tool_call_id": "t1", "content": failed or json.dumps(booked["result"])}
        told = [*more, {"role": "assistant", "content": None, "tool_calls": [use]}, result]
        self.call(
            id, 2, told, f"Seat 13F is yours, {40 + sample} francs. 🚆", extends=1, span=f"{id}.booker", agent="booker"
        )
        length = len(self._sequences[f"{id}.c0"])
        self.call(
            id, 3, [*asked, _said(plan), _user("By bus?")], "No bus.", extends=0, relation="fork", parted_at=length,
            span=f"{id}.planner", agent="planner",
        )  # fmt: skip
        self.call(
            id, 4, [*asked, _said(plan[:3]), _user("Shorter!")], "Train.", extends=0, relation="edit", parted_at=length - 1,
            span=f"{id}.planner", agent="planner",
        )  # fmt: skip
        rewards = [
            Reward(episode_id=id, name="vowels", value=[0.5, 1.0, 0.0, 0.25][sample]),
            Reward(episode_id=id, name="polite", value=0.1 * sample, call_id=f"{id}.c2"),
        ]
        outcome = Outcome.AGENT_ERROR if sample == 2 else Outcome.COMPLETED
        self._store.end(id, outcome, answer=plan, error=failed, counted=True, rewards=rewards, ended_at=STARTED + 12)

    def long(self) -> None:
        self.begin("long", "patience", step=2)
        messages = [_user("Count as far as you can.")]
        for index in range(LONG_CALLS):
            self.call("long", index, messages, f"{index}", extends=index - 1 if index else None)
            messages = [*messages, _said(f"{index}"), _user("Go on.")]
        self._end("long", 0.5, STARTED + 2 * LONG_CALLS)

    def tokens(self) -> None:
        self.begin("tokens", "novel", step=2)
        words = self.ids("It was a dark and stormy night; the rain fell in torrents.\n\t")
        sampled = (words * (LONG_TOKENS // len(words) + 1))[:LONG_TOKENS]
        self.call("tokens", 0, [_user("Write a novel.")], self._tokenizer.decode(sampled), sampled=sampled)
        self._end("tokens", 1.0, STARTED + 30)

    def hostile(self) -> None:
        self.begin("hostile", f"hostile {HOSTILE}", step=2)
        self._store.add_spans(
            [
                Span(
                    id="hostile.tool",
                    episode_id="hostile",
                    name=HOSTILE,
                    kind="tool",
                    started_at=STARTED + 1,
                    ended_at=STARTED + 2,
                    attributes={"arguments": {"text": HOSTILE}, "result": HUGE, HOSTILE: "\ud800 half a character"},
                    error=HOSTILE,
                )
            ]
        )
        emoji = self.ids("🙂")  # several tokens, none of which is text on its own
        self.call(
            "hostile",
            0,
            [_user(HOSTILE), _user(HUGE)],
            HOSTILE,
            sampled=[*emoji[:1], *self.ids(HOSTILE), *emoji],
            agent=HOSTILE,
        )
        self._store.end(
            "hostile", Outcome.AGENT_ERROR, answer=HOSTILE, error=HOSTILE, counted=True, ended_at=STARTED + 3
        )

    def _end(self, id: str, value: float, ended_at: float) -> None:
        rewards = [Reward(episode_id=id, name="vowels", value=value)]
        self._store.end(id, Outcome.COMPLETED, answer="done", counted=True, rewards=rewards, ended_at=ended_at)


def _likeliest(id: int, logprob: float) -> list[tuple[int, float]]:
    """A sampled token among its alternatives, in numbers that float32 holds exactly."""
    found = [(id, logprob), (id + 1, -0.625), (id + 2, -3.25)]
    return sorted(found, key=lambda token: -token[1])[:2]


def _metrics() -> Iterator[dict[str, Any]]:
    yield {"step": 0, "evaluation": "base", "success": 0.1, "ci95": [0.05, 0.2], "n": 40}
    for step in range(1, 4):
        trained, dropped = 40 * step, 10
        yield {
            "step": step,
            "success": 0.2 * step,
            "reward": {"vowels": 0.2 * step},
            "reward_ci95": {"vowels": [0.2 * step - 0.1, 0.2 * step + 0.1]},
            "advantages": {"edges": [-1.0, 0.0, 1.0], "counts": [step, 2 * step]},
            "kl": None if step == 1 else 0.01 * step,
            "loss": -0.1 * step,
            "entropy": 1.0 / step,
            "logprob_gap": {"rollout": 0.001, "published": 0.002, "published_max": 0.01},
            "staleness": {"mean": 0.5, "max": 1},
            "outcomes": {"completed": 7, "agent_error": 1},
            "ledger": {
                "sampled": trained + 30 + dropped,
                "trained": trained,
                "merged": 20,
                "masked": {"no_signal": 10},
                "truncated": {},
                "dropped": {"agent_error": dropped},
            },
            "seconds": {"rollout": 2.0, "train": 1.0},
            "policy_version": step + 1,
        }
    yield {"step": 3, "evaluation": "final", "success": 0.6, "ci95": [0.45, 0.73], "n": 40}


def _system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}
