"""Composing adapters: the sum of what each changes, computed plainly; and what is refused."""

from collections.abc import Sequence

import pytest
import torch

from onebase_adapters.compose import Weighted, compose
from onebase_adapters.errors import AdapterMismatchError
from onebase_adapters.primitives.by_site import Parts
from onebase_adapters.primitives.instruction_set import (
    Bottleneck,
    Head,
    KVPrefix,
    LowRank,
    Primitive,
    Rescale,
    Shift,
    Template,
    VirtualTokens,
)
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter

IN, OUT = 6, 5
WEIGHT = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(seed: int, rank: int = 2, scale: float = 0.5) -> LowRank:
    return LowRank("w", noise(rank, IN, seed=seed), noise(OUT, rank, seed=seed + 1), scale)


def factors(seed: int, side: str = "output") -> Rescale:
    return Rescale("w", 1 + 0.3 * noise(OUT if side == "output" else IN, seed=seed), side)  # type: ignore[arg-type]


KINDS: dict[str, tuple[Primitive, ...]] = {
    "lora": (lora(1),),
    "wide": (lora(3, rank=4, scale=2.0),),
    "ia3": (factors(5),),
    "ia3-again": (factors(6),),
    "dora": (lora(7), factors(9), Shift("w", noise(OUT, seed=10))),
    "bias": (Shift("w", noise(OUT, seed=11)),),
    "elsewhere": (LowRank("v", noise(1, IN, seed=12), noise(OUT, 1, seed=13), 1.0),),
}
INPUTS: dict[str, tuple[Primitive, ...]] = {
    "input": (factors(14, "input"),),
    "input-again": (factors(15, "input"),),
    "bias": KINDS["bias"],
}


def output(adapter: LoweredAdapter, x: torch.Tensor) -> torch.Tensor:
    """What the site w gives under an adapter: the order that `primitives` states."""
    parts = Parts.of(adapter)
    y = WEIGHT @ (x * parts.inputs.get("w", 1.0))
    if (update := parts.low_rank.get("w")) is not None:
        y = y + update.scale * (update.b @ (update.a @ x))
    return y * parts.outputs.get("w", 1.0) + parts.shifts.get("w", 0.0)


def adapters(kinds: dict[str, tuple[Primitive, ...]], weights: Sequence[float]) -> list[Weighted]:
    return [
        Weighted(name, LoweredAdapter(name, "x", primitives, (f"of {name}",)), weight)
        for (name, primitives), weight in zip(kinds.items(), weights, strict=True)
    ]


@pytest.mark.parametrize("kinds", [KINDS, INPUTS], ids=["outputs", "inputs"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_changes_add_up(kinds: dict[str, tuple[Primitive, ...]], count: int) -> None:
    x, base = noise(IN, seed=20), LoweredAdapter("base", "x", ())
    names = list(kinds)
    for first in range(len(names)):
        chosen = {name: kinds[name] for name in (names[first:] + names[:first])[:count]}
        parts = adapters(chosen, [0.7, -0.3, 1.0, 2.0, 0.1, -1.0, 0.5][: len(chosen)])
        together = compose("all", parts)
        expected = output(base, x)
        for part in parts:
            expected = expected + part.weight * (output(part.adapter, x) - output(base, x))
        torch.testing.assert_close(output(together, x), expected)
        sites = [(type(p), p.site, getattr(p, "side", "")) for p in together.primitives]  # type: ignore[union-attr]
        assert len(set(sites)) == len(sites)
        assert together.digest == "all"
        assert together.notes == tuple(f"of {name}" for name in chosen)


def test_ranks_add_up_and_one_update_keeps_its_numbers() -> None:
    both = compose("both", adapters({"lora": KINDS["lora"], "wide": KINDS["wide"]}, [1.0, 1.0]))
    assert both.rank == 6
    half = compose("half", adapters({"lora": KINDS["lora"]}, [0.5])).one(LowRank)
    assert half is not None
    assert half.a is lora(1).a or torch.equal(half.a, lora(1).a)
    assert half.scale == 0.25


def bottleneck(seed: int, rank: int, activation: str = "relu") -> Bottleneck:
    down, up = noise(rank, IN, seed=seed), noise(IN, rank, seed=seed + 1)
    biases = noise(rank, seed=seed + 2), noise(IN, seed=seed + 3)
    return Bottleneck("mlp", down, biases[0], up, biases[1], activation, 0.5, False)  # type: ignore[arg-type]


def test_bottlenecks_lie_side_by_side() -> None:
    def change(part: Bottleneck, s: torch.Tensor) -> torch.Tensor:
        return part.scale * (part.up @ torch.relu(part.down @ s + part.down_bias) + part.up_bias)

    one, two, s = bottleneck(1, 3), bottleneck(5, 2), noise(IN, seed=9)
    both = compose("both", adapters({"one": (one,), "two": (two,)}, [0.7, -2.0])).one(Bottleneck)
    assert both is not None
    torch.testing.assert_close(change(both, s), 0.7 * change(one, s) - 2.0 * change(two, s))
    half = compose("half", adapters({"one": (one,)}, [0.5])).one(Bottleneck)
    assert half is not None
    torch.testing.assert_close(change(half, s), 0.5 * change(one, s))


WHOLE: dict[str, Primitive] = {
    "learned prompt tokens": VirtualTokens(noise(2, 4, seed=1), (0, 0)),
    "a learned prefix": KVPrefix(noise(1, 3, 1, 2, seed=1), noise(1, 3, 1, 2, seed=2)),
    "a classification head": Head("sequence", "last", noise(2, 4, seed=1), noise(2, seed=2), ("no", "yes")),
    "a template": Template("Q: "),
}


@pytest.mark.parametrize("what", WHOLE)
def test_what_a_request_has_once(what: str) -> None:
    whole = WHOLE[what]
    together = compose("both", adapters({"one": (whole,), "lora": KINDS["lora"]}, [1.0, 0.5]))
    assert together.one(type(whole)) is whole
    with pytest.raises(AdapterMismatchError, match=f"one and two do not compose: each has {what}") as caught:
        compose("both", adapters({"one": (whole,), "lora": KINDS["lora"], "two": (whole,)}, [1.0] * 3))
    assert caught.value.field == "adapters"
    with pytest.raises(AdapterMismatchError, match=f"one has {what}: its weight can only be 1"):
        compose("half", adapters({"one": (whole,)}, [0.5]))


def test_a_prefix_and_prompt_tokens_go_together() -> None:
    parts = {"prefix": (WHOLE["a learned prefix"],), "tokens": (WHOLE["learned prompt tokens"],)}
    layout = compose("both", adapters(parts, [1.0, 1.0])).layout
    assert (layout.prefix, layout.places) == (3, (0, 0))


REFUSED: dict[str, tuple[Primitive, Primitive]] = {
    "input multiplied and its output changed": (factors(1, "input"), lora(2)),
    "its input multiplied": (factors(1, "input"), factors(2)),
    "factors cancel the output": (Rescale("w", torch.zeros(OUT), "output"), lora(2)),
    "differ in their activation": (bottleneck(1, 2), bottleneck(5, 2, "gelu")),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_compose(why: str) -> None:
    one, two = REFUSED[why]
    with pytest.raises(AdapterMismatchError, match=why) as caught:
        compose("both", adapters({"one": (one,), "two": (two,)}, [1.0, 1.0]))
    assert caught.value.field == "adapters"
