"""The adapter instruction set: what every PEFT method is lowered to, and all that the engine knows of adapters."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LowRank:
    """y += scale * B (A x) at a linear site (LoRA, Hu et al. 2021, section 4.1)."""

    site: str
    a: torch.Tensor
    """[rank, in_features]"""
    b: torch.Tensor
    """[out_features, rank]"""
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def parameters(self) -> int:
        return self.a.numel() + self.b.numel()


Primitive = LowRank


@dataclass(frozen=True)
class LoweredAdapter:
    """An adapter as the engine takes it: named after its content, made of primitives, fit for one base."""

    digest: str
    method: str
    primitives: tuple[Primitive, ...]

    @property
    def parameters(self) -> int:
        return sum(primitive.parameters for primitive in self.primitives)

    @property
    def rank(self) -> int | None:
        """The largest rank, None where nothing has one."""
        return max((p.rank for p in self.primitives if isinstance(p, LowRank)), default=None)

    def summary(self) -> tuple[str, ...]:
        """Each kind of primitive with its count, e.g. `LowRank x 210`."""
        kinds = [type(primitive).__name__ for primitive in self.primitives]
        return tuple(f"{kind} x {kinds.count(kind)}" for kind in dict.fromkeys(kinds))
