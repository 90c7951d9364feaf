"""A tokenizer as training needs it: prompts and chats as the server makes them, answers as a model writes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from onebase_adapters.errors import DataError
from onebase_engine.text.chat_template import ChatTemplate
from onebase_engine.text.tool_text import spell_out, tool_document
from onebase_training.data.examples import Example, Turn


@dataclass(frozen=True)
class Coder:
    """Wraps a transformers PreTrainedTokenizerBase."""

    tokenizer: Any

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of raw prompts, with the special tokens that the tokenizer puts around a text."""
        return self._ids(texts, special=True)

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that follow a prompt, each tokenised apart from it."""
        if not self._prepends_space:
            return self._ids(texts)
        anchor = "\n"
        before = len(self._ids([anchor])[0])
        return [ids[before:] for ids in self._ids([anchor + text for text in texts])]

    @cached_property
    def end_of_text(self) -> int:
        """The token that ends an answer. Raises DataError if there is none."""
        if self.tokenizer.eos_token_id is None:
            raise DataError("The base's tokenizer has no end-of-text token: nothing could teach it to stop.")
        end: int = self.tokenizer.eos_token_id
        return end

    def chat_answer(self, example: Example, place: int) -> tuple[list[int], list[int]]:
        """Token ids of the prompt that the assistant's turn at `place` answers, and of its answer with its end.

        Raises DataError where the chat template has no such prompt.
        """
        prompt = self._render(example, example.turns[:place], generate=True)
        whole = self._render(example, example.turns[: place + 1], generate=False)
        if not whole.startswith(prompt):
            raise DataError(
                f"{example.place}: the base's chat template does not write the assistant's turn after its own "
                "generation prompt, so it cannot be learned as it would be served. Use prompt and completion."
            )
        answer = self.answers([whole[len(prompt) :]])[0]
        # Templates put a newline behind the end-of-turn token, which the model never has to write.
        last = next((at for at in range(len(answer) - 1, -1, -1) if answer[at] in self._special), None)
        answer = [*answer, self.end_of_text] if last is None else answer[: last + 1]
        return self._ids([prompt])[0], answer

    def _render(self, example: Example, turns: Sequence[Turn], *, generate: bool) -> str:
        if not self.tokenizer.chat_template:
            raise DataError("The base has no chat template; use prompt and completion.", field="format")
        messages: list[Mapping[str, Any]] = [
            {"role": turn.role, "content": turn.content, **turn.fields} for turn in turns
        ]
        tools = [tool_document(tool) for tool in example.tools]
        if not self._template.knows_tools:
            messages, tools = spell_out(messages, tools, system=self._template.takes_system), []
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, add_generation_prompt=generate
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise DataError(f"{example.place}: the base's chat template refuses this: {error}") from error
        return text

    def _ids(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer.chat_template, self.tokenizer.special_tokens_map)

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        return frozenset(token for token, word in added.items() if word.special) | {self.end_of_text}

    @cached_property
    def _prepends_space(self) -> bool:
        # SentencePiece's way, in Llama 2 and its kin: a text's first word gets a space that nobody wrote.
        words: list[str] = self.tokenizer.convert_ids_to_tokens(self._ids(["a"])[0])
        return words[0].startswith("▁")
