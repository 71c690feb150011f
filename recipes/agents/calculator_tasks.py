"""Word problems for the calculator agent, demonstrations of one-operation ones, and how an answer is scored.

The warm start shows how to call the calculator on problems with one operation. Training and evaluation ask for two, in
other wordings; evaluation adds a wording never trained on and problems with three operations. Which split a problem
may appear in is decided by a hash of its numbers, so that no numbers of one split occur in another, whatever the seed.
"""

import hashlib
import json
import random
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from calculator import SYSTEM, TOOLS, evaluate

import lightning_rl as lrl

if TYPE_CHECKING:
    from datasets import Dataset

# (question, expression); a letter is a number, `/` is always exact
ONE_OPERATION = [
    ("{name} has {a} {item}. {name} buys {b} more {item}. How many {item} does {name} have?", "a+b"),
    ("{name} has {a} {item}. {name} gives away {b} {item}. How many {item} are left?", "a-b"),
    ("{name} has {a} boxes with {b} {item} in each box. How many {item} does {name} have?", "a*b"),
    ("{name} shares {a} {item} equally among {b} friends. How many {item} does each friend get?", "a/b"),
    ("There are {a} red {item} and {b} blue {item}. How many {item} are there?", "a+b"),
    ("{name} gives {b} {item} to each of {a} friends. How many {item} does {name} give away?", "a*b"),
]
TWO_OPERATIONS = [
    ("{name} has {a} boxes with {b} {item} in each box. {name} buys {c} more {item}. "
     "How many {item} does {name} have?", "a*b+c"),
    ("{name} has {a} boxes with {b} {item} in each box. {name} gives away {c} {item}. "
     "How many {item} are left?", "a*b-c"),
    ("{name} has {a} {item}. {name} buys {b} more {item} and gives away {c} {item}. "
     "How many {item} are left?", "a+b-c"),
    ("{name} has {a} {item}. {name} gives away {b} {item} and then buys {c} more {item}. "
     "How many {item} does {name} have?", "a-b+c"),
    ("{name} has {a} {item}. {name} buys {b} boxes with {c} {item} in each box. "
     "How many {item} does {name} have?", "a+b*c"),
    ("{name} has {a} {item}. {name} gives {b} {item} to each of {c} friends. "
     "How many {item} are left?", "a-b*c"),
    ("There are {a} red {item}, {b} blue {item} and {c} green {item}. "
     "How many {item} are there?", "a+b+c"),
    ("{name} has {a} {item} and loses {b} {item}. Then {name} loses {c} more {item}. "
     "How many {item} are left?", "a-b-c"),
]  # fmt: skip
EVALUATION_ONLY = [
    ("A shop has {a} shelves with {b} {item} on each shelf and {c} more {item} in the window. "
     "How many {item} does the shop have?", "a*b+c"),
    ("{name} has {a} boxes with {b} {item} in each box. {name} buys {c} more {item} and gives away {d} {item}. "
     "How many {item} are left?", "a*b+c-d"),
]  # fmt: skip

NAMES = ["Tom", "Anna", "Ben", "Sara", "Max", "Lucy", "Sam", "Emma"]
ITEMS = ["pens", "apples", "books", "cards", "coins", "eggs", "balls", "stamps"]
TEMPLATES = {"warm_start": ONE_OPERATION, "train": TWO_OPERATIONS, "eval": TWO_OPERATIONS + EVALUATION_ONLY}
MAX_DRAWS = 1000  # per problem; about three are needed
BUCKETS = {"warm_start": range(0, 3), "train": range(3, 7), "eval": range(7, 10)}


def make_tasks(seed: int, train: int, warm_start: int, eval: int) -> "dict[str, Dataset]":
    """The three splits: `id`, `question`, `answer`; the warm start also has `messages` and `tools`."""
    from datasets import Dataset  # here because `score` runs in every episode's process and needs none of it

    sizes = {"train": train, "warm_start": warm_start, "eval": eval}
    problems = {split: _problems(split, size, seed) for split, size in sizes.items()}
    _check_disjoint(problems)
    return {split: Dataset.from_list([_row(split, problem) for problem in rows]) for split, rows in problems.items()}


