"""Hard prompts: the wording and the examples to show, chosen among candidates by the loss on other examples.

All candidates are tried on a few examples, the better half on twice as many, and so on (successive halving,
Jamieson and Talwalkar 2016). What they are judged by is of the training part: the held-out part stays unseen.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from onebase_adapters.base import LoadedBase
from onebase_adapters.errors import DataError
from onebase_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from onebase_training.config import TrainConfig
from onebase_training.data import NO_LOSS, Dataset, Encoded, Example, Turn, encode
from onebase_training.evaluate import held_out_loss
from onebase_training.events import Progress, Stage
from onebase_training.model import Trained

_SHOTS = (1, 2, 4, 8)
_DRAWS = 2
"""Candidates for each number of shots and wording."""
_FIRST = 8
"""Examples of the first comparison."""
_LAST = 64


@dataclass(frozen=True)
class Template:
    """Text around a completion's prompt, or turns in front of a chat; see `onebase_adapters.methods.template`."""

    before: str = ""
    after: str = ""
    messages: tuple[Turn, ...] = ()

    def save(self, folder: Path, base: str) -> None:
        """Write the adapter's two files."""
        messages = [asdict(turn) for turn in self.messages]
        settings: dict[str, Any] = {"peft_type": "TEMPLATE", "base_model_name_or_path": base}
        settings |= {"before": self.before, "after": self.after, "messages": messages}
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
        save_file({}, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def apply(self, example: Example) -> Example:
        """The example as the base then sees it."""
        if example.turns:
            return replace(example, turns=(*self.messages, *example.turns))
        prompt, completion = _raw(example)
        asked = f"{self.before}{prompt}{self.after}"
        return Example(example.line, prompt=asked, completion=completion, task=example.task)


def encode_with(
    template: Template, examples: Sequence[Example], tokenizer: Any, limit: int
) -> list[Encoded] | None:
    """Token ids of the examples as the template shows them; None where one has more than `limit` of them. Only what
    each example has to say itself is learned, not the answers that the template shows."""
    found = []
    for example in examples:
        *_, whole = encode([template.apply(example)], tokenizer, max_length=10**9)
        if len(whole.input_ids) > limit:
            return None
        (own,) = encode([example], tokenizer, max_length=10**9)[-1:] if example.turns else [whole]
        said = sum(label != NO_LOSS for label in own.labels)
        places = [at for at, label in enumerate(whole.labels) if label != NO_LOSS][-said:]
        labels = tuple(label if at >= places[0] else NO_LOSS for at, label in enumerate(whole.labels))
        found.append(replace(whole, labels=labels, example=example))
    return found


def choose(model: Trained, base: LoadedBase, dataset: Dataset, config: TrainConfig, progress: Progress) -> Template:
    """The best of all candidates on examples of `dataset` that it does not show. Raises DataError."""
    rng = random.Random(config.seed)
    examples = list(dataset.examples)
    rng.shuffle(examples)
    judges = examples[: min(_LAST, len(examples) // 2)]
    shown = examples[len(judges) :]
    if not judges:
        raise DataError(f"{dataset.source} has too few examples to choose a prompt by.", field="data")
    limit = min(config.max_length, base.shape.context)
    candidates = _candidates(_wordings(dataset, config), shown, rng)
    progress(Stage(f"{len(candidates)} candidates, judged by {len(judges)} examples of the training part"))
    count = min(_FIRST, len(judges))
    while True:
        scored = []
        for template in candidates:
            encoded = encode_with(template, judges[:count], base.tokenizer, limit)
            if encoded is not None:
                scored.append((held_out_loss(model, encoded), template))
        if not scored:
            raise DataError(f"No candidate leaves room for the prompts in {limit} tokens.", field="max_length")
        scored.sort(key=lambda pair: pair[0])
        progress(Stage(f"best of {len(scored)} on {count} examples: loss {scored[0][0]:.4f}"))
        candidates = [template for _, template in scored[: -(-len(scored) // 2)]]
        if len(scored) == 1 or count == len(judges):
            return scored[0][1]
        count = min(2 * count, len(judges))


def _wordings(dataset: Dataset, config: TrainConfig) -> list[Template]:
    if config.candidates is not None:
        return _read_candidates(config.candidates)
    if dataset.examples[0].turns:
        return [Template()]
    if dataset.labels:
        names = ", ".join(dataset.labels)
        after = "\nTags:" if dataset.examples[0].words else "\nLabel:"
        told = f"Tag each word with one of: {names}.\n\n" if after == "\nTags:" else f"The labels are: {names}.\n\n"
        return [Template(after=after), Template(told, after)]
    return [Template()]


def _candidates(wordings: Sequence[Template], shown: Sequence[Example], rng: random.Random) -> list[Template]:
    found = list(wordings)
    for wording in wordings:
        for count in _SHOTS:
            if count <= len(shown):
                found += [_with_shots(wording, _draw(shown, count, rng)) for _ in range(_DRAWS)]
    return found


def _draw(examples: Sequence[Example], count: int, rng: random.Random) -> list[Example]:
    """Different answers first, as many as there are: a prompt that shows one label only invites that label."""
    by_answer: dict[str, list[Example]] = {}
    for example in rng.sample(list(examples), len(examples)):
        by_answer.setdefault(example.answer, []).append(example)
    piles = rng.sample(list(by_answer.values()), len(by_answer))
    drawn = [pile[turn] for turn in range(count) for pile in piles if turn < len(pile)][:count]
    return rng.sample(drawn, len(drawn))


def _with_shots(wording: Template, shots: Sequence[Example]) -> Template:
    if shots[0].turns:
        return replace(wording, messages=(*wording.messages, *(turn for shot in shots for turn in shot.turns)))
    pairs = [_raw(shot) for shot in shots]
    shown = "".join(f"{prompt}{wording.after}{answer}\n\n" for prompt, answer in pairs)
    return replace(wording, before=wording.before + shown)


def _raw(example: Example) -> tuple[str, str]:
    """What a client sends, and what is to follow: the template brings all words in between."""
    if example.words:
        return " ".join(example.words), f" {' '.join(example.tags)}"
    if example.label is not None:
        return example.prompt or "", f" {example.label}"
    return example.prompt or "", example.completion or ""


def _read_candidates(path: Path) -> list[Template]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}", field="candidates") from error
    found = [_candidate(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{path} is empty: it has no candidates.", field="candidates")
    return found


def _candidate(where: str, line: str) -> Template:
    try:
        record: Any = json.loads(line)
        messages = tuple(Turn(turn["role"], turn["content"]) for turn in record.get("messages", ()))
        template = Template(record.get("before", ""), record.get("after", ""), messages)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{where}: expected an object with before, after or messages: {error}") from error
    if not all(isinstance(text, str) for text in (template.before, template.after)):
        raise DataError(f"{where}: before and after must be strings.")
    return template
