"""Two hundred conversations in each of several templates: nothing sampled is tokenised again, no fork goes unlabelled; and
edited histories, whose parting token is the one that comparing all calls finds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lightning_rl.episode import Call
from lightning_rl.token_tree import label_calls
from rollout_server.api.rendering.conversation import ConversationIndex, Prompt, fingerprints
from rollout_server.api.rendering.render import Renderer, RenderError
from rollout_server.api.rendering.sequences import pack
from rollout_server.api.rendering.tool_prompt import Message
from tests.chat_templates import dir_of, kinds, model_dir, trl
from tests.unit.domain import make_call
from tests.unit.test_render import TOOL

KINDS = ("smollm2", "qwen3", "llama3_1", "mistral", "gemma", "qwen2_5")
OTHER_TOOL: dict[str, Any] = {"type": "function", "function": {"name": "clock", "description": "The time."}}
WORDS = [
    "How much",
    " is\n",
    "6*7",
    "?",
    "Grüße ",
    "世界 🌍",
    "  ",
    "\t",
    "\n\n",
    "<b>",
    '{"a": [1]}',
    "</tool_call>",
    "don't",
    "x" * 30,
]
SAID = [
    *WORDS,
    "<tool_call>",
    '<tool_call>{"name": "calculator"',
    "<tool_call>{}</tool_call>",
    "<think>\nhm\n</think>\n\n",
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def renderer(kind: str, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(dir_of(kinds()[kind], tiny_llama, tmp_path_factory.mktemp(kind)))


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> Renderer:
    return Renderer(tiny_llama)


@dataclass
class Episode:
    """The server's side of one agent's calls, without HTTP and without a model."""

    renderer: Renderer
    index: ConversationIndex
    scope: str
    random: Random
    tools: list[dict[str, Any]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)

    def ask(self, messages: list[Message], **changes: Any) -> Prompt:
        return self.index.prompt(self.scope, messages, changes.get("tools", self.tools))

    def answer(self, prompt: Prompt, messages: list[Message], calling: int = 0) -> Message:
        """A reply as the client gets it; what was sampled need not be how its text would be tokenised."""
        call_id = f"{self.scope}-{len(self.calls)}"
        content, sampled = self.sampled()
        made = [self.call(call_id, n) for n in range(calling)]
        reply: Message = {"role": "assistant", "content": content if content or not made else None}
        if made:
            reply["tool_calls"] = made
            sampled = [*sampled, *self.renderer.encode(json.dumps(made))]
        if self.random.random() < 0.7:
            sampled.append(self.renderer.stop_ids[0])
        self.calls.append(make_call(prompt.ids, sampled, id=call_id, index=len(self.calls)))
        self.prompts.append(prompt)
        self.index.remember(self.scope, messages, reply, self.tools, [*prompt.ids, *sampled], call_id)
        return reply

    def turn(self, messages: list[Message], calling: int = 0) -> list[Message]:
        reply = self.answer(self.ask(messages), messages, calling)
        return [*messages, self.returned(reply), *self.react(reply)]

    def sampled(self) -> tuple[str, list[int]]:
        if self.random.random() < 0.2:
            ids = [self.random.randrange(17, 49_000) for _ in range(self.random.randint(1, 12))]
        else:
            words = [*self.random.choices(SAID, k=self.random.randint(0, 6)), f"r{len(self.calls)}"]
            ids = [i for word in words for i in self.renderer.encode(word)]
        return self.renderer.decode(ids), ids

    def call(self, call_id: str, number: int) -> dict[str, Any]:
        arguments = json.dumps({"expression": self.text(), "n": len(self.calls)}, ensure_ascii=False)
        name = self.random.choice(["calculator", "no_such_tool"])
        return {
            "id": f"call_{call_id}_{number}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }

    def text(self) -> str:
        return "".join(self.random.choices(WORDS, k=self.random.randint(1, 4)))

    def returned(self, reply: Message) -> Message:
        """What frameworks change on the way back."""
        back: Message = {
            "content": (reply["content"] or "").strip() if self.random.random() < 0.3 else reply["content"] or ""
        }
        back["role"] = "assistant"
        for number, call in enumerate(reply.get("tool_calls") or []):
            arguments = json.dumps(json.loads(call["function"]["arguments"]), indent=1, sort_keys=True)
            given = {"name": call["function"]["name"], "arguments": arguments}
            back.setdefault("tool_calls", []).append({"id": f"other{number}", "type": "function", "function": given})
        return back

    def react(self, reply: Message) -> list[Message]:
        calls = reply.get("tool_calls") or []
        results = [{"role": "tool", "tool_call_id": f"other{n}", "content": self.text()} for n in range(len(calls))]
        return results or [{"role": "user", "content": self.text()}]

    def opening(self, system: bool) -> list[Message]:
        question: Message = {"role": "user", "content": self.text()}
        return [{"role": "system", "content": self.text()}, question] if system else [question]


def new_episode(renderer: Renderer, index: ConversationIndex, seed: int, scope: str = "e") -> Episode:
    random = Random(seed)
    return Episode(renderer, index, f"{scope}{seed}", random, [TOOL] if random.random() < 0.7 else [])


def test_conversations_extend_and_forks_are_labelled(renderer: Renderer, kind: str) -> None:
    index = ConversationIndex(renderer)
    tokens = 0
    for seed in range(200):
        episode = new_episode(renderer, index, seed)
        random = episode.random
        messages = episode.opening(system=kind != "gemma" and random.random() < 0.5)
        said: list[int] = []
        for _ in range(random.randint(3, 8)):
            prompt = episode.ask(messages)
            assert prompt.ids[: len(said)] == said
            assert prompt.relation == ("extension" if said else "root")
            assert prompt.parted_at is None
            if said:
                assert (said[-1], prompt.ids[len(said)]).count(renderer.stop_ids[0]) == 1
            assert_follows(renderer, prompt.ids[len(said) :], messages, episode.tools)
            calling = random.choice([0, 1, 2, 3]) if episode.tools else 0
            reply = episode.answer(prompt, messages, calling)
            said = [*prompt.ids, *episode.calls[-1].sampled_ids]
            tokens += len(episode.calls[-1].sampled_ids)
            if random.random() < 0.15:  # the client did not wait, and asks again
                again = episode.ask(messages)
                assert (again.relation, again.parted_at, again.ids) == ("fork", len(prompt.ids), prompt.ids)
                reply = episode.answer(again, messages, calling)
                said = [*prompt.ids, *episode.calls[-1].sampled_ids]
            if random.random() < 0.15:  # another agent goes on from here too
                branch = [*messages, episode.returned(reply), *episode.react(reply)]
                episode.answer(episode.ask(branch), branch)
                branch = [*branch[:-1], {**branch[-1], "content": "otherwise"}]
                forked = episode.ask(branch)
                assert (forked.relation, forked.parted_at) == ("fork", len(said))
                assert forked.ids[: len(said)] == said
                reply, messages = episode.answer(forked, branch), branch
                said = [*forked.ids, *episode.calls[-1].sampled_ids]
            messages = [*messages, episode.returned(reply), *episode.react(reply)]
        labels = label_calls(episode.calls)
        assert [prompt.relation for prompt in episode.prompts] == [labels[call.id].relation for call in episode.calls]
    assert tokens > 5_000


def assert_follows(renderer: Renderer, tail: list[int], messages: list[Message], tools: list[dict[str, Any]]) -> None:
    """What is appended is what the template puts there."""
    try:
        whole = renderer.prompt(messages, tools)
    except RenderError:  # Llama's refuses several calls in one reply, which the model may have made all the same
        return
    assert whole[-len(tail) :] == tail


EDITS: dict[str, Callable[[list[Message]], list[Message]]] = {
    "a reply is changed": lambda m: [*m[:4], {"role": "assistant", "content": "Otherwise."}, *m[5:]],
    "the last reply is changed": lambda m: [*m[:-2], {"role": "assistant", "content": "Otherwise."}, m[-1]],
    "a question is changed": lambda m: [*m[:3], {"role": "user", "content": "Otherwise?"}, *m[4:]],
    "a reply is shortened": lambda m: [*m[:4], {"role": "assistant", "content": m[4]["content"][:-2]}, *m[5:]],
    "a turn is left out": lambda m: [*m[:3], *m[5:]],
    "a turn is put in": lambda m: [*m[:3], m[1], {"role": "assistant", "content": "New."}, *m[3:]],
    "turns change places": lambda m: [m[0], m[3], m[4], m[1], m[2], *m[5:]],
    "only the last turns are kept": lambda m: [m[0], {"role": "user", "content": "So far: 42."}, *m[-4:]],
    "another system message": lambda m: [{**m[0], "content": "Be long."}, *m[1:]],
    "another first question": lambda m: [m[0], {"role": "user", "content": "Else?"}, *m[2:]],
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("with_tools", [False, True])
def test_edits_are_found_at_the_right_token(renderer: Renderer, kind: str, edit: str, with_tools: bool) -> None:
    if kind == "gemma" and edit == "another system message":
        pytest.skip("there is no system message")
    for seed in range(5):
        index = ConversationIndex(renderer)
        episode = new_episode(renderer, index, seed, "other")
        episode.turn(episode.opening(system=False))
        episode = new_episode(renderer, index, seed)
        episode.tools = [TOOL] if with_tools else []
        messages = conversation(episode, kind)
        edited = shown(EDITS[edit](messages), kind)
        prompt = episode.ask(edited)
        assert prompt.relation == "edit"
        assert prompt.parted_at == parting(prompt.ids, episode.calls)
        unchanged = next(at for at in range(len(messages)) if edited[at] != shown(messages, kind)[at])
        said_before = sum(m["role"] == "assistant" for m in edited[:unchanged])
        if said_before:
            base = episode.calls[said_before - 1]
            assert prompt.parent_id == base.id
            assert prompt.ids[: len(base.prompt_ids)] == base.prompt_ids
            assert prompt.ids[len(base.prompt_ids) :][: len(base.sampled_ids)] == base.sampled_ids
        survived = [m["content"] for m in edited if m["role"] == "assistant"]
        for call, reply in zip(episode.calls, [m for m in messages if m["role"] == "assistant"], strict=True):
            if reply["content"] in survived:  # opened as it was opened when it was sampled
                assert holds(prompt.ids, [call.prompt_ids[-1], *call.sampled_ids])
        followed = episode.answer(prompt, edited)
        assert episode.ask([*edited, followed, edited[-1]]).relation == "extension"


def conversation(episode: Episode, kind: str) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Well?"}]
    for number in range(4):
        reply = episode.answer(episode.ask(shown(messages, kind)), shown(messages, kind))
        messages += [reply, {"role": "user", "content": f"And {number}?"}]
    return messages


def shown(messages: list[Message], kind: str) -> list[Message]:
    return messages[1:] if kind == "gemma" else messages


def parting(ids: list[int], calls: list[Call]) -> int:
    """By comparing with every call, token by token."""
    return max(shared(ids, call.prompt_ids + call.sampled_ids) for call in calls)


def shared(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def holds(ids: list[int], part: list[int]) -> bool:
    return any(ids[at : at + len(part)] == part for at in range(len(ids)))


def test_other_tools_and_other_options_keep_what_was_sampled(renderer: Renderer, kind: str) -> None:
    episode = new_episode(renderer, ConversationIndex(renderer), 1)
    episode.tools = [TOOL]
    messages = shown(conversation(episode, kind), kind)
    last = episode.calls[-1].prompt_ids + episode.calls[-1].sampled_ids
    for tools, options in (([TOOL, OTHER_TOOL], {}), ([TOOL], {"date_string": "today"}), ([TOOL], {"of no use": 1})):
        prompt = episode.index.prompt(episode.scope, messages, tools, options)
        assert all(holds(prompt.ids, call.sampled_ids) for call in episode.calls)
        if prompt.ids[: len(last)] == last:  # the template does not look at the option, or shows tools at the end
            assert prompt.relation == "extension"
        else:
            assert (prompt.relation, prompt.parted_at) == ("edit", parting(prompt.ids, episode.calls))
        episode.index.withdraw(prompt)


def test_history_with_calls_is_served_and_labelled_whatever_is_changed(renderer: Renderer, kind: str) -> None:
    for seed in range(10):
        episode = new_episode(renderer, ConversationIndex(renderer), seed)
        episode.tools = [TOOL]
        messages = episode.opening(system=False)
        for calling in (1, 0, 1, 0):
            messages = episode.turn(messages, calling)
        changed = [{**messages[0], "content": "Otherwise?"}, *messages[1:]]
        prompt = episode.ask(changed)
        assert (prompt.relation, prompt.parted_at) == ("edit", parting(prompt.ids, episode.calls))
        answered = [*messages[:2], {**messages[2], "content": "Otherwise."}, *messages[3:]]
        prompt = episode.ask(answered)
        assert (prompt.relation, prompt.parted_at) == ("edit", parting(prompt.ids, episode.calls))
        said = episode.calls[0].prompt_ids + episode.calls[0].sampled_ids
        assert prompt.ids[: len(said)] == said
        assert prompt.parent_id == episode.calls[0].id
        if kind != "mistral":  # which does not show where such a reply begins
            assert all(holds(prompt.ids, call.sampled_ids) for call in episode.calls)


def said(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


QUESTION: Message = {"role": "user", "content": "How much?"}


def test_choices_of_one_request_are_forks_of_its_first(plain: Renderer) -> None:
    index = ConversationIndex(plain)
    prompt = index.prompt("e", [QUESTION], [])
    sibling = prompt.sibling()
    assert (prompt.relation, sibling.relation, sibling.parted_at) == ("root", "fork", len(prompt.ids))
    sampled = {"a": [100, 2], "b": [101, 2], "c": [100, 2]}
    for call_id, ids in sampled.items():
        index.remember("e", [QUESTION], said(plain.decode(ids)), [], prompt.ids + ids, call_id)
    followed = [index.prompt("e", [QUESTION, said(plain.decode(ids)), QUESTION], []) for ids in sampled.values()]
    assert [(p.parent_id, p.relation) for p in followed] == [("a", "extension"), ("b", "extension"), ("a", "fork")]
    assert followed[2].parted_at == len(followed[0].ids)


def test_what_was_refused_or_only_counted_leaves_no_trace(plain: Renderer) -> None:
    index = ConversationIndex(plain)
    index.withdraw(index.prompt("e", [QUESTION], []))
    first = index.prompt("e", [QUESTION], [])
    assert first.relation == "root"
    index.remember("e", [QUESTION], said("A"), [], [*first.ids, 50, 2], "a")
    messages = [QUESTION, said("A"), QUESTION]
    refused = index.prompt("e", messages, [])
    assert refused.relation == "extension"
    index.withdraw(refused)
    assert index.prompt("e", messages, []).relation == "extension"
    assert index.prompt("e", messages, []).relation == "fork"


def test_scopes_do_not_see_each_other(plain: Renderer) -> None:
    index = ConversationIndex(plain)
    for scope in ("one", "two"):
        prompt = index.prompt(scope, [QUESTION], [])
        assert prompt.relation == "root"
        index.remember(scope, [QUESTION], said("A"), [], [*prompt.ids, 50, 2], scope)
    assert index.prompt("three", [QUESTION, said("A"), QUESTION], []).relation == "root"
    assert index.prompt("two", [QUESTION, said("A"), QUESTION], []).parent_id == "two"


def test_a_common_system_message_and_examples_are_no_relation(plain: Renderer) -> None:
    index = ConversationIndex(plain)
    examples = [{"role": "system", "content": "S"}, QUESTION, said("Yes.")]
    for number in range(3):
        messages = [*examples, {"role": "user", "content": f"{number}?"}]
        prompt = index.prompt("e", messages, [])
        assert (prompt.relation, prompt.parted_at, prompt.parent_id) == ("root", None, None)
        index.remember("e", messages, said(f"No {number}"), [], [*prompt.ids, 50 + number, 2], f"{number}")


def test_an_unfinished_reply_goes_on_where_it_was_cut(plain: Renderer) -> None:
    index = ConversationIndex(plain)
    first = index.prompt("e", [QUESTION], [])
    index.remember("e", [QUESTION], said(plain.decode([700, 701])), [], [*first.ids, 700, 701], "cut")
    begun = [QUESTION, said(plain.decode([700, 701]))]
    goes_on = index.prompt("e", begun, [], {}, True)
    assert (goes_on.ids, goes_on.relation, goes_on.parent_id) == ([*first.ids, 700, 701], "extension", "cut")
    index.remember("e", begun, said(plain.decode([702, 2])), [], [*goes_on.ids, 702, 2], "rest", {}, True)
    whole = said(plain.decode([700, 701, 702]))
    after = index.prompt("e", [QUESTION, whole, QUESTION], [])
    assert (after.ids[: len(first.ids) + 4], after.parent_id) == ([*first.ids, 700, 701, 702, 2], "rest")
    reopened = index.prompt("e", [QUESTION, whole], [], {}, True)
    assert (reopened.ids, reopened.relation) == ([*first.ids, 700, 701, 702], "edit")
    assert reopened.parted_at == len(reopened.ids)
    ours = index.prompt("e", [QUESTION, said("The answer ")], [], {}, True)
    assert plain.decode(ours.ids, special=True).endswith("<|im_start|>assistant\nThe answer ")


def test_prompts_given_as_ids_are_labelled_too(plain: Renderer) -> None:
    index = ConversationIndex(plain)
    assert index.raw_prompt("e", [1, 2, 3]).relation == "root"
    index.remember_raw("e", [1, 2, 3], [4, 5], "a")
    assert index.raw_prompt("e", [1, 2, 3]).relation == "fork"
    follow_up = index.raw_prompt("e", [1, 2, 3, 4, 5, 6])
    assert (follow_up.relation, follow_up.parent_id) == ("extension", "a")
    index.remember_raw("e", follow_up.ids, [7], "b")
    branch = index.raw_prompt("e", [1, 2, 3, 4, 5, 8])
    assert (branch.relation, branch.parted_at, branch.parent_id) == ("fork", 5, "a")
    edited = index.raw_prompt("e", [1, 2, 3, 4, 9])
    assert (edited.relation, edited.parted_at, edited.parent_id) == ("edit", 4, None)
    assert index.raw_prompt("e", [1, 9]).relation == "root"


def test_a_conversation_goes_on_after_midnight(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = iter(f"{day} Oct" for day in range(1, 100))
    source = trl("llama3_2")
    renderer = Renderer(
        model_dir(
            tiny_llama,
            tmp_path,
            source,
            special=kinds()["llama3_1"].special,
            bos_token="<|begin_of_text|>",
            eos_token="<|eot_id|>",
        )
    )
    assert renderer.template is not None
    monkeypatch.setitem(renderer.template._template.globals, "strftime_now", lambda form: next(days))
    index = ConversationIndex(renderer)
    first = index.prompt("e", [QUESTION], [])
    index.remember("e", [QUESTION], said("A"), [], [*first.ids, 50], "a")
    second = index.prompt("e", [QUESTION, said("A"), QUESTION], [])
    assert (second.relation, second.ids[: len(first.ids) + 1]) == ("extension", [*first.ids, 50])
    assert renderer.prompt([QUESTION], []) != first.ids


def test_ten_thousand_requests_leave_as_much_behind_as_a_hundred(plain: Renderer) -> None:
    index = ConversationIndex(plain, max_tokens=4_000, max_entries=150)
    sizes = []
    for number in range(10_000):
        scope = f"e{number // 7}"
        messages = [QUESTION, *([said("A"), QUESTION] * (number % 7))]
        prompt = index.prompt(scope, messages, [])
        if number % 3:
            index.remember(scope, messages, said("A" if number % 5 else "B"), [], [*prompt.ids, 50, 2], f"{number}")
        if number % 50 == 49:
            sizes.append(entries(index))
    assert max(sizes) <= 5 * 150 + 4_000
    assert max(sizes[100:]) <= max(sizes[:20])


def entries(index: ConversationIndex) -> int:
    """In all tables together."""
    kept = index._sequences
    strands = [strand for scope in kept._scopes.values() for strand in scope]
    assert kept.tokens == sum(len(strand.data) for strand in strands) // 4
    assert (
        sum(strand.users for strand in strands) == index._replies == sum(len(t.replies) for t in index._turns.values())
    )
    return len(index._turns) + index._replies + len(index._known) + len(strands) + kept.tokens


def test_turns_of_a_conversation_share_their_ids(plain: Renderer) -> None:
    index = ConversationIndex(plain)
    episode = new_episode(plain, index, 3)
    messages = episode.opening(system=True)
    for _ in range(8):
        messages = episode.turn(messages)
    last = episode.calls[-1]
    assert index._sequences.tokens == len(last.prompt_ids) + len(last.sampled_ids)


def test_the_nearest_of_many_calls_is_found_without_looking_at_all(plain: Renderer) -> None:
    random = Random(5)
    index = ConversationIndex(plain)
    calls = []
    for number in range(3_000):
        begun = random.choice(calls)[: random.randint(1, 60)] if calls else [17]
        ids = [*begun, *(random.randrange(17, 20) for _ in range(random.randint(1, 40)))]
        index.remember_raw("", ids[:-1], ids[-1:], f"{number}")
        calls.append(ids)
    for _ in range(300):
        ids = [*random.choice(calls)[: random.randint(1, 60)], *(random.randrange(17, 20) for _ in range(9))]
        nearest = index._sequences.nearest("", pack(ids))
        assert nearest is not None
        assert nearest.shared == max(shared(ids, call) for call in calls)


@pytest.fixture(scope="module")
def thinking(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(dir_of(kinds()["qwen3"], tiny_llama, tmp_path_factory.mktemp("thinking")))


def remembered(
    index: ConversationIndex,
    reply: Message,
    sampled: list[int],
    call_id: str,
    messages: Sequence[Message] = (QUESTION,),
) -> list[int]:
    """The ids of a call whose reply the client gets as this message."""
    prompt = index.prompt("e", list(messages), [TOOL])
    index.remember("e", list(messages), reply, [TOOL], [*prompt.ids, *sampled], call_id)
    return [*prompt.ids, *sampled]


def extended(index: ConversationIndex, *messages: Message) -> str | None:
    """The call that the follow-up to these messages extends."""
    prompt = index.prompt("e", [*messages, QUESTION], [TOOL])
    index.withdraw(prompt)
    return prompt.parent_id


SECRET = "<think>secret</think>Yes."
SHOWN = said("Yes.", reasoning_content="secret")


@pytest.mark.parametrize("message", [said("Yes."), said(""), said("Yes.", reasoning_content="known")])
@pytest.mark.parametrize("one_agent", [True, False])
def test_nobody_is_told_what_a_stranger_thought(thinking: Renderer, message: Message, one_agent: bool) -> None:
    index = ConversationIndex(thinking)
    reply = SHOWN if message["content"] else said("", reasoning_content="secret")
    text = SECRET if message["content"] else "<think>secret"
    sampled = [*thinking.encode(text), thinking.stop_ids[0]]
    remembered(index, reply, sampled, "c", [{"role": "user", "content": "Is it?"}])
    history = [{"role": "user", "content": "Is two even?"}, message, QUESTION]
    prompt = index.prompt("e", history, [TOOL], one_agent=one_agent)
    its_own = one_agent and message == said("Yes.")  # of an episode, and one reply only that it can be
    assert holds(prompt.ids, sampled) == its_own
    if not its_own:
        assert (prompt.ids, prompt.relation) == (thinking.prompt(history, [TOOL]), "root")


def test_behind_a_change_only_a_reply_that_is_certain_keeps_its_ids(thinking: Renderer) -> None:
    index = ConversationIndex(thinking)
    for number, thought in enumerate(("one", "two")):
        reply = said("Yes.", reasoning_content=thought)
        messages = [{"role": "user", "content": f"Is it {number}?"}]
        remembered(index, reply, thinking.encode(f"<think>{thought}</think>Yes."), thought, messages)
    for given, known in ((None, None), ("two", "two"), ("three", None)):
        message = said("Yes.") if given is None else said("Yes.", reasoning_content=given)
        prompt = index.prompt("e", [{"role": "user", "content": "Is it?"}, message, QUESTION], [TOOL])
        index.withdraw(prompt)
        for thought in ("one", "two"):
            assert holds(prompt.ids, thinking.encode(f"<think>{thought}</think>Yes.")) == (thought == known)


def call_of(call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1"}'}}


DOUBLES: dict[str, tuple[Message, Message]] = {
    "reasoning": (said("Yes.", reasoning_content="one"), said("Yes.", reasoning_content="two")),
    "reasoning or none": (said("Yes."), said("Yes.", reasoning_content="two")),
    "ids of calls": (said("", tool_calls=[call_of("a")]), said("", tool_calls=[call_of("b")])),
    "white space": (said("x = 1"), said("x = 1\n\n\n")),
    "white space in reasoning": (said("Yes.", reasoning_content="Hm."), said("Yes.", reasoning_content="Hm.\n")),
}


@pytest.mark.parametrize("double", DOUBLES)
def test_of_replies_that_say_the_same_the_one_that_was_meant_is_extended(plain: Renderer, double: str) -> None:
    index = ConversationIndex(plain)
    first, second = DOUBLES[double]
    remembered(index, first, [100, 2], "first")
    remembered(index, second, [101, 2], "second")
    assert [extended(index, QUESTION, message) for message in (first, second)] == ["first", "second"]
    for number, reply in ((0, first), (1, second)):  # and later, when the turns after it are the same
        remembered(index, said("So."), [200 + number, 2], f"after {number}", [QUESTION, reply, QUESTION])
    for number, reply in ((0, first), (1, second)):
        assert extended(index, QUESTION, reply, QUESTION, said("So.")) == f"after {number}"
    bare = {key: value for key, value in second.items() if key != "reasoning_content"}
    if bare != second and double != "reasoning or none":  # nothing tells them apart
        assert extended(index, QUESTION, bare) == "second"


def test_the_same_ids_said_again_are_found_by_their_last_words(plain: Renderer) -> None:
    index = ConversationIndex(plain)
    for number in range(300):
        remembered(index, said("", tool_calls=[call_of(f"{number}")]), [100 + number % 2, 2], f"{number}")
    assert extended(index, QUESTION, said("", tool_calls=[call_of("298")])) == "0"
    assert extended(index, QUESTION, said("", tool_calls=[call_of("299")])) == "1"
    assert index._replies == 2
    assert sum(len(candidate.wordings) for found in index._known.values() for candidate in found) < 1_000


def test_reasoning_that_was_not_sampled_is_a_change_of_history(plain: Renderer) -> None:
    index = ConversationIndex(plain)
    remembered(index, said("Yes.", reasoning_content="Hm."), [100, 2], "c")
    for reasoning in ("Hm.", " Hm.\n", "", None):
        assert extended(index, QUESTION, said("Yes.", reasoning_content=reasoning)) == "c"
    changed = index.prompt("e", [QUESTION, said("Yes.", reasoning_content="Otherwise."), QUESTION], [TOOL])
    assert (changed.relation, changed.parent_id) == ("edit", None)


def test_a_continued_reply_keeps_all_of_its_ids_behind_a_change(plain: Renderer) -> None:
    index = ConversationIndex(plain)
    first = index.prompt("e", [QUESTION], [])
    begun, rest = plain.decode([700, 701]), plain.decode([702])
    index.remember("e", [QUESTION], said(begun), [], [*first.ids, 700, 701], "cut")
    goes_on = index.prompt("e", [QUESTION, said(begun)], [], {}, True)
    assert goes_on.begun_at == len(first.ids)
    index.remember("e", [QUESTION, said(begun)], said(rest), [], [*goes_on.ids, 702], "rest", {}, True)
    again = index.prompt("e", [QUESTION, said(begun + rest)], [], {}, True)
    assert (again.ids, again.begun_at) == ([*first.ids, 700, 701, 702], len(first.ids))
    other: Message = {"role": "user", "content": "Otherwise?"}
    edited = index.prompt("e", [other, said(begun + rest), QUESTION], [])
    assert holds(edited.ids, [first.ids[-1], 700, 701, 702])


def test_fingerprints_look_through_what_frameworks_change(plain: Renderer) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1, "b": [2]}'}}
    other = {"id": "b", "type": "function", "function": {"name": "f", "arguments": '{"b":[2],"a":1}'}}
    ours = [QUESTION, said(" Well.\n", tool_calls=[call], reasoning_content="Hm.")]
    theirs = [QUESTION, {"tool_calls": [other], "content": "Well.", "role": "assistant", "refusal": None}]
    assert fingerprints("", ours, []) == fingerprints("", theirs, [])
    assert fingerprints("", ours, [], {"a": 1})[0] != fingerprints("", ours, [], {"a": 2})[0]
    assert fingerprints("", [{**QUESTION, "content": "How much? "}], []) != fingerprints("", [QUESTION], [])
