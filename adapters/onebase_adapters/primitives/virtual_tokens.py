"""Where an adapter's virtual tokens stand among a request's tokens. No torch: the engine's scheduler reads it.

Virtual tokens are ids past the vocabulary, in the order of the adapter: first those of its KVPrefix, then those of
its VirtualTokens. So scheduling, hashing and chunking treat them as any other token.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """An adapter's virtual tokens."""

    prefix: int = 0
    """Learned keys and values in front of everything."""
    places: tuple[int, ...] = ()
    """For each learned embedding: k >= 0 is before the prompt's k-th token, -1 after the last one."""

    @property
    def tokens(self) -> int:
        """How many there are: what a request gives up of its context."""
        return self.prefix + len(self.places)

    def arrange(self, prompt: Sequence[int], vocab: int) -> list[int]:
        """The prompt with the virtual tokens in their places. Places past the prompt's end are at its end."""
        if not self.tokens:
            return list(prompt)
        end = len(prompt)
        before: list[list[int]] = [[] for _ in range(end + 1)]
        for number, place in enumerate(self.places):
            at = end if place < 0 else min(place, end)
            before[at].append(vocab + self.prefix + number)
        tokens = list(range(vocab, vocab + self.prefix))
        for at, virtual in enumerate(before):
            tokens += virtual
            tokens += prompt[at : at + 1]
        return tokens


NO_LAYOUT = Layout()
"""The layout of the base, and of adapters without virtual tokens."""
