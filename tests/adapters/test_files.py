"""Adapters that nobody should serve: each is refused with its reason before anything of it is resident."""

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from onebase_adapters.base_shape import BaseShape, Site
from onebase_adapters.errors import AdapterError, AdapterFormatError, AdapterMismatchError, AdapterPathError
from onebase_adapters.lowering.lower import load_adapter
from onebase_adapters.lowering.source import canonical_names
from onebase_adapters.primitives.instruction_set import LowRank

BASE = BaseShape(
    name="tiny",
    hub_id="tiny",
    fingerprint="f00d",
    model_type="llama",
    layers=1,
    hidden=8,
    vocab=32,
    context=64,
    sites={name: Site(name, 8, out) for name, out in (("layers.0.q_proj", 16), ("layers.0.v_proj", 4))},
    embedding="embed_tokens",
)
Q, V = "base_model.model.layers.0.q_proj", "base_model.model.layers.0.v_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


class NoWeights:
    """LoRA is lowered without looking at the base's weights."""

    def weight(self, site: str) -> torch.Tensor:
        raise AssertionError(f"{site} was read")

    def bias(self, site: str) -> torch.Tensor | None:
        raise AssertionError(f"the bias of {site} was read")


def good() -> Tensors:
    return {
        f"{Q}.lora_A.weight": torch.ones(2, 8),
        f"{Q}.lora_B.weight": torch.ones(16, 2),
        f"{V}.lora_A.weight": torch.ones(2, 8),
        f"{V}.lora_B.weight": torch.ones(4, 2),
    }


def save(folder: Path, config: Mapping[str, Any] = CONFIG, tensors: Tensors | None = None) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors or good(), folder / "adapter_model.safetensors")
    return folder


def load(folder: Path) -> tuple[LowRank, ...]:
    return tuple(load_adapter(folder, "digest", BASE, NoWeights()).of(LowRank))


def test_a_good_one(tmp_path: Path) -> None:
    updates = load(save(tmp_path))
    assert [(u.site, u.rank, u.scale) for u in updates] == [
        ("layers.0.q_proj", 2, 2.0),
        ("layers.0.v_proj", 2, 2.0),
    ]


def test_ranks_and_scales_are_each_sites_own(tmp_path: Path) -> None:
    tensors = good() | {f"{V}.lora_A.weight": torch.ones(4, 8), f"{V}.lora_B.weight": torch.ones(4, 4)}
    config = CONFIG | {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 6}, "use_rslora": True}
    updates = load(save(tmp_path, config, tensors))
    assert [(u.rank, u.scale) for u in updates] == [(2, pytest.approx(4 / 2**0.5)), (4, 3.0)]


NAMED = {name: Site(name, 8, 8) for name in ("model.layers.0.q", "model.layers.1.q", "lm_head")}


@pytest.mark.parametrize(
    ("stored", "meant"),
    [
        ("base_model.model.model.layers.0.q.lora_A.weight", "model.layers.0.q.lora_A.weight"),
        ("base_model.model.layers.0.q.lora_A.weight", "model.layers.0.q.lora_A.weight"),
        ("layers.0.q.lora_A.weight", "model.layers.0.q.lora_A.weight"),
        ("base_model.model.language_model.model.layers.0.q.lora_A.weight", "model.layers.0.q.lora_A.weight"),
        ("base_model.model.model.language_model.layers.0.q.lora_A.weight", "model.layers.0.q.lora_A.weight"),
        ("_orig_mod.base_model.model.model.layers.0.q.lora_B.weight", "model.layers.0.q.lora_B.weight"),
        ("module.base_model.model.model.layers.1._orig_mod.q.lora_A.weight", "model.layers.1.q.lora_A.weight"),
        ("base_model.model.model.layers.0.q.lora_A.mine.weight", "model.layers.0.q.lora_A.weight"),
        ("base_model.model.model.layers.0.q.lora_A.default.weight", "model.layers.0.q.lora_A.weight"),
        ("base_model.model.lm_head.lora_A.weight", "lm_head.lora_A.weight"),
        ("base_model.model.model.layers.7.q.lora_A.weight", "model.layers.7.q.lora_A.weight"),
        ("prompt_embeddings", "prompt_embeddings"),
    ],
)
def test_sites_are_found_behind_other_prefixes(stored: str, meant: str) -> None:
    assert list(canonical_names({stored: torch.ones(1)}, replace(BASE, sites=NAMED))) == [meant]


