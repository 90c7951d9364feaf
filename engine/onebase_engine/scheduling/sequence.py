"""A request while the engine works on it: its state, its tokens, how far they are computed, its blocks.

    ASIDE ----> QUEUED ----> RUNNING ----> ENDED
      |           | ^           |            ^
      |           | +-preempted-+            |
      +-----------+--------------------------+   (aborted, refused, or failed)

Aside it waits for its adapter or its grammar, queued for its turn and for blocks.
"""

import enum
import hashlib
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from functools import cached_property

from onebase_adapters.primitives.virtual_tokens import NO_LAYOUT, Layout
from onebase_engine.cache.prefix_hash import BlockHash
from onebase_engine.grammar import Grammar
from onebase_engine.request import EngineRequest, FinishReason, TokenLogprobs


class State(enum.Enum):
    """Where a sequence is on its way."""

    ASIDE = enum.auto()
    QUEUED = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


_NEXT = {
    State.ASIDE: {State.QUEUED, State.ENDED},
    State.QUEUED: {State.RUNNING, State.ENDED},
    State.RUNNING: {State.QUEUED, State.ENDED},
    State.ENDED: set(),
}


@dataclass(eq=False)
class Sequence:
    """Invariant: the keys and values of tokens[:computed] are in `blocks`; the rest is still to be computed,
    be it prompt, a new token, or all of it again after a preemption."""

    request: EngineRequest
    arrival: int
    """Order of arrival; smaller is older."""
    eos_token_ids: frozenset[int]
    state: State = State.ASIDE
    slot: int = 0
    """Where its adapter is resident."""
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    """Those of the full blocks of `tokens`, as far as they have been needed."""
    salt: bytes = b""
    grammar: Grammar | None = None
    """The grammar that its output follows."""
    layout: Layout = NO_LAYOUT
    """The adapter's virtual tokens, which stand among `tokens`."""
    prompt_tokens: int = 0
    """Tokens before the output, virtual ones included."""
    own: Items[int] = ()
    """Ascending positions of the prompt's own tokens."""
    entered: float | None = None
    """When it was first queued, by the scheduler's clock."""
    cached_tokens: int = 0
    """Prompt tokens that were found in the cache when it first ran."""
    arrived: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    """Seconds until it first ran."""
    started: bool = False
    """Whether it has run at all (then `cached_tokens` is settled)."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Those of `scored`, as far as they are known."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.prompt_tokens = len(self.tokens)
        self.own = range(len(self.tokens))
        owner = f"{self.request.tenant}\0{self.request.adapter or ''}"
        if self.reads_all:
            # It must find none of its prompt computed, and leaves nothing that others could find.
            owner += f"\0{self.arrival}"
        self.salt = hashlib.blake2b(owner.encode(), digest_size=16).digest()

    def move(self, state: State) -> None:
        """Go on to another state. Raises RuntimeError for a step that the drawing above does not have."""
        if state not in _NEXT[self.state]:
            raise RuntimeError(f"Request {self.request.id} cannot be {state.name} after {self.state.name}.")
        self.state = state

    def place(self, slot: int, layout: Layout, vocab: int) -> None:
        """Take up the resident adapter's slot and its virtual tokens, before anything is computed."""
        self.slot = slot
        self.layout = layout
        if layout.tokens:
            asked = len(self.request.prompt) - self.request.said
            self.tokens = [*layout.arrange(self.request.prompt[:asked], vocab), *self.request.prompt[asked:]]
            self.prompt_tokens = len(self.tokens)
            self.own = [position for position, token in enumerate(self.tokens) if token < vocab]

    @property
    def reads_all(self) -> bool:
        """Whether it needs what the model makes of all its prompt."""
        task = self.request.task
        return task in ("classify", "embed") or (
            task == "generate" and self.request.sampling.prompt_logprobs is not None
        )

    @property
    def scored(self) -> Items[int]:
        """Positions of the prompt's tokens whose log-probabilities are wanted."""
        if self.request.task == "score":
            return self.own[len(self.own) - self.request.scored :]
        return self.own[1:] if self.reads_all and self.request.task == "generate" else ()

    @property
    def reusable(self) -> int:
        """How many of its first tokens may be found computed. What tells of the next token is not kept: the last
        token is always computed, and whatever comes before one that is scored."""
        return min(len(self.tokens) - 1, self.scored[0] - 1 if self.request.task == "score" else len(self.tokens))

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def missing(self) -> int:
        """Tokens not yet computed."""
        return len(self.tokens) - self.computed

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end it."""
        sampling = self.request.sampling
        eos = frozenset() if sampling.ignore_eos else self.eos_token_ids
        return eos | frozenset(sampling.stop_token_ids)

    def append(self, token: int) -> FinishReason | None:
        """Take a chosen token; a stop token is not kept. Returns why the sequence is over, if it is."""
        sampling = self.request.sampling
        if self.generated >= sampling.min_tokens and token in self.stop_tokens:
            return "stop"
        self.tokens.append(token)
        return "length" if self.generated >= sampling.max_tokens else None
