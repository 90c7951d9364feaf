"""Examples through the engine that serves: what it answers, how likely it finds what is wanted, and its labels."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from onebase_adapters.errors import AdapterError
from onebase_adapters.primitives.instruction_set import Template
from onebase_contract.events import Part, Progress, Stage
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.engine import Engine
from onebase_engine.engine_config import EngineConfig
from onebase_engine.engine_info import AdapterInfo, TemplateInfo
from onebase_engine.request import EngineRequest, Output, SamplingParams, Task
from onebase_engine.startup import start_engine
from onebase_training.data import NO_LOSS, Encoded
from onebase_training.evaluation.evaluation_result import Sample, room, sample

_TOGETHER = 16
"""Sequences that are in the engine's cache at once."""
_VIRTUAL = 1024
"""Room for an adapter's virtual tokens. Pages that nobody writes take no memory."""
_ADAPTER = "adapter"


@contextmanager
def serving(spec: BaseSpec, longest: int, progress: Progress) -> Iterator[Engine]:
    """An engine for sequences of at most `longest` tokens, an adapter's not counted. Raises BaseModelError."""
    threads = torch.get_num_threads()
    config = EngineConfig(
        spec, max_running=_TOGETHER, max_adapters=1, cache_tokens=_TOGETHER * (longest + _VIRTUAL)
    )
    try:
        engine = start_engine(config, progress=lambda text: progress(Stage(text)))
        try:
            yield engine
        finally:
            engine.close()
    finally:
        torch.set_num_threads(threads)  # numba's OpenMP has made it the number of cores


def load(engine: Engine, folder: Path) -> AdapterInfo:
    """Make the adapter in a folder the one that the functions below can ask. Raises AdapterError."""
    return engine.load_adapter(_ADAPTER, folder).result()


def template_of(info: TemplateInfo) -> Template:
    """A hard prompt as examples are encoded with it."""
    return Template(info.before, info.after, info.messages, info.stop)


def answers(
    engine: Engine,
    examples: Sequence[Encoded],
    tokenizer: Any,
    *,
    adapted: bool,
    max_new_tokens: int,
    virtual: int,
    progress: Progress,
) -> list[Sample]:
    """Greedy answers of the adapter or of the base, each with a little more room than the wanted one took.
    `virtual`: tokens that the adapter adds."""
    requests = []
    for number, one in enumerate(examples):
        left = engine.info.context - one.prompt_length - virtual
        limit = max(1, min(room(one, max_new_tokens), left))
        sampling = SamplingParams(max_tokens=limit, temperature=0.0)
        requests.append(request(number, one.input_ids[: one.prompt_length], sampling, adapted))
    outputs = _run(engine, requests, progress, "answers")
    return [sample(tokenizer, one, output.tokens) for one, output in zip(examples, outputs, strict=True)]


def loss(engine: Engine, examples: Sequence[Encoded], *, adapted: bool, progress: Progress) -> float:
    """Mean over the examples' learned tokens, in nats."""
    counts = [_scored(one) for one in examples]
    requests = [
        request(
            number,
            one.input_ids,
            SamplingParams(),
            adapted,
            task="score",
            said=len(one.input_ids) - one.prompt_length,
            scored=count,
        )
        for number, (one, count) in enumerate(zip(examples, counts, strict=True))
        if count
    ]
    found = [
        entry.logprob
        for output in _run(engine, requests, progress, "examples")
        for label, entry in zip(
            examples[int(output.id)].labels[-counts[int(output.id)] :], output.prompt_logprobs or (), strict=True
        )
        if label != NO_LOSS and entry is not None
    ]
    return -sum(found) / len(found)


def labels(engine: Engine, examples: Sequence[Encoded], progress: Progress) -> list[tuple[tuple[float, ...], ...]]:
    """The adapter's head's probabilities: one row a text, or one a token."""
    requests = [
        request(number, one.input_ids, SamplingParams(), True, task="classify")
        for number, one in enumerate(examples)
    ]
    return [output.probabilities for output in _run(engine, requests, progress, "examples")]


def _scored(example: Encoded) -> int:
    """Tokens from the first that is learned on. A document's first follows nothing."""
    first = next(place for place, label in enumerate(example.labels) if label != NO_LOSS)
    return len(example.labels) - max(1, first)


def request(
    number: int,
    tokens: Sequence[int],
    sampling: SamplingParams,
    adapted: bool,
    task: Task = "generate",
    said: int = 0,
    scored: int = 0,
) -> EngineRequest:
    """One of the engine's, for the adapter or for the base."""
    adapter = _ADAPTER if adapted else None
    return EngineRequest(str(number), tuple(tokens), sampling, adapter, task=task, said=said, scored=scored)


def steps(engine: Engine, requests: Sequence[EngineRequest]) -> Iterator[list[Output]]:
    """Put requests to the engine and give each step's outputs, until all have ended. Raises AdapterError if one
    fails."""
    try:
        for one in requests:
            if (refused := engine.submit(one)) is not None:
                raise AdapterError(f"The engine refuses an example: {refused.error}.", field="max_length")
        while engine.busy:
            if engine.idle:
                time.sleep(0.001)  # an adapter is being read
            outputs = engine.step()
            for output in outputs:
                if output.finish_reason == "error":
                    raise AdapterError(output.error or "", field="adapter")
            yield outputs
    finally:
        engine.abort_all()


def _run(engine: Engine, requests: Sequence[EngineRequest], progress: Progress, unit: str) -> list[Output]:
    """Each request's outputs as one."""
    found: dict[str, Output] = {}
    ended = 0
    for outputs in steps(engine, requests):
        for output in outputs:
            if (before := found.get(output.id)) is not None:
                tokens = before.tokens + output.tokens
                output = replace(output, tokens=tokens, prompt_logprobs=before.prompt_logprobs)
            found[output.id] = output
            ended += output.finish_reason is not None
        progress(Part(ended, len(requests), unit))
    return [found[one.id] for one in requests]
