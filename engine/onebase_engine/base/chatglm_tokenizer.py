"""The tokenizers of ChatGLM's old layout, whose code is not run, as tokenizer.json.

ChatGLM2 and 3 have a SentencePiece model of byte pairs (merges by score, bytes for what is unknown), GLM-4 has
tiktoken's file of ranks. Both put `[gMASK]` and the start token before every text.
"""

import base64
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from onebase_adapters.errors import BaseModelError

_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
"""ChatGLM's special tokens, from the first id behind the SentencePiece model's; ChatGLM3 has roles behind them."""
_NEXT_TURN = ("<|user|>", "<|observation|>")
"""What the model writes when its turn is over."""
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""GLM-4 merges within these."""
_SPACE = "\u2581"


def write_tokenizer(folder: Path, target: Path) -> list[int]:
    """Write tokenizer.json and its settings into `target`; returns the tokens that end an answer. Raises
    BaseModelError."""
    settings = _json(folder / "tokenizer_config.json")
    file = folder / "tokenizer.model"
    if not file.is_file():
        raise BaseModelError(f"{folder} has no tokenizer.model.", field="model")
    data = file.read_bytes()
    added = {int(number): token["content"] for number, token in settings.get("added_tokens_decoder", {}).items()}
    try:
        tokenizer, end = _by_rank(data, added) if _is_ranks(data) else _by_score(data, added, settings)
    except (ValueError, IndexError, struct.error) as error:
        raise BaseModelError(f"{file} is no tokenizer of ChatGLM's: {error}", field="model") from error
    tokenizer.save(str(target / "tokenizer.json"))
    kept = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    if template := settings.get("chat_template"):
        kept["chat_template"] = template
    (target / "tokenizer_config.json").write_text(json.dumps(kept))
    if (folder / "chat_template.jinja").is_file():
        (target / "chat_template.jinja").write_text((folder / "chat_template.jinja").read_text())
    ends = [tokenizer.token_to_id(token) for token in (end, *_NEXT_TURN)]
    return [number for number in ends if number is not None]


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def _is_ranks(data: bytes) -> bool:
    """Whether a file is tiktoken's: lines of a token in base64 and its rank."""
    first = data.split(b"\n", 1)[0].split()
    return len(first) == 2 and first[1].isdigit()


def _by_rank(data: bytes, added: Mapping[int, str]) -> tuple[Tokenizer, str]:
    """GLM-4's."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in data.splitlines())}
    letters = _letters()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [
        (text(token[:at]), text(token[at:]))
        for token, _ in sorted(ranks.items(), key=lambda pair: pair[1])
        for at in _cuts(token, ranks)
    ]
    tokenizer = Tokenizer(BPE({text(token): rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add(tokenizer, added)
    _begin(tokenizer, "[gMASK]", "<sop>")
    return tokenizer, "<|endoftext|>"


def _cuts(token: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Where a token may have been merged, the pair of lowest ranks first."""
    cuts = [at for at in range(1, len(token)) if token[:at] in ranks and token[at:] in ranks]
    return sorted(cuts, key=lambda at: (ranks[token[:at]], ranks[token[at:]]))


def _letters() -> list[str]:
    """The letter that stands for each byte in byte-level tokens (GPT-2's)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def _by_score(data: bytes, added: Mapping[int, str], settings: Mapping[str, Any]) -> tuple[Tokenizer, str]:
    """ChatGLM2's and 3's."""
    pieces = [_piece(dict(_fields(value))) for field, value in _fields(data) if field == 1]
    scores = dict(pieces)
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    merges = [
        (score, piece[:at], piece[at:])
        for piece, score in pieces
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    merges.sort(key=lambda merge: (-merge[0], ids[merge[1]], ids[merge[2]]))
    tokenizer = Tokenizer(
        BPE(ids, [(left, right) for _, left, right in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    roles = _ROLES if "<|user|>" in f"{settings}" else ()
    _add(tokenizer, dict(enumerate((*_SPECIAL, *roles), len(pieces))) | dict(added))
    _begin(tokenizer, "[gMASK]", "sop")
    return tokenizer, "</s>"


def _add(tokenizer: Tokenizer, added: Mapping[int, str]) -> None:
    """Add special tokens, each with its very id; those of letters alone are not found within words: "people"."""
    for number, token in sorted(added.items()):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, single_word=token.isalpha())])
        if tokenizer.token_to_id(token) != number:
            raise ValueError(f"{token} would be {tokenizer.token_to_id(token)}, not {number}")


def _begin(tokenizer: Tokenizer, *tokens: str) -> None:
    """Put these before every text."""
    numbered = [(token, tokenizer.token_to_id(token)) for token in tokens]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*tokens, "$A"], pair=[*tokens, "$A", "$B:1"], special_tokens=numbered
    )


def _piece(fields: Mapping[int, Any]) -> tuple[str, float]:
    return fields[1].decode(), struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message in protobuf's encoding: numbers, and bytes as they are."""
    at = 0
    while at < len(data):
        key, at = _number(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _number(data, at)
            yield key >> 3, value
            continue
        size, at = _number(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        yield key >> 3, data[at : at + size]
        at += size


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits from `at`, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if byte < 128:
            return value, at
