"""What this server said, so that the next prompt of the same conversation extends it token for token.

After each call `remember` keeps its ids under a fingerprint of the conversation including the reply. For a new request
`prompt` looks for the longest run of its messages that ends in a remembered reply, and appends to those ids only what
the template puts after it. Replies that stand behind a change of history (or behind changed tools, options or system
message) are found by what they say, and keep their sampled ids as well, where the template lets their places be found.
Every prompt is labelled with how its ids relate to the calls before it.

Fingerprints look through what frameworks change on the way back: content as parts or None, white space around a reply,
key order in arguments, ids of tool calls, reasoning that is left out. Where several replies have one fingerprint, just
these tell which is meant (`wordings.py`); reasoning that is there and was not sampled is a change of history.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from rollout_server.api.rendering.render import Renderer
from rollout_server.api.rendering.sequences import KnownCall, Nearest, Sequences, pack
from rollout_server.api.rendering.tool_prompt import Message, parsed_arguments
from rollout_server.api.rendering.wordings import Wording, fitting, wording

_CANDIDATES = 256
"""Replies of one fingerprint that are told apart: as many as a request may have choices. The latest are kept."""
_WORDINGS = 64
"""Messages that the same ids came back as: greedy calls of tools, for instance, have new ids each time."""


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    parent_id: str | None = None
    """The call whose prompt and sampled ids `ids` begins with, the longest one; None if there is none."""
    relation: str = "root"
    """`root`: a conversation of its own, in which nothing stands that the policy said in this scope (a common system
    message is no relation).
    `extension`: begins with prompt + sampled ids of an earlier call, and is the first that does.
    `fork`: the same, but another call has extended that one already; or an earlier prompt once more (a client's retry,
    a second sample).
    `edit`: history was changed. The ids part from the nearest earlier call inside of what was sampled, or a reply of the
    policy stands behind the place where they part, or another reply stands in the place of the policy's."""
    parted_at: int | None = None
    """For an edit the index of the first token that differs from the nearest earlier call's prompt + sampled ids, that
    with the longest common prefix; for a fork the length of the call that it extends, or of the prompt if that was there
    before; None otherwise. Earlier calls are those of this scope that are remembered."""
    begun_at: int | None = None
    """Where the unfinished reply of the policy begins that `ids` ends with; None if it ends otherwise."""
    claim: _Claim | None = field(default=None, repr=False, compare=False)
    """For `ConversationIndex.withdraw`."""

    def sibling(self) -> Prompt:
        """The same prompt, as the second and all further choices of one request have it."""
        return replace(self, relation="fork", parted_at=len(self.ids))


@dataclass(eq=False)
class _Claim:
    key: bytes
    turn: _Turn
    digest: bytes
    base: KnownCall | None
    withdrawn: bool = False


@dataclass(eq=False)
class _Said:
    """A reply as it can be found again."""

    turn: bytes
    call: KnownCall
    began: int | None
    """Where in the call's ids it begins; behind what it went on with if it continues a message that was rendered."""
    wordings: list[Wording]
    found_by: tuple[bytes, ...]

    @property
    def reply_ids(self) -> list[int]:
        return self.call.ids[self.began :]


@dataclass(eq=False)
class _Turn:
    """One prompt, and what was said to it; forgotten as one."""

    digest: bytes = b""
    """Of the prompt's ids."""
    length: int = 0
    asked: int = 0
    replies: list[_Said] = field(default_factory=list)


