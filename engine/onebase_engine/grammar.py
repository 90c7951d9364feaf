"""Grammars that an output has to follow: compiled off the step loop, then a mask over the vocabulary a token.

Invariant: a sequence's matcher has taken exactly the tokens of its output. Preemption drops none, so it needs no
undoing.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from onebase_adapters.errors import OneBaseError

_KEPT = 256
"""Compiled grammars kept for the next request with the same."""
_LIMITS = LLParserLimits(verbose_errors=False)


class GrammarError(OneBaseError):
    """The grammar cannot be compiled."""


class Grammar:
    """One sequence's way through its grammar."""

    def __init__(self, compiled: "Future[LLMatcher]") -> None:
        self._compiled = compiled

    @property
    def ready(self) -> bool:
        """Whether it is compiled. Raises GrammarError if it cannot be."""
        if not self._compiled.done():
            return False
        if (failure := self._compiled.exception()) is not None:
            raise GrammarError(f"Grammars do not work with this base's tokenizer: {failure}")
        if self._compiled.result().is_error():
            raise GrammarError(f"The grammar cannot be compiled: {self._compiled.result().get_error()}")
        return True

    @property
    def over(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why it failed, if it did: it grew too complex over this output."""
        return self._matcher.get_error() if self._matcher.is_error() else None

    def allowed(self) -> bytes:
        """The tokens that it goes on by: a bit for each of the vocabulary, the lowest of each byte first."""
        return self._matcher.compute_bitmask()

    def take(self, token: int) -> bool:
        """Go on by a chosen token; false if it has failed."""
        return token >= 0 and self._matcher.consume_token(token)

    @cached_property
    def _matcher(self) -> LLMatcher:
        return self._compiled.result().deep_copy()


class Grammars:
    """Compiles, and remembers. `start` is for the step loop, the work is done in a thread."""

    def __init__(
        self, tokenizer: Callable[[], str], vocab: int, end_tokens: Iterable[int], wake: Callable[[], None]
    ) -> None:
        """`tokenizer` gives its definition as JSON; it is read once the first grammar comes. `wake` is called, from
        the thread, when a grammar has been compiled."""
        self._definition = tokenizer
        self._vocab = vocab
        self._end_tokens = sorted(end_tokens)
        self._wake = wake
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar-compiler")
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()

    def start(self, grammar: str) -> Grammar:
        """A new sequence's grammar, which may have to be waited for."""
        if grammar not in self._compiled:
            future = self._compiler.submit(self._compile, grammar)
            future.add_done_callback(lambda _: self._wake())
            self._compiled[grammar] = future
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return Grammar(self._compiled[grammar])

    def close(self) -> None:
        """Stop the thread."""
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(self._definition(), n_vocab=self._vocab, eos_token=self._end_tokens)
