"""The base's tokenizer and chat template, read from its folder with the `tokenizers` library alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders

from onebase_adapters.errors import BaseModelError
from onebase_engine.text.chat_template import ChatTemplate, _find_template, _read_json
from onebase_engine.text.detokenizer import ByteDetokenizer, Detokenizer, TokenBytes, WindowDetokenizer

_LONG = 10_000
"""Characters from which the interpreter's lock is let go while they are tokenised."""
_OTHERS = 256
"""Templates of adapters that are kept at hand."""
_TAIL = 6
"""Prompt tokens that a WindowDetokenizer starts from: enough for its decoder to be past the beginning."""


@dataclass(frozen=True)
class TextCodec:
    """Encodes prompts, decodes outputs, renders chats."""

    tokenizer: Tokenizer
    chat_template: str | None = None
    special_words: Mapping[str, str] | None = None
    """`bos_token` and its like, which templates write out."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Special tokens that the text spells out become themselves, as chat templates need."""
        if len(text) < _LONG:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        else:
            ids = self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def least_tokens(self, text: str) -> int:
        """No more than the text has, told without tokenising it."""
        return 0 if self._longest_token is None else -(-len(text) // self._longest_token)

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each where it begins and ends in the text, in characters; special tokens are nowhere,
        so begin and end at one place."""
        (encoded,) = self.tokenizer.encode_batch([text])
        return encoded.ids, encoded.offsets

    def decode(self, tokens: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of a whole sequence."""
        detokenizer = self.detokenizer((), skip_special=skip_special)
        return detokenizer.push(tokens) + detokenizer.flush()

    def detokenizer(self, prompt: Sequence[int], *, skip_special: bool = True) -> Detokenizer:
        """For the text that follows `prompt`, token by token."""
        if self._byte_level:
            return ByteDetokenizer(self._shown_bytes if skip_special else self._all_bytes)
        return WindowDetokenizer(self.tokenizer, prompt[-_TAIL:], skip_special)

    def token_bytes(self, token: int) -> bytes:
        """One token's bytes, which need not be whole characters."""
        if self._byte_level:
            return self._all_bytes[token]
        written = self.tokenizer.id_to_token(token) or ""
        if len(written) == 6 and written.startswith("<0x") and written.endswith(">"):
            return bytes([int(written[3:5], 16)])  # SentencePiece's byte fallback
        # Decoded after another copy of itself: alone, it could lose a leading space.
        alone: str = self.tokenizer.decode([token], skip_special_tokens=False)
        twice: str = self.tokenizer.decode([token, token], skip_special_tokens=False)
        return twice[len(alone) :].encode()

    def token_text(self, token: int) -> str:
        """One token as logprobs name it: its text, or as OpenAI has it `bytes:\\xf0\\x9f` if it has none."""
        value = self.token_bytes(token)
        try:
            return value.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)

    def chat(self, own: str | None = None) -> ChatTemplate:
        """The base's template, or an adapter's `own`."""
        if own is None or own == self.chat_template:
            return self._chat
        if own not in self._others:
            if len(self._others) >= _OTHERS:
                self._others.clear()
            self._others[own] = ChatTemplate(own, self._chat.special_words, "adapter")
        return self._others[own]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt of a conversation by the base's template. Raises ChatTemplateError."""
        return self._chat.render(messages, **variables)

    def warm_up(self) -> None:
        """Let what the first text and the first chat would wait for happen now."""
        self.least_tokens("")
        if self.chat_template is not None:
            _ = self._chat.takes_system

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.chat_template, self.special_words or {})

    @cached_property
    def _others(self) -> dict[str, ChatTemplate]:
        return {}

    @cached_property
    def _longest_token(self) -> int | None:
        """In bytes; None where one may stand for any number of them."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        if (
            not self._byte_level
            or self.tokenizer.normalizer is not None
            or any(w.lstrip or w.rstrip for w in added)
        ):
            return None
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def _byte_level(self) -> bool:
        return isinstance(self.tokenizer.decoder, decoders.ByteLevel)

    @cached_property
    def _all_bytes(self) -> TokenBytes:
        return TokenBytes(self.tokenizer, frozenset())

    @cached_property
    def _shown_bytes(self) -> TokenBytes:
        added = self.tokenizer.get_added_tokens_decoder()
        return TokenBytes(self.tokenizer, frozenset(token for token, word in added.items() if word.special))


def load_codec(folder: Path) -> TextCodec:
    """Read a model folder's tokenizer and chat template. Raises BaseModelError."""
    tokenizer = _load_tokenizer(folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    words = {}
    for key, value in config.items():
        if key.endswith("_token"):
            word = value.get("content") if isinstance(value, dict) else value
            if isinstance(word, str):
                words[key] = word
    return TextCodec(tokenizer, _find_template(folder, config), words)


def _load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        # Only a SentencePiece or vocab.txt file: transformers converts it, at the price of importing torch.
        from transformers import AutoTokenizer

        converted: Tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
        return converted
    except Exception as error:  # `tokenizers` raises plain Exception
        raise BaseModelError(f"Cannot read the tokenizer in {folder}: {error}", field="model") from error
