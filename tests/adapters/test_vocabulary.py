"""An adapter's tokenizer is the base's, or it is refused with a token that differs."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from onebase_adapters.errors import AdapterFormatError, AdapterMismatchError
from onebase_adapters.formats.checks import check_folder, check_vocabulary
from onebase_adapters.store.adapter_store import AdapterStore
from support.tokenizer import save_tokenizer

BASE = {"a": 0, "b": 1, "<s>": 2}


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    (tmp_path / "base").mkdir()
    save_tokenizer(tmp_path / "base")
    return AutoTokenizer.from_pretrained(tmp_path / "base")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with closing(AdapterStore(tmp_path / "store")) as opened:
        yield opened


def adapter(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def test_the_bases_own_is_accepted_however_it_is_written(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, store: AdapterStore
) -> None:
    base = tokenizer.get_vocab()
    folder = adapter(tokenizer, tmp_path / "a")
    assert (folder / "tokenizer.json").read_bytes() != (tmp_path / "base" / "tokenizer.json").read_bytes()
    check_folder(folder, base)
    staged = store.stage(folder, vocabulary=lambda: base)
    assert not (staged.folder / "tokenizer.json").exists()


def test_another_token_is_refused_and_leaves_nothing(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, store: AdapterStore
) -> None:
    tokenizer.add_tokens(["<|tool|>"])
    folder = adapter(tokenizer, tmp_path / "a")
    base = tokenizer.get_vocab()
    base["<|other|>"] = base.pop("<|tool|>")
    with pytest.raises(AdapterMismatchError, match=rf"token {len(base) - 1}, '<\|tool\|>', the base does not have"):
        check_folder(folder, base)
    with pytest.raises(AdapterMismatchError, match="tool"):
        store.stage(folder, vocabulary=lambda: base)
    assert not list((tmp_path / "store" / "staging").iterdir())
    store.stage(folder)  # by one who knows no base


def whole(vocab: object, *added: tuple[str, int]) -> bytes:
    tokens = [{"id": number, "content": word} for word, number in added]
    return json.dumps({"model": {"type": "BPE", "vocab": vocab}, "added_tokens": tokens}).encode()


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": whole({"b": 1, "a": 0}, ("<s>", 2))},
        {"tokenizer.json": whole([["a", -1.5], ["b", 0]], ("<s>", 2))},
        {"added_tokens.json": b'{"<s>": 2}', "other.json": b"[]"},
        {"tokenizer_config.json": b'{"added_tokens_decoder": {"2": {"content": "<s>", "special": true}}}'},
        {"tokenizer_config.json": b'{"model_max_length": 100}'},
        # Behind the base's last token: a trainer's padding, which nobody writes.
        {"tokenizer.json": whole({"b": 1, "a": 0}, ("<s>", 2), ("[PAD]", 3))},
        {"added_tokens.json": b'{"[PAD]": 3}'},
        {"tokenizer_config.json": b'{"added_tokens_decoder": {"3": {"content": "[PAD]"}}}'},
        {},
    ],
)
def test_the_same_tokens(files: dict[str, bytes]) -> None:
    check_vocabulary(files, BASE)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer.json": whole({"b": 0, "a": 1}, ("<s>", 2))}, "token 0, 'b', the base has as 1"),
        ({"tokenizer.json": whole({"a": 0, "b": 1})}, "lacks the base's token 2, '<s>'"),
        ({"tokenizer.json": whole({"a": 0, "c": 1}, ("<s>", 2))}, "token 1, 'c', the base does not have"),
        ({"tokenizer.json": whole({"a": 0, "b": 1}, ("[PAD]", 3))}, "lacks the base's token 2, '<s>'"),
        ({"added_tokens.json": b'{"<pad>": 2}'}, "'<pad>'"),
        ({"tokenizer_config.json": b'{"added_tokens_decoder": {"2": {"content": "<pad>"}}}'}, "'<pad>'"),
    ],
)
def test_other_tokens(files: dict[str, bytes], reason: str) -> None:
    with pytest.raises(AdapterMismatchError, match=reason):
        check_vocabulary(files, BASE)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": b"{"},
        {"tokenizer.json": b"{}"},
        {"added_tokens.json": b'{"a": "b"}'},
        {"tokenizer_config.json": b'{"added_tokens_decoder": {"x": {}}}'},
        {"tokenizer.json": b"\xff"},
    ],
)
def test_what_is_no_tokenizer(files: dict[str, bytes]) -> None:
    with pytest.raises(AdapterFormatError, match="is no tokenizer's"):
        check_vocabulary(files, BASE)
