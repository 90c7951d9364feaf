"""Hard prompts: the wording and the examples to show, chosen among candidates by the loss on other examples.

All candidates are tried on a few examples, the better half on twice as many, and so on (successive halving,
Jamieson and Talwalkar 2016). What they are judged by is of the training part: the held-out part stays unseen.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from onebase_adapters.errors import AdapterFormatError, DataError
from onebase_adapters.formats.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from onebase_adapters.lowering.template import read_template
from onebase_adapters.primitives.instruction_set import Template
from onebase_contract.events import Progress, Stage
from onebase_contract.settings import TrainConfig
from onebase_training.data import Dataset, Encoded, Example
from onebase_training.data.encoding.encode_template import encode_with, raw

_SHOTS = (1, 2, 4, 8)
_DRAWS = 2
"""Candidates for each number of shots and wording."""
_FIRST = 8
"""Examples of the first comparison."""
_LAST = 64


def choose(
    loss: Callable[[Sequence[Encoded]], float],
    dataset: Dataset,
    config: TrainConfig,
    tokenizer: Any,
    limit: int,
    progress: Progress,
) -> Template:
    """The best of all candidates on examples of `dataset` that it does not show, by the base's mean loss over
    examples of at most `limit` tokens. Raises DataError."""
    rng = random.Random(config.seed)
    examples = list(dataset.examples)
    rng.shuffle(examples)
    judges = examples[: min(_LAST, len(examples) // 2)]
    shown = examples[len(judges) :]
    if not judges:
        raise DataError(f"{dataset.source} has too few examples to choose a prompt by.", field="data")
    candidates = _candidates(_wordings(dataset, config), shown, rng)
    progress(Stage(f"{len(candidates)} candidates, judged by {len(judges)} examples of the training part"))
    count = min(_FIRST, len(judges))
    while True:
        scored = []
        for template in candidates:
            encoded = encode_with(template, judges[:count], tokenizer, limit)
            if encoded is not None:
                scored.append((loss(encoded), template))
        if not scored:
            raise DataError(f"No candidate leaves room for the prompts in {limit} tokens.", field="max_length")
        scored.sort(key=lambda pair: pair[0])
        progress(Stage(f"best of {len(scored)} on {count} examples: loss {scored[0][0]:.4f}"))
        candidates = [template for _, template in scored[: -(-len(scored) // 2)]]
        if len(scored) == 1 or count == len(judges):
            return scored[0][1]
        count = min(2 * count, len(judges))


def _wordings(dataset: Dataset, config: TrainConfig) -> list[Template]:
    stop = _ends(dataset)
    if config.candidates is not None:
        return _read_candidates(config.candidates, stop)
    if dataset.labels and not dataset.examples[0].turns:
        names = ", ".join(dataset.labels)
        after = "\nTags:" if dataset.examples[0].words else "\nLabel:"
        told = f"Tag each word with one of: {names}.\n\n" if after == "\nTags:" else f"The labels are: {names}.\n\n"
        return [Template(after=after, stop=stop), Template(told, after, stop=stop)]
    return [Template(stop=stop)]


def _ends(dataset: Dataset) -> tuple[str, ...]:
    """The end of an answer: the first of two texts that no answer has in it. A chat's answers end by themselves."""
    if dataset.examples[0].turns:
        return ()
    answers = [raw(example)[1] for example in dataset.examples]
    return next(((text,) for text in ("\n", "\n\n") if not any(text in answer for answer in answers)), ())


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
        turns = ({"role": turn.role, "content": turn.content} for shot in shots for turn in shot.turns)
        return replace(wording, messages=(*wording.messages, *turns))
    pairs = [raw(shot) for shot in shots]
    shown = "".join(f"{prompt}{wording.after}{answer}\n\n" for prompt, answer in pairs)
    return replace(wording, before=wording.before + shown)


def _read_candidates(path: Path, stop: tuple[str, ...]) -> list[Template]:
    """Those that say nothing of `stop` get this one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}", field="candidates") from error
    found = [
        _candidate(f"{path}, line {number}", line, stop) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not found:
        raise DataError(f"{path} is empty: it has no candidates.", field="candidates")
    return found


def _candidate(where: str, line: str, stop: tuple[str, ...]) -> Template:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: {error}", field="candidates") from error
    known = ("before", "after", "messages", "stop")
    if not isinstance(record, dict) or any(key not in known for key in record):
        raise DataError(f"{where}: expected an object of {', '.join(known)}.", field="candidates")
    try:
        return read_template({"stop": list(stop), **record})
    except AdapterFormatError as error:
        raise DataError(f"{where}: {error}", field="candidates") from error


def write_template(template: Template, folder: Path, base: str) -> None:
    """Write the adapter's two files."""
    settings: dict[str, Any] = {
        "peft_type": "TEMPLATE",
        "base_model_name_or_path": base,
        "before": template.before,
        "after": template.after,
        "messages": [dict(turn) for turn in template.messages],
        "stop": list(template.stop),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    save_file({}, folder / WEIGHTS_FILE, metadata={"format": "pt"})