class ConversationIndex:
    """Least recently used turns are forgotten beyond `max_tokens` remembered ids (4 bytes each; a conversation's turns
    share theirs), or beyond `max_entries` prompts and replies (about 1 kB each). For one thread."""

    def __init__(self, renderer: Renderer, max_tokens: int = 16_000_000, max_entries: int = 32_768) -> None:
        self._renderer = renderer
        self._max_tokens = max_tokens
        self._max_entries = max_entries
        self._replies = 0
        self._turns: OrderedDict[bytes, _Turn] = OrderedDict()
        self._known: dict[bytes, list[_Said]] = {}
        """By fingerprints of conversations up to a reply, of replies with the message before them, and of replies alone;
        the latest last."""
        self._sequences = Sequences()

    def prompt(
        self,
        scope: str,
        messages: list[Message],
        tools: list[dict[str, Any]],
        options: Mapping[str, Any] = {},
        continues: bool = False,
        one_agent: bool = True,
    ) -> Prompt:
        """Only conversations of the same scope are looked at: who asks, and the model that is asked.

        `one_agent`: all of the scope belongs together, as in an episode. Only there a reply behind a change of history
        is found by what it says: of strangers' replies that say the same, none may show up in another's prompt.

        The prompt counts as asked from now on: `withdraw` it if no token is sampled. Raises RenderError.
        """
        prints = fingerprints(scope, messages, tools, options)
        at, said = self._deepest(prints, messages)
        base = None if said is None else said.call
        later = self._later_replies(scope, messages, at, continues) if one_agent else {}
        ids = self._rendered(messages, tools, options, continues, at, said, later)
        lost = base is not None and not base.begins(pack(ids))
        changed = bool(later) or lost or self._answers_differ(prints, messages, at)
        prompt = self._labelled(scope, _turn_key(prints[-1], continues), ids, base, changed)
        reopened = said is not None and continues and at == len(messages) - 1
        return replace(prompt, begun_at=said.began) if said is not None and reopened else prompt

    def raw_prompt(self, scope: str, ids: list[int]) -> Prompt:
        """A prompt that the client gives as ids or as text, with its label. Asked from now on, as by `prompt`."""
        return self._labelled(scope, _raw_key(scope, ids), ids, None, False)

    def withdraw(self, prompt: Prompt) -> None:
        """Nothing is sampled for this prompt (it was refused, failed, or was cancelled): it is as if it had not been
        asked. Idempotent."""
        if prompt.claim is None or prompt.claim.withdrawn:
            return
        prompt.claim.withdrawn = True
        turn, base = prompt.claim.turn, prompt.claim.base
        if turn.digest == prompt.claim.digest:
            turn.asked -= 1
        if not turn.asked and not turn.replies and self._turns.get(prompt.claim.key) is turn:
            del self._turns[prompt.claim.key]
        if base is not None:
            base.continued -= 1

    def remember(
        self,
        scope: str,
        messages: list[Message],
        reply: Message,
        tools: list[dict[str, Any]],
        ids: list[int],
        call_id: str,
        options: Mapping[str, Any] = {},
        continues: bool = False,
    ) -> None:
        """`ids` are the prompt's and the sampled ones; `reply` is the message as the client gets it.

        `continues` as for the prompt: the next turn is looked for with the last message and its rest as one.
        """
        before = fingerprints(scope, messages, tools, options)
        key = _turn_key(before[-1], continues)
        turn = self._turns.setdefault(key, _Turn())
        self._turns.move_to_end(key)
        data = pack(ids)
        at, base = self._deepest(before, messages)
        start = turn.length if turn.length <= len(ids) and turn.digest == _digest(pack(ids[: turn.length])) else None
        began, thought_known = start, True
        if continues:
            reopened = base is not None and at == len(messages) - 1
            began = base.began if base is not None and reopened else None
            thought_known = not reopened or bool(messages[-1].get("reasoning_content"))
            messages, reply = messages[:-1], _joined(messages[-1], reply)
        print_ = fingerprints(scope, [*messages, reply], tools, options)[-1]
        worded = wording(messages, reply, thought_known=thought_known)
        if not self._said_again(print_, data, worded):
            may_echo = start is not None and began is not None and thought_known
            found_by = (print_, *_echoes(scope, messages, reply)) if may_echo else (print_,)
            call = self._sequences.add(scope, call_id, data, start, None if base is None else base.call)
            self._keep(turn, _Said(key, call, began, [worded], found_by))
        self._forget()

    def remember_raw(self, scope: str, prompt_ids: list[int], sampled_ids: list[int], call_id: str) -> None:
        """What was sampled for a prompt of `raw_prompt`."""
        key, data = _raw_key(scope, prompt_ids), pack([*prompt_ids, *sampled_ids])
        call = self._sequences.add(scope, call_id, data, len(prompt_ids), None)
        self._keep(self._turns.setdefault(key, _Turn()), _Said(key, call, len(prompt_ids), [], ()))
        self._forget()

    def _labelled(self, scope: str, key: bytes, ids: list[int], base: KnownCall | None, changed: bool) -> Prompt:
        data = pack(ids)
        nearest = self._sequences.nearest(scope, data)
        contained = nearest.contained() if nearest else None
        if base is None or not base.begins(data) or (contained is not None and contained.end > base.end):
            base = contained
        turn = self._ask(key, data)
        relation, parted_at = _relation(len(ids), turn, base, nearest, changed)
        if base is not None:
            base.continued += 1
        return Prompt(ids, base.id if base else None, relation, parted_at, claim=_Claim(key, turn, turn.digest, base))

    def _keep(self, turn: _Turn, said: _Said) -> None:
        self._turns.move_to_end(said.turn)
        turn.replies.append(said)
        self._replies += 1
        for found in said.found_by:
            candidates = self._known.setdefault(found, [])
            candidates.append(said)
            del candidates[:-_CANDIDATES]

    def _said_again(self, print_: bytes, data: bytes, worded: Wording) -> bool:
        """Whether these ids are known; they are the latest of their fingerprint then."""
        candidates = self._known.get(print_, [])
        length = len(data) // 4
        again = next((said for said in candidates if said.call.end == length and said.call.begins(data)), None)
        if again is None:
            return False
        candidates.remove(again)
        candidates.append(again)
        again.wordings = [*(known for known in again.wordings if known != worded), worded][-_WORDINGS:]
        self._turns.move_to_end(again.turn)
        return True

    def _deepest(self, prints: list[bytes], messages: list[Message]) -> tuple[int | None, _Said | None]:
        """The last of the messages that this server said, with all that comes before it unchanged."""
        for at in reversed(range(len(prints))):
            candidates = self._known.get(prints[at]) if messages[at]["role"] == "assistant" else None
            if candidates:
                meant = _meant(candidates, wording(messages[:at], messages[at]))
                if meant:
                    self._turns.move_to_end(meant[-1].turn)
                    return at, meant[-1]
        return None, None

    def _later_replies(
        self, scope: str, messages: list[Message], base: int | None, continues: bool
    ) -> dict[int, _Said]:
        """Messages behind the base that this server said, in this conversation or in another of the scope."""
        found = {}
        for at in range(0 if base is None else base + 1, len(messages) - continues):
            said = self._echoed(scope, messages[:at], messages[at]) if _says_something(messages[at]) else None
            if said is not None:
                found[at] = said
        return found

    def _echoed(self, scope: str, before: Sequence[Message], message: Message) -> _Said | None:
        """The reply that a message must be; None if there are several."""
        for echo in _echoes(scope, before, message):
            meant = _meant(self._known.get(echo, []), wording((), message))
            if meant:
                return meant[-1] if all(said.reply_ids == meant[-1].reply_ids for said in meant[:-1]) else None
        return None

    def _answers_differ(self, prints: list[bytes], messages: list[Message], base: int | None) -> bool:
        """Whether behind the base a reply stands where this server gave another."""
        start = 1 if base is None else base + 1
        turns = (
            self._turns.get(_turn_key(prints[at - 1], False))
            for at in range(start, len(messages))
            if messages[at]["role"] == "assistant"
        )
        return any(turn is not None and turn.replies for turn in turns)

    def _rendered(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]],
        options: Mapping[str, Any],
        continues: bool,
        at: int | None,
        base: _Said | None,
        later: Mapping[int, _Said],
    ) -> list[int]:
        if at is not None and base is not None:
            if continues and at == len(messages) - 1:
                return self._reopened(base.call)
            ids = self._spliced(messages, tools, options, continues, {at: base, **later}, head=False)
            ids = ids or self._spliced(messages, tools, options, continues, {at: base}, head=False)
            if ids:
                return ids
        if later:
            ids = self._spliced(messages, tools, options, continues, later, head=True)
            if ids:
                return ids
        return self._renderer.prompt(messages, tools, options, continues)

    def _spliced(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]],
        options: Mapping[str, Any],
        continues: bool,
        replies: Mapping[int, _Said],
        *,
        head: bool,
    ) -> list[int] | None:
        """Replies as they were sampled, and between them what the template puts there; without `head`, the first one
        with all that came before it."""
        pieces = self._renderer.around(messages, tools, list(replies), options, continues, head=head)
        if pieces is None:
            return None
        ids = self._renderer.encode(pieces[0])
        for number, (said, text) in enumerate(zip(replies.values(), pieces[1:], strict=True)):
            ids += said.reply_ids if head or number else said.call.ids
            ids += self._renderer.encode_after(text, ids[-1] if ids else -1)
        return ids

    def _reopened(self, call: KnownCall) -> list[int]:
        """The call's ids, without the end of its turn."""
        ids = call.ids
        return ids[:-1] if ids[-1] in self._renderer.stop_ids else ids

    def _ask(self, key: bytes, data: bytes) -> _Turn:
        turn = self._turns.setdefault(key, _Turn())
        self._turns.move_to_end(key)
        digest = _digest(data)
        if turn.digest != digest:
            turn.digest, turn.length, turn.asked = digest, len(data) // 4, 0
        turn.asked += 1
        self._forget()
        return turn

    def _is_full(self) -> bool:
        entries = len(self._turns) + self._replies
        return entries > self._max_entries or self._sequences.tokens > self._max_tokens

    def _forget(self) -> None:
        while self._turns and self._is_full():
            _, oldest = self._turns.popitem(last=False)
            self._replies -= len(oldest.replies)
            for said in oldest.replies:
                self._sequences.release(said.call)
                for found in said.found_by:
                    candidates = self._known.get(found, [])
                    if said in candidates:
                        candidates.remove(said)
                    if not candidates:
                        self._known.pop(found, None)


