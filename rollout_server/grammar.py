"""Grammars that a reply must fit, token by token: llguidance behind what the web checks and the scheduler asks.

A grammar is what `llguidance.LLMatcher` takes: Lark, or JSON that holds Lark and JSON schemas. All work on one is
bounded, by `grammar_limits` before llguidance sees it and by llguidance's own fuel after. Grammars are compiled one
after the other in one thread, so that a flood of hostile ones costs one core and no other thread waits for the GIL;
its stack is large because llguidance recurses along references. What was compiled, or refused, is kept for a while:
groups and episodes ask with the same schema. Nothing is built before the first grammar arrives.

Where the text may end is said by an id of our own, beyond those of the tokenizer: a request's stop ids are not the
tokenizer's, and may be ids of common text.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from rollout_server.grammar_limits import MAX_TEXT, objection
from rollout_server.manager.masking import GrammarError

log = logging.getLogger("lrl.grammar")

LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=30_000,
    max_items_in_row=4_500,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
"""Per grammar and per mask; measured as `grammar_limits` says. An optional property is 4 items of a row."""
STACK = 256 << 20
"""Bytes of address space. The deepest grammars of `MAX_TEXT` characters occupied 125 MB in all while they were compiled."""
KEPT = 128
KEPT_TEXT = 8 * MAX_TEXT
"""Characters of all the grammars that are kept: what a compiled one occupies goes with its length."""

_END = "<|the end of a grammar|>"


class Vocabulary:
    """A model's tokenizer as llguidance wants it, and where things are in its masks. Takes about a second to make."""

    def __init__(self, model_dir: Path, size: int) -> None:
        try:
            tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        except Exception as error:  # the tokenizers library has no error types of its own
            raise GrammarError(f"the model's tokenizer.json cannot be read: {error}") from error
        tokenizer.add_special_tokens([_END])
        end = tokenizer.token_to_id(_END) or 0
        text = tokenizer.to_str()
        try:
            self.inner = LLTokenizer(text, n_vocab=max(size, end + 1), eos_token=end)
        except Exception as error:  # nor has llguidance
            raise GrammarError(f"the model's tokenizer is of a kind that grammars cannot use: {error}") from error
        self.size = size
        self.mask_bytes = -(-size // 8)
        self.last_bits = 0xFF >> (-size % 8)
        """Bits of a mask's last byte that stand for ids."""
        self.end_byte, self.end_bit = end >> 3, 1 << (end & 7)


class Matcher:
    """Where a sequence is in its grammar (`manager.masking.Masker`). For one thread at a time."""

    __slots__ = ("__weakref__", "_inner", "_mask", "_vocabulary")

    def __init__(self, inner: LLMatcher, vocabulary: Vocabulary, mask: bytes | None = None) -> None:
        self._inner, self._vocabulary, self._mask = inner, vocabulary, mask

    def allowed(self, stop_ids: Collection[int], *, go_on: bool = False) -> bytes:
        vocabulary, mask = self._vocabulary, bytearray(self._look())
        may_end = mask[vocabulary.end_byte] & vocabulary.end_bit
        mask[vocabulary.end_byte] &= ~vocabulary.end_bit
        del mask[vocabulary.mask_bytes :]
        mask[-1] &= vocabulary.last_bits
        stops = [token for token in stop_ids if 0 <= token < vocabulary.size]
        for token in stops:
            mask[token >> 3] &= ~(1 << (token & 7))
        if may_end and not (go_on and any(mask)):
            for token in stops:
                mask[token >> 3] |= 1 << (token & 7)
        if mask.count(0) == len(mask):
            raise GrammarError("the model has no token that its grammar allows next")
        return bytes(mask)

    def take(self, token: int) -> None:
        self._mask = None
        if not self._inner.consume_token(token):
            raise GrammarError(f"token {token} does not fit its grammar: {_first_line(self._inner.get_error())}")

    @property
    def ended(self) -> bool:
        mask, vocabulary = self._look(), self._vocabulary
        return mask[vocabulary.end_byte] == vocabulary.end_bit and mask.count(0) == len(mask) - 1

    def fork(self) -> Matcher:
        return Matcher(self._inner.deep_copy(), self._vocabulary, self._mask)

    def _look(self) -> bytes:
        if self._mask is None:
            mask = self._inner.compute_bitmask()
            if self._inner.is_error():
                raise GrammarError(f"no mask can be had from its grammar: {_first_line(self._inner.get_error())}")
            self._mask = mask
        return self._mask


class Grammars:
    """Compiles grammars for one model; for any thread. The first one waits a second for the vocabulary, of which nobody else can do
    anything for 0.4 s: whoever never asks for a grammar pays nothing."""

    def __init__(self, model_dir: str | Path, vocab_size: int) -> None:
        self._model_dir, self._vocab_size = Path(model_dir), vocab_size
        self._known: OrderedDict[str, Matcher | GrammarError] = OrderedDict()
        self._known_text = 0
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._vocabulary: Vocabulary | GrammarError | None = None
        """Made and used in that thread; an error is why there is none."""

    def check(self, grammar: str) -> str | None:
        """What is wrong with it; None: nothing. Blocks while it is compiled."""
        try:
            self.matcher(grammar)
        except GrammarError as error:
            return str(error)
        return None

    def matcher(self, grammar: str) -> Matcher:
        """At the beginning of the text. Blocks while it is compiled. Raises GrammarError."""
        return self.kept(grammar) or self.begin(grammar).result()

    def kept(self, grammar: str) -> Matcher | None:
        """The same if it has been compiled already; None: it has not. Raises GrammarError if it was refused."""
        with self._lock:
            known = self._known.get(grammar)
            if known is None:
                return None
            self._known.move_to_end(grammar)
        if isinstance(known, GrammarError):
            raise known.with_traceback(None)  # otherwise it would grow by every raise
        return known.fork()

    def begin(self, grammar: str) -> Future[Matcher]:
        """Compile it meanwhile."""
        with self._lock:
            if self._thread is None:
                self._thread = _thread_with_a_large_stack()
        return self._thread.submit(self._compile, grammar)

    def _compile(self, grammar: str) -> Matcher:
        if (matcher := self.kept(grammar)) is not None:
            return matcher
        try:
            return self._compile_anew(grammar)
        except GrammarError:
            raise
        except BaseException as error:  # llguidance's panics are no Exceptions; whatever it is, only this grammar fails
            trace = "".join(traceback.format_tb(error.__traceback__))
            log.error("a defect: a grammar was neither compiled nor refused: %s\n%s", type(error).__name__, trace)
            raise GrammarError(f"it cannot be compiled ({type(error).__name__})") from error

    def _compile_anew(self, grammar: str) -> Matcher:
        if (why := objection(grammar)) is not None:
            raise GrammarError(why)
        try:
            made: Matcher | GrammarError = self._make(grammar)
        except GrammarError as error:
            made = error
        with self._lock:
            self._known[grammar] = made
            self._known_text += len(grammar)
            while len(self._known) > KEPT or self._known_text > KEPT_TEXT:
                self._known_text -= len(self._known.popitem(last=False)[0])
        if isinstance(made, GrammarError):
            raise made
        return made.fork()

    def _make(self, grammar: str) -> Matcher:
        if self._vocabulary is None:
            try:
                self._vocabulary = Vocabulary(self._model_dir, self._vocab_size)
            except GrammarError as error:
                self._vocabulary = error
        vocabulary = self._vocabulary
        if isinstance(vocabulary, GrammarError):
            raise vocabulary.with_traceback(None)
        inner = LLMatcher(vocabulary.inner, grammar, log_level=0, limits=LIMITS)
        if inner.is_error():
            raise GrammarError(_first_line(inner.get_error()))
        matcher = Matcher(inner, vocabulary)
        if matcher.ended:
            raise GrammarError("nothing but the empty text fits it")
        matcher.allowed(())
        return matcher


_stack_size = threading.Lock()
"""Held while the process's setting for new threads is another."""


def _thread_with_a_large_stack() -> ThreadPoolExecutor:
    with _stack_size:
        before = threading.stack_size(STACK)
        try:
            thread = ThreadPoolExecutor(1, "grammars")
            thread.submit(int).result()  # starts it
        finally:
            threading.stack_size(before)
    return thread


def _first_line(error: str) -> str:
    return error.splitlines()[0][:200] if error else "unknown"
