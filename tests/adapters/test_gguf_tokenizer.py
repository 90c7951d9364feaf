"""Tokenizers into GGUF files and back: every splitting that has a name, SentencePiece's two kinds, and refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from onebase_adapters.errors import BaseModelError
from onebase_engine.base.gguf_tokenizer import SPLITTINGS, name_of_splitting
from onebase_engine.export.gguf_model import read_back, write_gguf_model
from support.tokenizer import TEMPLATE

SPECIAL = ["<s>", "</s>", "<|turn|>"]
TEXT = (Path(__file__).read_text() + " 12 123 1234  567   89 I've they'll CamelCase a/b//c \n\n  x\t\ty") * 2
ROOM = 416
"""Rows of the tiny models' embedding."""


def byte_level(splitting: Any, *, whole_words: bool = False, first: bool = False) -> Any:
    core = Tokenizer(models.BPE(ignore_merges=whole_words))
    core.pre_tokenizer, core.decoder = splitting, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([TEXT], trainer)
    if first:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    made.add_tokens(["<think>"])
    made.chat_template = TEMPLATE
    return made


def sentencepiece(kind: Any, first: str) -> Any:
    """By transformers' class of the family, with a vocabulary that was trained here."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    names = ["<pad>", "<unk>", first, "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    core.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=410, special_tokens=names, show_progress=False))
    read = json.loads(core.to_str())["model"]
    merges = [tuple(merge) for merge in read["merges"]]
    made = kind(vocab=read["vocab"], merges=merges, bos_token=first, eos_token="</s>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def around(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """The folder of a tiny model with another tokenizer."""

    def make(tokenizer: Any, family: str = "llama") -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        shutil.copy(tiny_model(family) / "model.safetensors", folder)
        config = json.loads((tiny_model(family) / "config.json").read_text())
        if family == "gemma3":  # llama.cpp's order of its layers, of which three are but the beginning
            config["layer_types"] = ["sliding_attention"] * 3
        (folder / "config.json").write_text(json.dumps(config))
        tokenizer.save_pretrained(folder)
        return folder

    return make


def there_and_back(folder: Path) -> tuple[dict[str, Any], Any]:
    """The written settings of the tokenizer, and the tokenizer that they are read as."""
    file, target = folder.parent / "model.gguf", folder.parent / "read"
    target.mkdir(exist_ok=True)
    write_gguf_model(folder, file, "gguf")
    read_back(folder, file, target, lambda _: None)
    fields = gguf.GGUFReader(file).fields
    settings = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
    return settings, AutoTokenizer.from_pretrained(target)


@pytest.mark.parametrize("name", SPLITTINGS)
def test_each_splitting_comes_back(name: str, around: Callable[..., Path]) -> None:
    known = SPLITTINGS[name]
    made = byte_level(known.rule, whole_words=known.whole_words, first=name == "llama-bpe")
    settings, found = there_and_back(around(made))
    assert settings["tokenizer.ggml.pre"] == name == name_of_splitting(found)
    assert settings["tokenizer.ggml.add_bos_token"] is (name == "llama-bpe")
    text = "I've 12 apples,  345 pears<|turn|> and <think>a/b 6789</think>"
    assert made(text)["input_ids"] == found(text)["input_ids"]
    assert (found.bos_token, found.eos_token, found.chat_template) == ("<s>", "</s>", TEMPLATE)


def test_digits_are_split_as_the_name_says(around: Callable[..., Path]) -> None:
    """Two spaces before a digit are one token where digits stand alone, and two where words take their space."""
    tokenizer = byte_level(SPLITTINGS["smollm"].rule)
    _, found = there_and_back(around(tokenizer))
    assert found.tokenize("  1") == ["ĠĠ", "1"]


@pytest.mark.parametrize(
    ("kind", "family", "first"), [(LlamaTokenizer, "llama", "<s>"), (GemmaTokenizer, "gemma3", "<bos>")]
)
def test_sentencepiece_comes_back(kind: Any, family: str, first: str, around: Callable[..., Path]) -> None:
    made = sentencepiece(kind, first)
    settings, found = there_and_back(around(made, family))
    assert settings["tokenizer.ggml.model"] == "llama"
    assert settings["tokenizer.ggml.add_space_prefix"] is (kind is LlamaTokenizer)
    text = "  two  spaces <|turn|>天"
    assert made(text)["input_ids"] == found(text)["input_ids"]
    scores = settings["tokenizer.ggml.scores"]
    ranks = [scores[made.convert_tokens_to_ids("".join(pair))] for pair in made._merges]
    assert ranks == sorted(ranks, reverse=True), "what is merged first scores most"


def test_what_has_no_name_is_refused(around: Callable[..., Path], tmp_path: Path) -> None:
    pieces = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)])
    folder = around(byte_level(pieces))
    with pytest.raises(BaseModelError, match=r"splits text in a way that has no name here \(gpt-2, smollm, "):
        there_and_back(folder)
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>").save_pretrained(folder)
    with pytest.raises(BaseModelError, match="is of the kind Unigram: a GGUF file cannot hold it"):
        there_and_back(folder)
    lower = byte_level(SPLITTINGS["gpt-2"].rule)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    lower.save_pretrained(folder)
    with pytest.raises(BaseModelError, match='comes back as another one: "The quick'):
        there_and_back(folder)
    around_it = byte_level(SPLITTINGS["gpt-2"].rule)
    around_it.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|turn|> $A", special_tokens=[("<|turn|>", 2)]
    )
    around_it.save_pretrained(folder)
    with pytest.raises(BaseModelError, match="puts other tokens than its first and its last one around a text"):
        there_and_back(folder)