def test_weights_in_shards_or_compressed(tmp_path: Path) -> None:
    expected = load(save(tmp_path))
    whole = tmp_path / "adapter_model.safetensors"
    whole.write_bytes(gzip.compress(whole.read_bytes()))
    assert [u.site for u in load(tmp_path)] == [u.site for u in expected]
    whole.unlink()
    items = list(good().items())
    save_file(dict(items[:2]), tmp_path / "adapter_model-00001-of-00002.safetensors")
    with pytest.raises(AdapterFormatError, match="in 2 shards, of which 1 are here"):
        load(tmp_path)
    save_file(dict(items[2:]), tmp_path / "adapter_model-00002-of-00002.safetensors")
    assert [u.site for u in load(tmp_path)] == [u.site for u in expected]


def test_updates_of_zero_are_left_out(tmp_path: Path) -> None:
    zero = {f"{Q}.lora_B.weight": torch.zeros(16, 2)}
    assert [u.site for u in load(save(tmp_path, tensors=good() | zero))] == ["layers.0.v_proj"]


def test_a_trained_norm_is_refused_by_name(tmp_path: Path) -> None:
    norm = {"base_model.model.layers.0.input_layernorm.weight": torch.ones(8)}
    with pytest.raises(
        AdapterFormatError, match=r"a trained norm, 'layers\.0\.input_layernorm', which is not served"
    ):
        load(save(tmp_path, tensors=good() | norm))


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def replaced(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensor}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without(f"{Q}.lora_B.weight"), AdapterFormatError, r"'layers\.0\.q_proj' lacks lora_B"),
        (without(f"{V}.lora_A.weight"), AdapterFormatError, r"'layers\.0\.v_proj' lacks lora_A"),
        (replaced(f"{Q}.lora_A.weight", torch.ones(2, 9)), AdapterMismatchError, "maps 9 -> 16.* 8 -> 16"),
        (replaced(f"{Q}.lora_B.weight", torch.ones(15, 2)), AdapterMismatchError, "maps 8 -> 15.* 8 -> 16"),
        (replaced(f"{Q}.lora_B.weight", torch.ones(16, 3)), AdapterFormatError, "do not share a rank"),
        (replaced(f"{Q}.lora_A.weight", torch.ones(16)), AdapterFormatError, "do not share a rank"),
        (
            lambda t: t | {f"{Q}.lora_A.weight": torch.ones(3, 8), f"{Q}.lora_B.weight": torch.ones(16, 3)},
            AdapterFormatError,
            "says rank 2, tensors have 3",
        ),
        (
            lambda t: t | {f"{Q}.lora_A.weight": torch.ones(0, 8), f"{Q}.lora_B.weight": torch.ones(16, 0)},
            AdapterFormatError,
            "rank 0",
        ),
        (replaced(f"{Q}.lora_A.weight", torch.full((2, 8), torch.nan)), AdapterFormatError, "NaN or infinity"),
        (replaced(f"{Q}.lora_B.weight", torch.full((16, 2), torch.inf)), AdapterFormatError, "NaN or infinity"),
        # Finite as stored, but not in the float32 that it is computed in.
        (
            replaced(f"{Q}.lora_B.weight", torch.full((16, 2), 1e300, dtype=torch.float64)),
            AdapterFormatError,
            "NaN or infinity",
        ),
        (
            replaced(f"{Q}.lora_B.weight", torch.full((16, 2), torch.nan).to(torch.float8_e4m3fn)),
            AdapterFormatError,
            "NaN or infinity",
        ),
        (replaced(f"{Q}.lora_B.weight", torch.ones(16, 2, dtype=torch.complex64)), AdapterFormatError, "complex64"),
        (replaced(f"{Q}.lora_C.weight", torch.ones(2)), AdapterFormatError, "lora_C.*not a LoRA matrix"),
        (
            lambda t: {k.replace("q_proj", "w_proj"): v for k, v in t.items()},
            AdapterMismatchError,
            r"Base tiny has no linear site 'layers\.0\.w_proj'",
        ),
    ],
)
def test_bad_tensors(
    change: Callable[[Tensors], Tensors], error: type[AdapterError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        load(save(tmp_path, tensors=change(good())))
    assert caught.value.field


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "MAGIC"}, "peft_type 'MAGIC' is not served. Known: ADALORA"),
        ({"peft_type": None}, "peft_type None is not served"),
        ({"r": 3}, "says rank 3, tensors have 2"),
        ({"r": "two"}, "r 'two' is not a number"),
        ({"r": "2"}, "r '2' is not a number. Write it without quotes"),
        ({"lora_alpha": "much"}, "lora_alpha.*'much' is not a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha.*nan"),
        ({"lora_alpha": 1e39}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": [1]}}, "lora_alpha"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern"),
        ({"use_qalora": True}, "QALoRA is not served"),
    ],
)
def test_bad_configurations(config: Config, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match=message):
        load(save(tmp_path, CONFIG | config))


