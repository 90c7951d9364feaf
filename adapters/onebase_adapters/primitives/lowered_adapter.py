"""An adapter as the engine takes it: primitives, and what they amount to."""

from dataclasses import dataclass
from typing import TypeVar

from onebase_adapters.primitives.instruction_set import (
    Bottleneck,
    KVPrefix,
    LowRank,
    Primitive,
    Rescale,
    Shift,
    VirtualTokens,
)
from onebase_adapters.primitives.virtual_tokens import Layout

P = TypeVar("P", bound=Primitive)


@dataclass(frozen=True)
class LoweredAdapter:
    """An adapter as the engine takes it: named after its content, made of primitives, fit for one base."""

    digest: str
    method: str
    primitives: tuple[Primitive, ...]
    notes: tuple[str, ...] = ()
    """Remarks for its owner, e.g. the error of an approximation."""
    chat_template: str | None = None
    """Its own, in place of the base's."""

    def of(self, kind: type[P]) -> list[P]:
        """The primitives of one kind."""
        return [primitive for primitive in self.primitives if isinstance(primitive, kind)]

    def one(self, kind: type[P]) -> P | None:
        """The primitive of a kind that an adapter has at most once."""
        return next(iter(self.of(kind)), None)

    @property
    def parameters(self) -> int:
        return sum(primitive.parameters for primitive in self.primitives)

    @property
    def rank(self) -> int | None:
        """The largest rank, None where nothing has one."""
        return max((update.rank for update in self.of(LowRank)), default=None)

    @property
    def sites(self) -> int:
        """How many modules of the base it changes."""
        return len({p.site for p in self.primitives if isinstance(p, LowRank | Rescale | Shift | Bottleneck)})

    @property
    def layout(self) -> Layout:
        """Its virtual tokens."""
        prefix, virtual = self.one(KVPrefix), self.one(VirtualTokens)
        return Layout(prefix.tokens if prefix else 0, virtual.places if virtual else ())

    def summary(self) -> tuple[str, ...]:
        """Each kind of primitive with its count, e.g. `LowRank x 210`."""
        kinds = [type(primitive).__name__ for primitive in self.primitives]
        return tuple(f"{kind} x {kinds.count(kind)}" for kind in dict.fromkeys(kinds))
