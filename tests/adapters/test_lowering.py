"""What lowering refuses, method by method: the reason names what is wrong, before anything is served."""

from pathlib import Path
from typing import Any

import pytest
import torch

from onebase_adapters.base.shape import BaseShape, Site
from onebase_adapters.errors import AdapterError, AdapterFormatError, AdapterMismatchError
from onebase_adapters.methods import METHODS
from onebase_adapters.methods.saved import split_saved
from onebase_adapters.methods.source import Source, canonical_names
from onebase_adapters.primitives import Bottleneck, Head, KVPrefix, LowRank, Rescale, Shift, Template, VirtualTokens

HIDDEN, LAYERS, HEADS, DIM, VOCAB = 8, 2, 2, 4, 30
SITE = "model.layers.0.self_attn.q_proj"
BASE = BaseShape(
    name="base", fingerprint="f00d", model_type="llama", layers=LAYERS, hidden=HIDDEN, vocab=VOCAB, context=64,
    sites={name: Site(name, HIDDEN, width) for name, width in ((SITE, 8), ("lm_head", VOCAB))},
    embedding="model.embed_tokens", kv_heads=HEADS, head_dim=DIM,
    sublayers=frozenset({"model.layers.0.mlp", "model.layers.0.self_attn"}),
)  # fmt: skip


class Weights:
    """The base's weights are all ones, biases twos."""

    def weight(self, site: str) -> torch.Tensor:
        if site == BASE.embedding:
            return torch.ones(VOCAB, HIDDEN)
        return torch.ones(BASE.sites[site].out_features, HIDDEN)

    def bias(self, site: str) -> torch.Tensor | None:
        return torch.full((BASE.sites[site].out_features,), 2.0)


def source(config: dict[str, Any], tensors: dict[str, torch.Tensor], **sidecar: Any) -> Source:
    return Source(config, canonical_names(tensors), sidecar, BASE, Weights())


def lower(config: dict[str, Any], tensors: dict[str, torch.Tensor], **sidecar: Any) -> list[Any]:
    saved, rest = split_saved(source(config, tensors, **sidecar))
    return [*saved, *METHODS[config["peft_type"]](rest).primitives]