def _relation(
    length: int, turn: _Turn, base: KnownCall | None, nearest: Nearest | None, changed: bool
) -> tuple[str, int | None]:
    """`changed`: what was said behind the base was changed, or what was said there stands behind something changed."""
    if turn.asked > 1 or (nearest is not None and nearest.asked_for(length)):
        return "fork", length
    if base is not None and not base.continued:
        return "extension", None
    if nearest is not None and (changed or nearest.parts_in_sampled()):
        return "edit", nearest.shared
    return ("root", None) if base is None else ("fork", base.end)


def fingerprints(
    scope: str, messages: Sequence[Message], tools: list[dict[str, Any]], options: Mapping[str, Any] = {}
) -> list[bytes]:
    """Entry i identifies messages 0 … i under this scope, these tools and these options of the template."""
    state = blake2b(_dump([scope, tools, dict(options)]), digest_size=16)
    prints = []
    for message in messages:
        state.update(_dump(_essence(message)))
        prints.append(state.copy().digest())
    return prints


def _echoes(scope: str, before: Sequence[Message], reply: Message) -> tuple[bytes, bytes]:
    """What a reply is found by where the conversation before it is another: with the message it answered, and alone."""
    alone = _dump([scope, _essence(reply)])
    answered = _dump(_essence(before[-1])) if before else b""
    return _digest(b"echo" + answered + alone), _digest(b"echo" + alone)


