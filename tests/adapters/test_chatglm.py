"""ChatGLM's old layout, from random checkpoints: the converted model against a forward pass written here from the
layout's definition, its tokenizers against byte pairs merged one by one, and what is refused."""

import base64
import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import rms_norm, silu
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmForCausalLM

from onebase_adapters.errors import BaseModelError
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.catalog import fetch_base
from onebase_engine.base.load_base import load_base, quiet_loading
from onebase_engine.runner.batched_model import ServedModel
from support.serving import Feeder, Stream

LAYERS, HIDDEN, HEADS, GROUPS, DIM, FFN = 2, 64, 4, 2, 16, 96
PIECES = [
    ("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", 0.0) for byte in range(256)),
    ("\u2581", -9.0), ("c", -10.0), ("a", -11.0), ("t", -12.0), ("at", -1.0), ("ca", -2.0), ("\u2581c", -3.0),
    ("\u2581cat", -4.0), ("cat", -5.0),
]  # fmt: skip
ROLES = {
    "added_tokens_decoder": {f"{len(PIECES) + 6}": {"content": "<|user|>"}},
    "chat_template": "{{ 'x<|user|>' }}",
}


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "chatglm", "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"},
        "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "kv_channels": DIM,
        "multi_query_attention": True, "multi_query_group_num": GROUPS, "ffn_hidden_size": FFN, "seq_length": 256,
        "padded_vocab_size": 320, "layernorm_epsilon": 1e-5, "add_qkv_bias": True, "add_bias_linear": False,
        "rmsnorm": True, "post_layer_norm": True, "apply_residual_connection_post_layernorm": False,
        "original_rope": True, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32",
    } | changes  # fmt: skip