def bottleneck(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    shapes = {"down.weight": (3, HIDDEN), "down.bias": (3,), "up.weight": (HIDDEN, 3), "up.bias": (HIDDEN,)}
    tensors = {f"model.layers.0.mlp.{leaf}": torch.ones(shape) for leaf, shape in shapes.items()}
    return tensors | {f"model.layers.0.mlp.{leaf.replace('_', '.')}": value for leaf, value in changes.items()}


BOTTLENECK = {"peft_type": "BOTTLENECK", "placement": "pfeiffer", "activation": "relu"}
PREFIX_WIDTH = LAYERS * 2 * HEADS * DIM
LABELS = {"kind": "sequence", "pooling": "last", "labels": ["a", "b"]}
PAIR = {
    f"base_model.model.{SITE}.lora_A.weight": torch.ones(2, HIDDEN),
    f"base_model.model.{SITE}.lora_B.weight": torch.ones(HIDDEN, 2),
}


def test_each_kind_of_primitive() -> None:
    (virtual,) = lower({"peft_type": "P_TUNING"}, {"prompt_embeddings": torch.ones(3, HIDDEN)}, places=[0, 2, -1])
    assert isinstance(virtual, VirtualTokens)
    assert virtual.places == (0, 2, -1)
    stored = torch.arange(5.0 * PREFIX_WIDTH).view(5, PREFIX_WIDTH)
    (prefix,) = lower({"peft_type": "PREFIX_TUNING"}, {"prompt_embeddings": stored})
    assert isinstance(prefix, KVPrefix)
    assert prefix.keys.shape == (LAYERS, 5, HEADS, DIM)
    # Of token 1 and layer 1: keys come third among (layer 0 keys, layer 0 values, layer 1 keys, layer 1 values).
    assert torch.equal(prefix.keys[1, 1].flatten(), stored[1, 2 * HEADS * DIM : 3 * HEADS * DIM])
    (part,) = lower(BOTTLENECK, bottleneck())
    assert isinstance(part, Bottleneck)
    (template,) = lower({"peft_type": "TEMPLATE", "before": "Q: ", "stop": ["\n"]}, {})
    assert template == Template("Q: ", stop=("\n",))
    (vector,) = lower({"peft_type": "IA3"}, {f"base_model.model.{SITE}.ia3_l": torch.ones(1, HIDDEN)})
    assert isinstance(vector, Rescale)
    assert vector.side == "input"


def test_what_is_saved_beside() -> None:
    tensors = PAIR | {
        "base_model.model.score.weight": torch.ones(2, HIDDEN),
        "base_model.model.lm_head.weight": torch.full((VOCAB, HIDDEN), 1.5),
        f"base_model.model.{SITE}.bias": torch.full((HIDDEN,), 5.0),
    }
    found = lower({"peft_type": "LORA", "r": 2, "lora_alpha": 2}, tensors, head=LABELS)
    (head,) = [p for p in found if isinstance(p, Head)]
    assert head.labels == ("a", "b")
    (shift,) = [p for p in found if isinstance(p, Shift)]
    assert torch.equal(shift.vector, torch.full((HIDDEN,), 3.0))
    replaced = next(p for p in found if isinstance(p, LowRank) and p.site == "lm_head")
    assert torch.allclose(replaced.b @ replaced.a, torch.full((VOCAB, HIDDEN), 0.5))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any], type[AdapterError], str]] = {
    "no such tensor": ({"peft_type": "P_TUNING"}, {}, {}, AdapterFormatError, "'prompt_embeddings' is missing"),
    "another width": (
        {"peft_type": "PROMPT_TUNING"}, {"prompt_embeddings": torch.ones(3, 5)}, {}, AdapterMismatchError,
        "3 x 5; this base needs any x 8",
    ),
    "another count": (
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, {"prompt_embeddings": torch.ones(3, HIDDEN)}, {},
        AdapterFormatError, "says 4 virtual tokens, the tensor has 3",
    ),
    "too many virtual tokens": (
        {"peft_type": "PROMPT_TUNING"}, {"prompt_embeddings": torch.ones(64, HIDDEN)}, {}, AdapterFormatError,
        "leave no room in a context of 64",
    ),
    "too long a prefix": (
        {"peft_type": "PREFIX_TUNING"}, {"prompt_embeddings": torch.ones(64, PREFIX_WIDTH)}, {},
        AdapterFormatError, "leave no room",
    ),
    "places of another length": (
        {"peft_type": "P_TUNING"}, {"prompt_embeddings": torch.ones(3, HIDDEN)}, {"places": [0]},
        AdapterFormatError, "must be 3 integers",
    ),
    "a tensor nobody knows": (
        {"peft_type": "P_TUNING"}, {"prompt_embeddings": torch.ones(1, HIDDEN), "x": torch.ones(1)}, {},
        AdapterFormatError, "'x' is not known",
    ),
    "half a bottleneck": (
        BOTTLENECK, {"model.layers.0.mlp.down.weight": torch.ones(3, HIDDEN)}, {}, AdapterFormatError,
        "down.bias' is missing",
    ),
    "another bottleneck": (
        BOTTLENECK, bottleneck(up_weight=torch.ones(HIDDEN, 4)), {}, AdapterMismatchError, "needs 8 x 3"
    ),
    "no such sublayer": (
        BOTTLENECK, {"model.layers.7.mlp.down.weight": torch.ones(3, HIDDEN)}, {}, AdapterMismatchError,
        "no sublayer 'model.layers.7.mlp'",
    ),
    "no such placement": ({**BOTTLENECK, "placement": "here"}, bottleneck(), {}, AdapterFormatError, "'here'"),
    "no such activation": ({**BOTTLENECK, "activation": "x"}, bottleneck(), {}, AdapterFormatError, "'x' is none"),
    "an empty template": ({"peft_type": "TEMPLATE"}, {}, {}, AdapterFormatError, "changes nothing"),
    "a template of no text": ({"peft_type": "TEMPLATE", "before": 3}, {}, {}, AdapterFormatError, "a string"),
    "a stop of no text": (
        {"peft_type": "TEMPLATE", "stop": [""]}, {}, {}, AdapterFormatError, "none of them empty"
    ),
    "a stop that is no list": (
        {"peft_type": "TEMPLATE", "stop": "x"}, {}, {}, AdapterFormatError, "a list"
    ),
    "turns of nobody": (
        {"peft_type": "TEMPLATE", "messages": [{"role": "x", "content": ""}]}, {}, {}, AdapterFormatError, "role"
    ),
    "a head without labels": (
        {"peft_type": "LORA", "r": 2}, PAIR | {"score.weight": torch.ones(2, HIDDEN)}, {}, AdapterFormatError,
        "no labels",
    ),
    "more labels than rows": (
        {"peft_type": "LORA", "r": 2}, PAIR | {"score.weight": torch.ones(3, HIDDEN)}, {"head": LABELS},
        AdapterMismatchError, "needs 2 x 8",
    ),
    "a classifier without its head": (
        {"peft_type": "LORA", "r": 2, "task_type": "SEQ_CLS"}, PAIR, {}, AdapterFormatError, "without its head"
    ),
    "a rank that is not": ({"peft_type": "LORA", "r": 5}, PAIR, {}, AdapterFormatError, "says rank 5"),
    "no such site": (
        {"peft_type": "IA3"}, {"model.layers.9.x.ia3_l": torch.ones(1, HIDDEN)}, {}, AdapterMismatchError,
        "no linear site",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    config, tensors, sidecar, kind, message = REFUSED[name]
    with pytest.raises(kind) as refusal:
        lower(config, tensors, **sidecar)
    assert message in refusal.value.message
