"""What this server said, so that the next prompt of the same conversation extends it token for token.

After each call `remember` keeps its ids under a fingerprint of the conversation including the reply. For a new request
`prompt` looks for the longest run of its messages that ends in a remembered reply, and appends to those ids only what
the template puts after it. Replies that stand behind a change of history (or behind changed tools, options or system
message) are found by what they say, and keep their sampled ids as well, where the template lets their places be found.
Every prompt is labelled with how its ids relate to the calls before it.

Fingerprints look through what frameworks change on the way back: content as parts or None, white space around a reply,
key order in arguments, ids of tool calls, reasoning that is left out.
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
    claim: _Claim | None = field(default=None, repr=False, compare=False)
    """For `ConversationIndex.withdraw`."""

    def sibling(self) -> Prompt:
        """The same prompt, as the second and all further choices of one request have it."""
        return replace(self, relation="fork", parted_at=len(self.ids))


@dataclass(frozen=True)
class _Claim:
    key: bytes
    turn: _Turn
    digest: bytes
    base: KnownCall | None


@dataclass(eq=False)
class _Turn:
    """One prompt, and what was said to it; forgotten as one."""

    digest: bytes = b""
    """Of the prompt's ids."""
    length: int = 0
    asked: int = 0
    replies: list[tuple[KnownCall, tuple[bytes, ...]]] = field(default_factory=list)
    """Each with the fingerprints that it is found by."""


class ConversationIndex:
    """Least recently used turns are forgotten beyond `max_tokens` remembered ids (4 bytes each; a conversation's turns
    share theirs), or beyond `max_entries` prompts and replies (about 1 kB each). For one thread."""

    def __init__(self, renderer: Renderer, max_tokens: int = 16_000_000, max_entries: int = 32_768) -> None:
        self._renderer = renderer
        self._max_tokens = max_tokens
        self._max_entries = max_entries
        self._replies = 0
        self._turns: OrderedDict[bytes, _Turn] = OrderedDict()
        self._known: dict[bytes, tuple[bytes, KnownCall]] = {}
        """Fingerprints of conversations up to a reply, of replies with the message before them, and of replies alone;
        with the turn that each belongs to."""
        self._sequences = Sequences()

    def prompt(
        self,
        scope: str,
        messages: list[Message],
        tools: list[dict[str, Any]],
        options: Mapping[str, Any] = {},
        continues: bool = False,
    ) -> Prompt:
        """`scope` is the episode, or empty without one; only conversations of the same scope are looked at.

        The prompt counts as asked from now on: `withdraw` it if no token is sampled. Raises RenderError.
        """
        prints = fingerprints(scope, messages, tools, options)
        at, base = self._deepest(prints, messages)
        later = self._later_replies(scope, messages, at, continues)
        ids = self._rendered(messages, tools, options, continues, at, base, later)
        lost = base is not None and not base.begins(pack(ids))
        changed = bool(later) or lost or self._answers_differ(prints, messages, at)
        return self._labelled(scope, _turn_key(prints[-1], continues), ids, base, changed)

    def raw_prompt(self, scope: str, ids: list[int]) -> Prompt:
        """A prompt that the client gives as ids or as text, with its label. Asked from now on, as by `prompt`."""
        return self._labelled(scope, _raw_key(scope, ids), ids, None, False)

    def withdraw(self, prompt: Prompt) -> None:
        """Nothing is sampled for this prompt (it was refused, or only counted): it is as if it had not been asked."""
        if prompt.claim is None:
            return
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
        if continues:
            messages, reply = messages[:-1], _joined(messages[-1], reply)
        print_ = fingerprints(scope, [*messages, reply], tools, options)[-1]
        data = pack(ids)
        known = self._known.get(print_)
        if known is None or known[1].end != len(ids) or not known[1].begins(data):
            _, base = self._deepest(before, [*messages, reply])
            start = (
                turn.length if turn.length <= len(ids) and turn.digest == _digest(pack(ids[: turn.length])) else None
            )
            found_by = (print_, *_echoes(scope, messages, reply)) if start is not None else (print_,)
            call = self._sequences.add(scope, call_id, data, start, base)
            self._keep(key, turn, call, found_by)
        self._forget()

    def remember_raw(self, scope: str, prompt_ids: list[int], sampled_ids: list[int], call_id: str) -> None:
        """What was sampled for a prompt of `raw_prompt`."""
        key, data = _raw_key(scope, prompt_ids), pack([*prompt_ids, *sampled_ids])
        call = self._sequences.add(scope, call_id, data, len(prompt_ids), None)
        self._keep(key, self._turns.setdefault(key, _Turn()), call, ())
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
        return Prompt(ids, base.id if base else None, relation, parted_at, _Claim(key, turn, turn.digest, base))

    def _keep(self, key: bytes, turn: _Turn, call: KnownCall, found_by: tuple[bytes, ...]) -> None:
        self._turns.move_to_end(key)
        turn.replies.append((call, found_by))
        self._replies += 1
        self._known.update((found, (key, call)) for found in found_by)

    def _deepest(self, prints: list[bytes], messages: list[Message]) -> tuple[int | None, KnownCall | None]:
        """The last of the messages that this server said, with all that comes before it unchanged."""
        for at in reversed(range(len(prints))):
            known = self._known.get(prints[at]) if messages[at]["role"] == "assistant" else None
            if known is not None:
                self._turns.move_to_end(known[0])
                return at, known[1]
        return None, None

    def _later_replies(
        self, scope: str, messages: list[Message], base: int | None, continues: bool
    ) -> dict[int, KnownCall]:
        """Messages behind the base that this server said, in this conversation or in another of the scope."""
        found = {}
        for at in range(0 if base is None else base + 1, len(messages) - continues):
            if messages[at]["role"] == "assistant":
                echoes = _echoes(scope, messages[:at], messages[at])
                known = next((self._known[echo] for echo in echoes if echo in self._known), None)
                if known is not None:
                    found[at] = known[1]
        return found

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
        base: KnownCall | None,
        later: Mapping[int, KnownCall],
    ) -> list[int]:
        if at is not None and base is not None:
            if continues and at == len(messages) - 1:
                return self._reopened(base)
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
        replies: Mapping[int, KnownCall],
        *,
        head: bool,
    ) -> list[int] | None:
        """Replies as they were sampled, and between them what the template puts there; without `head`, the first one
        with all that came before it."""
        pieces = self._renderer.around(messages, tools, list(replies), options, continues, head=head)
        if pieces is None:
            return None
        ids = self._renderer.encode(pieces[0])
        for number, (call, text) in enumerate(zip(replies.values(), pieces[1:], strict=True)):
            ids += call.sampled_ids if head or number else call.ids
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
            for call, found_by in oldest.replies:
                self._sequences.release(call)
                for found in found_by:
                    if self._known.get(found, (b"", None))[1] is call:
                        del self._known[found]


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


def _joined(begun: Message, reply: Message) -> Message:
    return {**reply, "content": (begun.get("content") or "") + (reply.get("content") or "")}


def _turn_key(print_: bytes, continues: bool) -> bytes:
    return print_ + bytes([continues])


def _raw_key(scope: str, ids: list[int]) -> bytes:
    return _digest(_dump([scope, "raw"]) + pack(ids))


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"