def _essence(message: Message) -> list[Any]:
    calls = [[c["function"]["name"], parsed_arguments(c)] for c in message.get("tool_calls") or []]
    content = message.get("content") or ""
    return [message["role"], content.strip() if message["role"] == "assistant" else content, calls]


def _meant(candidates: Sequence[_Said], asked: Wording) -> list[_Said]:
    """Those of the candidates that may be meant, the latest last."""
    said = [(worded, said) for said in candidates for worded in said.wordings]
    return [said[at][1] for at in fitting([worded for worded, _ in said], asked)]


def _says_something(message: Message) -> bool:
    """Whether it is one of the assistant that has text or calls: nothing else tells which reply it is."""
    said = (message.get("content") or "").strip() or message.get("tool_calls")
    return message["role"] == "assistant" and bool(said)


def _joined(begun: Message, reply: Message) -> Message:
    joined = {**reply, "content": (begun.get("content") or "") + (reply.get("content") or "")}
    thought = (begun.get("reasoning_content") or "") + (reply.get("reasoning_content") or "")
    return {**joined, "reasoning_content": thought} if thought else joined


def _turn_key(print_: bytes, continues: bool) -> bytes:
    return print_ + bytes([continues])


def _raw_key(scope: str, ids: list[int]) -> bytes:
    return _digest(_dump([scope, "raw"]) + pack(ids))


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"
