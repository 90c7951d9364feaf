"""What lowering refuses, method by method: the reason names what is wrong, before anything is served."""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType
from safetensors.torch import save_file

from onebase_adapters.base_shape import BaseShape, Site
from onebase_adapters.errors import AdapterError, AdapterFormatError, AdapterMismatchError
from onebase_adapters.lowering.lower import METHODS, UNSERVED, load_adapter
from onebase_adapters.lowering.saved_modules import split_saved
from onebase_adapters.lowering.source import Source, canonical_names
from onebase_adapters.primitives.instruction_set import (
    Bottleneck,
    Head,
    KVPrefix,
    LowRank,
    Rescale,
    Shift,
    Template,
    VirtualTokens,
)
from support.methods import CONFIGS

HIDDEN, LAYERS, HEADS, DIM, VOCAB = 8, 2, 2, 4, 30
SITE = "model.layers.0.self_attn.q_proj"
BASE = BaseShape(
    name="base", hub_id="base", fingerprint="f00d", model_type="llama", layers=LAYERS, hidden=HIDDEN, vocab=VOCAB,
    context=64, sites={name: Site(name, HIDDEN, width) for name, width in ((SITE, 8), ("lm_head", VOCAB))},
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
    return Source(config, canonical_names(tensors, BASE), sidecar, BASE, Weights())


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
MULTITASK = {
    "prompt_embeddings": torch.ones(4, HIDDEN),
    "prefix_task_cols": torch.ones(2, 4, 3),
    "prefix_task_rows": torch.ones(2, 3, HIDDEN),
}
TOKENS = {"base_model.model.model.embed_tokens.trainable_tokens_delta": torch.full((2, HIDDEN), 4.0)}
POLY = {
    f"{SITE}.poly_lora_A": torch.ones(2, 3, HIDDEN // 2, 2),
    f"{SITE}.poly_lora_B": torch.ones(2, 3, 2, HIDDEN // 2),
    f"{SITE}.poly_router.module_logits": torch.ones(1, 6),
}
HIRA = {
    f"base_model.model.{SITE}.hira_A": torch.ones(2, HIDDEN),
    f"base_model.model.{SITE}.hira_B": torch.ones(HIDDEN, 2),
}
PVERA = {
    f"base_model.model.{SITE}.pvera_lambda_b": torch.ones(HIDDEN),
    f"base_model.model.{SITE}.pvera_lambda_d": torch.ones(4),
    "base_model.pvera_A": torch.ones(4, HIDDEN),
    "base_model.pvera_B": torch.ones(HIDDEN, 2),
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
    "a task of several": (
        {"peft_type": "MULTITASK_PROMPT_TUNING"}, MULTITASK, {}, AdapterFormatError, "holds 2 tasks"
    ),
    "a task that is not": (
        {"peft_type": "MULTITASK_PROMPT_TUNING"}, MULTITASK, {"task": 2}, AdapterFormatError, "from 0 to 1"
    ),
    "half a task": (
        {"peft_type": "MULTITASK_PROMPT_TUNING"},
        {name: tensor for name, tensor in MULTITASK.items() if name != "prefix_task_rows"}, {"task": 1},
        AdapterFormatError, "'prefix_task_rows' is missing",
    ),
    "tasks of another rank": (
        {"peft_type": "MULTITASK_PROMPT_TUNING"}, MULTITASK | {"prefix_task_rows": torch.ones(2, 5, HIDDEN)},
        {"task": 1}, AdapterMismatchError, "needs 2 x 3 x 8",
    ),
    "a cartridge of another width": (
        {"peft_type": "CARTRIDGE"}, {"prompt_embeddings": torch.ones(3, HIDDEN)}, {}, AdapterMismatchError,
        f"needs any x {PREFIX_WIDTH}",
    ),
    "a token that is new": (
        {"peft_type": "TRAINABLE_TOKENS", "token_indices": [2, VOCAB]}, TOKENS, {}, AdapterMismatchError,
        "new tokens are not served",
    ),
    "a token twice": (
        {"peft_type": "TRAINABLE_TOKENS", "token_indices": [2, 2]}, TOKENS, {}, AdapterFormatError, "twice"
    ),
    "more tokens than rows": (
        {"peft_type": "TRAINABLE_TOKENS", "token_indices": [2, 3, 4]}, TOKENS, {}, AdapterMismatchError,
        "needs 3 x 8",
    ),
    "tokens of no module": (
        {"peft_type": "LORA", "r": 2, "trainable_token_indices": {"lm_head": [1, 2]}}, PAIR | TOKENS, {},
        AdapterFormatError, "must list the tokens of 'model.embed_tokens'",
    ),
    "a skill of no task": (
        {"peft_type": "POLY"}, {name: tensor for name, tensor in POLY.items() if "router" not in name}, {},
        AdapterFormatError, "module_logits' is missing",
    ),
    "skills of another width": (
        {"peft_type": "POLY"}, POLY | {f"{SITE}.poly_lora_A": torch.ones(2, 3, 5, 2)}, {}, AdapterMismatchError,
        "2 splits of 5 inputs do not fit",
    ),
    "a bias of another width": (
        {"peft_type": "BEFT"}, {f"{SITE}.beft_bias": torch.ones(1, 5)}, {}, AdapterMismatchError, "needs 1 x 8"
    ),
    "half a general update": (
        {"peft_type": "HIRA", "r": 2}, {f"base_model.model.{SITE}.hira_A": torch.ones(2, HIDDEN)}, {},
        AdapterFormatError, "hira_B.default' is missing",
    ),
    "a general update of another width": (
        {"peft_type": "HIRA", "r": 2}, HIRA | {f"base_model.model.{SITE}.hira_A": torch.ones(2, 5)}, {},
        AdapterFormatError, "size mismatch for base_model.model.model.layers.0.self_attn.q_proj.hira_A",
    ),
    "a setting that PEFT does not know": (
        {"peft_type": "HIRA", "r": "x"}, HIRA, {}, AdapterFormatError, "PEFT cannot read this adapter"
    ),
    "an update that is drawn anew": (
        {"peft_type": "PVERA", "r": 2, "sample_at_inference": True, "save_projection": True}, PVERA, {},
        AdapterFormatError,
        "belongs to no site" if version("peft") < "0.20" else "does not compute what its merged weights do",
    ),
    "a PiSSA that was not converted": (
        {"peft_type": "LORA", "r": 2, "init_lora_weights": "pissa_niter_16"}, PAIR, {}, AdapterFormatError,
        "path_initial_model_for_weight_conversion",
    ),
    "layers that are not the base's": (
        {"peft_type": "LORA", "r": 2, "layer_replication": [[0, 2], [1, 2]]}, PAIR, {}, AdapterFormatError,
        "replicated layers",
    ),
    "DoRA of the embedding": (
        {"peft_type": "LORA", "r": 2, "use_dora": True},
        {f"{BASE.embedding}.lora_magnitude_vector": torch.ones(1, HIDDEN)}, {}, AdapterFormatError,
        "DoRA of the embedding",
    ),
    "an adapter that chooses": (
        {"peft_type": "LORA", "r": 2, "arrow_config": {"top_k": 2}}, PAIR, {}, AdapterFormatError, "Arrow"
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
    if config["peft_type"] == "HIRA" and "HIRA" not in PeftType.__members__:
        pytest.skip("this PEFT has no HiRA")
    with pytest.raises(kind) as refusal:
        lower(config, tensors, **sidecar)
    assert message in refusal.value.message


def test_tokens_of_a_tied_head_change_with_the_embedding() -> None:
    config = {"peft_type": "LORA", "trainable_token_indices": {"embed_tokens": [2, 7]}}
    (untied,) = split_saved(source(config, TOKENS))[0]
    tied = split_saved(replace(source(config, TOKENS), base=replace(BASE, tied_head="lm_head")))[0]
    assert [part.site for part in tied if isinstance(part, LowRank)] == [BASE.embedding, "lm_head"]
    wanted = torch.zeros(VOCAB, HIDDEN)
    wanted[[2, 7]] = 3.0
    for part in (untied, *tied):
        assert isinstance(part, LowRank)
        change = part.b @ part.a
        assert torch.equal(change.t() if part.site == BASE.embedding else change, wanted)


def test_every_type_of_peft_is_served_as_peft_computes_it_or_refused_with_a_reason(tmp_path: Path) -> None:
    """A release of PEFT with another type fails here."""
    compared = {config().peft_type.value for config in CONFIGS.values()}
    save_file({}, tmp_path / "adapter_model.safetensors")
    for kind in (kind.value for kind in PeftType):
        if kind in METHODS:
            assert kind in compared, f"{kind} has no configuration in tests/support/methods.py to compare it by"
            continue
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        with pytest.raises(AdapterFormatError) as refusal:
            load_adapter(tmp_path, "digest", BASE, Weights())
        assert refusal.value.message == f"{kind} is not served. It {UNSERVED[kind]}"
        assert refusal.value.field == "peft_type"
    assert not METHODS.keys() & UNSERVED.keys()


def test_a_site_takes_one_change_of_a_kind(tmp_path: Path) -> None:
    bias = {f"base_model.model.{SITE}.bias": torch.ones(HIDDEN)}
    save_file({f"{SITE}.beft_bias": torch.ones(1, HIDDEN)} | bias, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "BEFT"}))
    with pytest.raises(AdapterFormatError, match="changed twice"):
        load_adapter(tmp_path, "digest", BASE, Weights())