def tensors(vocab: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    found = {
        "transformer.embedding.word_embeddings.weight": random(vocab, HIDDEN) * 8,
        "transformer.rotary_pos_emb.inv_freq": torch.ones(4),
        "transformer.encoder.final_layernorm.weight": 1 + random(HIDDEN),
        "transformer.output_layer.weight": random(vocab, HIDDEN),
    }
    joined = (HEADS + 2 * GROUPS) * DIM
    for layer in range(LAYERS):
        start = f"transformer.encoder.layers.{layer}."
        found |= {
            f"{start}input_layernorm.weight": 1 + random(HIDDEN),
            f"{start}post_attention_layernorm.weight": 1 + random(HIDDEN),
            f"{start}self_attention.query_key_value.weight": 2 * random(joined, HIDDEN),
            f"{start}self_attention.query_key_value.bias": random(joined),
            f"{start}self_attention.dense.weight": random(HIDDEN, HEADS * DIM),
            f"{start}mlp.dense_h_to_4h.weight": random(2 * FFN, HIDDEN),
            f"{start}mlp.dense_4h_to_h.weight": random(HIDDEN, FFN),
        }
    return found


def forward(weights: dict[str, torch.Tensor], ids: list[int], base: float) -> torch.Tensor:
    """Logits [tokens, vocab] by the layout's definition: pairs of neighbours in the first half of each head are
    turned as complex numbers."""
    x = weights["transformer.embedding.word_embeddings.weight"][ids]
    positions = torch.arange(len(ids))
    turns = torch.outer(positions.double(), base ** (-torch.arange(0, DIM // 2, 2).double() / (DIM // 2)))
    turned = torch.polar(torch.ones_like(turns), turns).to(torch.complex64)[:, None]

    def turn(heads: torch.Tensor) -> torch.Tensor:
        first = torch.view_as_complex(heads[..., : DIM // 2].unflatten(-1, (-1, 2)).contiguous())
        return torch.cat([torch.view_as_real(first * turned).flatten(-2), heads[..., DIM // 2 :]], -1)

    for layer in range(LAYERS):
        part = {
            name.split(f"layers.{layer}.")[1]: value
            for name, value in weights.items()
            if f"layers.{layer}." in name
        }
        normed = rms_norm(x, (HIDDEN,), part["input_layernorm.weight"], 1e-5)
        joined = (
            normed @ part["self_attention.query_key_value.weight"].T + part["self_attention.query_key_value.bias"]
        )
        q, k, v = joined.unflatten(-1, (-1, DIM)).split([HEADS, GROUPS, GROUPS], 1)
        q, k = turn(q), turn(k).repeat_interleave(HEADS // GROUPS, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / DIM**0.5
        scores = scores.masked_fill(positions[None] > positions[:, None], float("-inf")).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", scores, v.repeat_interleave(HEADS // GROUPS, 1)).flatten(1)
        x = x + mixed @ part["self_attention.dense.weight"].T
        normed = rms_norm(x, (HIDDEN,), part["post_attention_layernorm.weight"], 1e-5)
        gate, up = (normed @ part["mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        x = x + (silu(gate) * up) @ part["mlp.dense_4h_to_h.weight"].T
    last = rms_norm(x, (HIDDEN,), weights["transformer.encoder.final_layernorm.weight"], 1e-5)
    return last @ weights["transformer.output_layer.weight"].T


def sentencepiece(pieces: list[tuple[str, float]]) -> bytes:
    """A model file with these pieces, and a trainer's settings, which are passed over."""
    data = b""
    for text, score in pieces:
        inner = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15" + struct.pack("<f", score)
        data += b"\x0a" + bytes([len(inner)]) + inner
    return data + b"\x12\x06" + b"\x18\x80\x02\x25" + bytes(2)


def save(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], *, parts: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_chatglm.py").write_text("raise SystemExit('it was run')")
    (folder / "tokenizer.model").write_bytes(sentencepiece(PIECES))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ChatGLMTokenizer"} | ROLES))
    where = {name: f"model-{number % parts}.safetensors" for number, name in enumerate(weights)}
    for file in {*where.values()}:
        save_file({name: weights[name] for name, held in where.items() if held == file}, folder / file)
    if parts > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("changes", "base", "parts"),
    [({}, 1e4, 1), ({"rope_ratio": 1}, 1e4, 3), ({"rope_ratio": 500, "padded_vocab_size": 100_352}, 5e6, 2)],
    ids=["ChatGLM2", "ChatGLM3", "GLM-4"],
)
def test_the_converted_model_computes_what_the_layout_means(
    changes: dict[str, Any], base: float, parts: int, tmp_path: Path
) -> None:
    config = settings(**changes)
    weights = tensors(config["padded_vocab_size"])
    folder = fetch_base(str(save(tmp_path / "old", config, weights, parts=parts)))
    ids = torch.randint(300, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is GlmForCausalLM
    with torch.inference_mode():
        torch.testing.assert_close(
            model(torch.tensor([ids])).logits[0], forward(weights, ids, base), rtol=1e-3, atol=1e-4
        )
    assert fetch_base(str(tmp_path / "old")) == folder


def test_it_is_served(tmp_path: Path) -> None:
    weights = tensors(320)
    folder = save(tmp_path / "old", settings(), weights)
    model = ServedModel.load(BaseSpec(str(folder), "none", device="cpu"), slots=1, blocks=64)
    ids = torch.randint(300, (60,), generator=torch.Generator().manual_seed(2)).tolist()
    (found,) = Feeder(model).logits([Stream(ids)], (17, 1, 30))
    exact = forward(weights, ids, 1e4)
    assert (found.float() - exact).norm() < 0.03 * exact.norm()
    base = load_base(BaseSpec(str(folder), "none", device="cpu"))
    assert base.model.generation_config.eos_token_id == [2, len(PIECES) + 6, len(PIECES) + 8]


def merged(text: str) -> list[str]:
    """Pieces of a text, the adjacent pair of the best score merged first, leftmost of equals."""
    scores = dict(PIECES)
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [(-scores[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        piece for part in parts for piece in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])
    ]


@pytest.mark.parametrize("text", ["cat", "a cat", "cacat at  t", "猫 cat\n", "tact at", "people"])
def test_a_sentencepiece_model_gives_its_tokens(text: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(fetch_base(str(save(tmp_path / "old", settings(), tensors(320)))))
    ids = {piece: number for number, (piece, _) in enumerate(PIECES)}
    start = [len(PIECES) + 1, len(PIECES) + 3]
    expected = [ids[piece] for piece in merged(text)]
    assert tokenizer(text).input_ids == [*start, *expected]
    assert tokenizer.decode(expected) == text
    assert tokenizer(f"{text}<|user|>", add_special_tokens=False).input_ids == [*expected, len(PIECES) + 6]
    assert tokenizer.chat_template == ROLES["chat_template"]


def test_ranks_give_their_tokens(tmp_path: Path) -> None:
    folder = save(tmp_path / "old", settings(rope_ratio=500, padded_vocab_size=100_352), tensors(100_352))
    words = [*(bytes([byte]) for byte in range(256)), b"at", b"ca", b"cat", b" cat", " \u732b".encode()]
    ranks = b"".join(base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words))
    (folder / "tokenizer.model").write_bytes(ranks)
    added = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|user|>"]
    decoder = {str(len(words) + at): {"content": token} for at, token in enumerate(added)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    tokenizer = AutoTokenizer.from_pretrained(fetch_base(str(folder)))
    text = "cat cat \u732b\n1234<|user|>"
    expected = [258, 259, 260, ord("\n"), *map(ord, "1234"), len(words) + 6]
    assert tokenizer(text).input_ids == [len(words) + 2, len(words) + 4, *expected]
    assert tokenizer.decode(expected) == text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"position_encoding_2d": True}, "ChatGLM-6B of 2023, with positions in two dimensions"),
        ({"vision_config": {}}, "GLM-4V"),
        ({"rope_ratio": 50}, "ChatGLM2-6B-32K or ChatGLM3-6B-32K, which mean different things by rope_ratio = 50"),
        ({"quantization_bit": 4}, "a ChatGLM with quantization_bit = 4"),
        ({"pre_seq_len": 128, "add_bias_linear": True}, "a ChatGLM with add_bias_linear = True, pre_seq_len = 128"),
        ({"rmsnorm": False}, "a ChatGLM with rmsnorm = False"),
    ],
)  # fmt: skip
def test_other_models_of_the_type_are_refused_by_name(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "old", settings(**changes), tensors(320))
    with pytest.raises(BaseModelError) as caught:
        fetch_base(str(folder))
    assert told in caught.value.message
    assert caught.value.field == "model"
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_a_tensor_that_is_not_known_is_named(tmp_path: Path) -> None:
    extra = {"transformer.encoder.layers.0.mlp.gate.weight": torch.ones(2)}
    with pytest.raises(BaseModelError, match=r"a tensor transformer\.encoder\.layers\.0\.mlp\.gate\.weight, which"):
        fetch_base(str(save(tmp_path / "old", settings(), tensors(320) | extra)))


@pytest.mark.parametrize("data", [b"", b"\x0a\xff", b"\x0a\x02\x0a"])
def test_a_damaged_tokenizer(data: bytes, tmp_path: Path) -> None:
    folder = save(tmp_path / "old", settings(), tensors(320))
    (folder / "tokenizer.model").write_bytes(data)
    with pytest.raises(BaseModelError, match=r"tokenizer\.model is no tokenizer of ChatGLM's"):
        fetch_base(str(folder))