def score(task: "lrl.Task", episode: "lrl.Episode") -> "list[lrl.Reward]":
    """`correct`: the last number of the answer is right. On the first call, whatever came after it: `well_formed`, it
    asked for a computable sum; `numbers`, the share of the problem's numbers that are in that sum, each as often as there.
    """
    right = last_number(episode.answer) == task.input["answer"]
    rewards = [lrl.Reward(episode_id=episode.id, name="correct", value=float(right))]
    if episode.calls:
        first = episode.calls[0]
        expression = _expression(first.response)
        asked, used = (Counter(re.findall(r"\d+", text or "")) for text in (task.input["question"], expression))
        steps = {"well_formed": float(expression is not None), "numbers": (asked & used).total() / asked.total()}
        rewards += [lrl.Reward(episode_id=episode.id, name=n, value=v, call_id=first.id) for n, v in steps.items()]
    return rewards


def last_number(answer: object) -> float | None:
    numbers = (
        re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", answer)) if isinstance(answer, str) else []
    )
    return float(numbers[-1]) if numbers else None


def _expression(message: dict[str, Any]) -> str | None:
    """What the message asks the calculator for, if that can be computed."""
    calls = message.get("tool_calls") or []
    if len(calls) != 1 or calls[0]["function"]["name"] != "calculator":
        return None
    try:
        expression = json.loads(calls[0]["function"]["arguments"])["expression"]
        evaluate(expression)
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return None
    return str(expression)


def _problems(split: str, size: int, seed: int) -> list[dict[str, Any]]:
    """The first `size` distinct problems of a split; a larger split begins with the same ones."""
    draw = random.Random(f"{split}-{seed}")
    problems: dict[str, dict[str, Any]] = {}
    for _ in range(MAX_DRAWS * size):
        if len(problems) == size:
            break
        # Round robin keeps the mix of templates the same in every split and size.
        template, formula = TEMPLATES[split][len(problems) % len(TEMPLATES[split])]
        numbers = _numbers(formula, draw)
        expression = "".join(str(numbers.get(symbol, symbol)) for symbol in formula)
        answer = int(evaluate(expression))
        if answer <= 0 or bucket(numbers.values()) not in BUCKETS[split]:
            continue
        question = template.format(name=draw.choice(NAMES), item=draw.choice(ITEMS), **numbers)
        row = {"id": f"{split}-{len(problems):04d}", "question": question, "answer": answer}
        problems.setdefault(question, row | {"expression": expression, "numbers": sorted(numbers.values())})
    if len(problems) < size:
        raise ValueError(f"there are not {size} different problems for the split {split}; ask for fewer")
    return list(problems.values())


def _numbers(formula: str, draw: random.Random) -> dict[str, int]:
    """Numbers that a child could meet: factors are small, a dividend is a multiple, what is given away was there."""
    letters = sorted(set(re.findall("[a-d]", formula)))
    factors = {letter for pair in re.findall(r"(?=([a-d])[*/]([a-d]))", formula) for letter in pair}
    numbers = {letter: draw.randint(2, 12) if letter in factors else draw.randint(3, 60) for letter in letters}
    if formula == "a/b":
        numbers["a"] = numbers["b"] * draw.randint(2, 20)
    elif formula.startswith("a-"):
        numbers["a"] = draw.randint(60, 200)
    return numbers


def bucket(numbers: Any) -> int:
    """0 … 9, from the numbers alone and whatever their order."""
    text = ",".join(map(str, sorted(numbers)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10


def _check_disjoint(problems: dict[str, list[dict[str, Any]]]) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for split, rows in problems.items():
        for problem in rows:
            if seen.setdefault(tuple(problem["numbers"]), split) != split:
                raise ValueError(f"{problem['numbers']} occur in {split} and in {seen[tuple(problem['numbers'])]}")


def _row(split: str, problem: dict[str, Any]) -> dict[str, Any]:
    row = {key: problem[key] for key in ("id", "question", "answer")}
    return row | _demonstration(problem) if split == "warm_start" else row


def _demonstration(problem: dict[str, Any]) -> dict[str, Any]:
    """The conversation that the agent holds when all goes well."""
    arguments = json.dumps({"expression": problem["expression"]})
    call = {"id": "call_0", "type": "function", "function": {"name": "calculator", "arguments": arguments}}
    answer = str(problem["answer"])
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": problem["question"]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": answer},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "tools": TOOLS}