def test_another_base(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "onebase.json").write_text('{"base": {"model": "big", "fingerprint": "beef"}}')
    with pytest.raises(
        AdapterMismatchError, match=r"Trained on big \(beef\), but this server's base is tiny \(f00d\)"
    ):
        load(tmp_path)


def test_another_form_of_the_same_base(tmp_path: Path) -> None:
    """Of catalogued bases it is known which are one model; a hub id or a folder names whatever is there now."""
    save(tmp_path)
    trained_on = {"model": "tiny-coded", "fingerprint": "beef", "hub_id": "owner/tiny"}
    (tmp_path / "onebase.json").write_text(json.dumps({"base": trained_on}))
    catalogued = replace(BASE, hub_id="owner/tiny")
    (note,) = load_adapter(tmp_path, "digest", catalogued, NoWeights()).notes
    assert note == "trained on tiny-coded, served on tiny: the same model, rounded otherwise"
    for other in (replace(BASE, hub_id="owner/other"), replace(BASE, name="owner/tiny", hub_id="owner/tiny")):
        with pytest.raises(AdapterMismatchError, match="other weights"):
            load_adapter(tmp_path, "digest", other, NoWeights())


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle(name: str, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / name)
    with pytest.raises(AdapterFormatError, match=f"{name} is a pickle.*safe_serialization=True"):
        load(tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def lie_about_offsets(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1))


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("file", "damage", "error", "message"),
    [
        ("adapter_model.safetensors", cut, AdapterFormatError, "not a whole safetensors file"),
        ("adapter_model.safetensors", lie_about_offsets, AdapterFormatError, "not a whole safetensors file"),
        ("adapter_model.safetensors", lambda p: p.write_bytes(b""), AdapterFormatError, "not a whole safetensors"),
        (
            "adapter_model.safetensors",
            lambda p: p.write_bytes(b"\xff" * 64),
            AdapterFormatError,
            "it is no safetensors",
        ),
        (
            "adapter_model.safetensors",
            lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
            AdapterFormatError,
            "is a pointer of Git LFS and not the file itself: git lfs pull",
        ),
        ("adapter_model.safetensors", lambda p: p.write_bytes(b"\x1f\x8b\0"), AdapterFormatError, "not a whole"),
        (
            "adapter_model.safetensors",
            lambda p: p.write_bytes(gzip.compress(bytes(1 << 20))),
            AdapterFormatError,
            "compressed more than 64 times",
        ),
        (
            "onebase.json",
            lambda p: p.write_text('{"a": "\\ud800"}'),
            AdapterFormatError,
            "half of a surrogate pair",
        ),
        ("adapter_model.safetensors", lambda p: save_file({}, p), AdapterFormatError, "changes nothing"),
        ("adapter_model.safetensors", Path.unlink, AdapterFormatError, "No adapter_model.safetensors"),
        ("adapter_model.safetensors", make_a_folder, AdapterFormatError, "No adapter_model.safetensors"),
        ("adapter_config.json", Path.unlink, AdapterFormatError, "No adapter_config.json"),
        ("adapter_config.json", make_a_folder, AdapterFormatError, "No adapter_config.json"),
        ("adapter_config.json", lambda p: p.write_text("{"), AdapterFormatError, "is not JSON"),
        ("adapter_config.json", lambda p: p.write_text("[]"), AdapterFormatError, "is not a JSON object"),
        ("adapter_config.json", lambda p: p.write_text("[" * 99999), AdapterFormatError, "is not JSON"),
        ("adapter_config.json", lambda p: p.write_bytes(b'"\xff"'), AdapterFormatError, "is not JSON"),
        ("onebase.json", lambda p: p.write_text("nonsense"), AdapterFormatError, "onebase.json is not JSON"),
    ],
)
def test_broken_files(
    file: str, damage: Callable[[Path], object], error: type[AdapterError], message: str, tmp_path: Path
) -> None:
    damage(save(tmp_path) / file)
    with pytest.raises(error, match=message):
        load(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(AdapterPathError, match="is not a folder"):
        load(tmp_path / "absent")


def test_an_embedding_with_tokens_of_its_own_is_refused(tmp_path: Path) -> None:
    tensors = good() | {"base_model.model.embed_tokens.weight": torch.zeros(33, 8)}
    with pytest.raises(AdapterMismatchError, match="33 tokens, and the base has 32"):
        load(save(tmp_path, tensors=tensors))
