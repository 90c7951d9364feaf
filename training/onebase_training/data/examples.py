"""The content of a data file once it is read: records of one shape, whatever its format was."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Turn:
    """One message of a chat."""

    role: str
    content: str
    learned: bool = True
    """False: an assistant's turn that is read and not learned."""
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other fields of a message that chat templates read: `tool_calls`, `tool_call_id`, `name`."""

    @property
    def answers(self) -> bool:
        """Whether it is learned, where it answers another turn."""
        return self.role == "assistant" and self.learned


@dataclass(frozen=True)
class Example:
    """One record. Which fields are set depends on the format; see `formats.FORMATS`."""

    line: int
    """1-based place in its file: the line in text files, the row in Parquet."""
    turns: tuple[Turn, ...] = ()
    """A chat; the assistant's turns are learned, unless they say otherwise."""
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    """Functions that the chat may call, as OpenAI has them."""
    prompt: str | None = None
    """Raw text, as /v1/completions takes it; with `label`, the text to classify."""
    completion: str | None = None
    document: bool = False
    """The completion is a text that answers nothing: all of it is learned, in pieces where it is long."""
    label: str | None = None
    words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    """One for each of `words`."""
    task: str = ""
    """Which task the record belongs to, in runs of several."""

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"line {self.line} of the task {self.task!r}" if self.task else f"line {self.line}"

    @property
    def asked(self) -> str:
        """The text that the model is given, up to the first answer."""
        if self.turns:
            first = next((at for at, turn in enumerate(self.turns) if turn.answers), None)
            return "\n".join(turn.content for turn in self.turns[:first])
        return " ".join(self.words) if self.words else self.prompt or ""

    @property
    def identity(self) -> str:
        """The text to find duplicates by: what is asked, if anything is, else the answer."""
        return self.asked.strip() or self.answer

    @property
    def answer(self) -> str:
        """The text that the model is to give: the last answer, the completion, the label, or the tags in order."""
        if self.turns:
            return next((turn.content for turn in reversed(self.turns) if turn.answers), "")
        return " ".join(self.tags) if self.tags else self.label or self.completion or ""


@dataclass(frozen=True)
class Dataset:
    """The examples of one file."""

    examples: tuple[Example, ...]
    format: str
    """A name in `formats.FORMATS`."""
    source: str
    """The path as it was given, for messages."""
    digest: str
    """SHA-256 of the file's bytes, in hex."""
    unused: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Columns that nothing is made of, and in how many records they hold something."""
    skipped: tuple[str, ...] = ()
    """The faults of the records that were left out."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels or tags that occur, sorted; empty for generative formats."""
        named = {example.label for example in self.examples if example.label is not None}
        return tuple(sorted(named.union(*(example.tags for example in self.examples))))

    def with_words(self, words: Mapping[str, str]) -> "Dataset":
        """The same, with labels and tags called by other words: a verbaliser (Schick and Schuetze 2021)."""
        if not words:
            return self
        examples = tuple(
            replace(
                example,
                label=None if example.label is None else words.get(example.label, example.label),
                tags=tuple(words.get(tag, tag) for tag in example.tags),
            )
            for example in self.examples
        )
        return replace(self, examples=examples)
