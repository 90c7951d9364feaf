"""What `onebase methods` tells of a base of three layers, from bases of one and of two."""

from collections.abc import Callable
from pathlib import Path

import pytest

from onebase_training.comparison.method_costs import overview
from onebase_training.methods.attach import METHODS

HIDDEN, INNER, KV, LAYERS, RANK, VIRTUAL = 64, 128, 32, 3, 16, 20
SITES = (
    (HIDDEN, HIDDEN),
    (HIDDEN, KV),
    (HIDDEN, KV),
    (HIDDEN, HIDDEN),
    (HIDDEN, INNER),
    (HIDDEN, INNER),
    (INNER, HIDDEN),
)
LORA = LAYERS * sum(RANK * (before + after) for before, after in SITES)


@pytest.mark.parametrize(
    ("name", "trained", "products", "context", "served_as"),
    [
        ("qlora", LORA, LORA, 0, "LowRank"),
        ("dora", LORA + LAYERS * sum(after for _, after in SITES), None, 0, "LowRank, Rescale"),
        ("ia3", LAYERS * (KV + KV + INNER), None, 0, "Rescale"),
        ("prompt-tuning", VIRTUAL * HIDDEN, 0, VIRTUAL, "VirtualTokens"),
        ("prefix-tuning", VIRTUAL * LAYERS * 2 * KV, 0, VIRTUAL, "KVPrefix"),
        ("hard-prompt", 0, 0, 0, "Template"),
    ],
)
def test_counts(
    name: str,
    trained: int,
    products: int | None,
    context: int,
    served_as: str,
    tiny_model: Callable[[str], Path],
) -> None:
    found = overview(name, METHODS[name], str(tiny_model("llama")))
    assert (found.trained, found.context, found.served_as) == (trained, context, served_as)
    if products is not None:
        assert found.products == products


def test_what_needs_too_large_a_rank_is_not_served(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]
) -> None:
    found = overview("oft", METHODS["oft"], str(tiny_model("llama")))
    assert found.served_as == "LowRank" and found.products > LORA
    monkeypatch.setattr("onebase_adapters.lowering.weight_methods.MOST_RANK", 8)
    assert overview("oft", METHODS["oft"], str(tiny_model("llama"))).served_as == "not: merged only"
