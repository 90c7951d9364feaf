"""How the tokenizer in a GGUF file splits text before it merges: the file has no rule for that, but a name,
`tokenizer.ggml.pre`, which stands for rules in llama.cpp. One table has these names both for reading and writing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Regex, pre_tokenizers

from onebase_adapters.errors import BaseModelError


@dataclass(frozen=True)
class Splitting:
    """What a name stands for."""

    rule: Any
    """The pre-tokenizer."""
    whole_words: bool = False
    """Whether a word that is a token is that token, whatever the merges say."""


def _split(pattern: str) -> Any:
    """By a pattern, then to bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_REST_WITH_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SPLITTINGS = {
    "gpt-2": Splitting(_BYTES),
    "smollm": Splitting(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTES])),
    "llama-bpe": Splitting(_split(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), whole_words=True),
    "dbrx": Splitting(_split(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}")),
    "qwen2": Splitting(_split(rf"{_WORDS}|\p{{N}}|{_REST}")),
    "tekken": Splitting(_split(rf"{_CASES}|\p{{N}}|{_REST_WITH_SLASHES}"), whole_words=True),
}
"""By llama.cpp's names."""


def name_of_splitting(tokenizer: Any) -> str | None:
    """The name for how a byte-level tokenizer of transformers splits, if it has one."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    found = _parts(tokenizer.backend_tokenizer.pre_tokenizer), bool(model.get("ignore_merges"))
    return next((name for name, one in SPLITTINGS.items() if (_parts(one.rule), one.whole_words) == found), None)


def read_gguf_tokenizer(file: Path) -> Any:
    """A file's tokenizer, by transformers, which knows not all of these names. Raises BaseModelError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:  # tokenizers raises nothing more special
        raise BaseModelError(f"The tokenizer in {file} cannot be read: {error}", field="model") from error
    fields = gguf.GGUFReader(file).fields
    kind, name = (fields.get(f"tokenizer.ggml.{field}") for field in ("model", "pre"))
    if kind is not None and kind.contents() == "gpt2" and name is not None:
        known = SPLITTINGS.get(str(name.contents()))
        if known is not None:
            tokenizer.backend_tokenizer.pre_tokenizer = known.rule
            tokenizer.backend_tokenizer.model.ignore_merges = known.whole_words
    return tokenizer


def _parts(rule: Any) -> list[dict[str, Any]]:
    """A pre-tokenizer's steps, without what only concerns the places of tokens in the text."""
    described: Any = json.loads(rule.__getstate__()) if rule is not None else {"type": "none"}
    steps: list[dict[str, Any]] = described["pretokenizers"] if described["type"] == "Sequence" else [described]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
