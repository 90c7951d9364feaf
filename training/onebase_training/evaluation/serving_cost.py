"""The cost of serving an adapter: the time of a token beside the base's, measured, and the context it takes.

The same requests are put to the engine with the adapter and without it, in turns. A turn's two times are compared,
and the median is taken: a machine that is busy with other work is so for both. On a CPU the choice of the token is
left out: how long that takes depends on how sure the model is.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer

from onebase_adapters.errors import AdapterError
from onebase_contract.events import silent
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.catalog import fetch_base
from onebase_engine.engine import Engine
from onebase_engine.engine_info import AdapterInfo
from onebase_engine.request import EngineRequest, SamplingParams
from onebase_training.data import Encoded, Example, encode, encode_for_head
from onebase_training.data.encoding.encode_template import encode_with
from onebase_training.evaluation import served

STREAMS = 16
"""Most requests of the batch."""
Tokens = tuple[int, ...]
_TURNS = 8
"""The first does not count."""
_TOKENS = 12
"""How many each request of a turn generates."""
_LONGEST = 2048
"""Examples with more tokens are left out."""


@dataclass(frozen=True)
class ServingCost:
    """The cost of serving one adapter."""

    times: float | None
    """Time of a token of a batch of requests, as a multiple of the base's. None: refused, or not measured."""
    context: int
    """Tokens of the context that each request gives up."""
    refused: str = ""
    """Why it is not served, if it is not."""


def serving_cost(folder: Path, spec: BaseSpec, examples: Sequence[Example]) -> ServingCost:
    """Measure the cost of the adapter in `folder` on the base as it is served, by the first of `examples`. Raises
    BaseModelError."""
    tokenizer = AutoTokenizer.from_pretrained(fetch_base(spec.model))
    with served.serving(spec, _LONGEST, silent) as engine:
        try:
            info = served.load(engine, folder)
        except AdapterError as error:
            return ServingCost(None, 0, str(error))
        room = min(_LONGEST, engine.info.context - info.virtual_tokens) - _TOKENS
        plain, shown = _prompts(examples[:STREAMS], info, tokenizer, room)
        if not plain:
            return ServingCost(None, info.virtual_tokens)
        text = (sum(map(len, shown)) - sum(map(len, plain))) // len(plain)
        batches = [
            _requests(engine, info, prompts, adapted) for prompts, adapted in ((plain, False), (shown, True))
        ]
        turns = [[_seconds(engine, batch) for batch in batches] for _ in range(_TURNS)]
    return ServingCost(median(adapted / bare for bare, adapted in turns[1:]), info.virtual_tokens + text)


def _prompts(
    examples: Sequence[Example], info: AdapterInfo, tokenizer: Any, room: int
) -> tuple[list[Tokens], list[Tokens]]:
    """Each example's prompt without the adapter, and with the text that the adapter puts around it."""
    if info.head is not None:
        labelled = encode_for_head(examples, tokenizer, list(info.head.labels), max_length=room, too_long="skip")
        plain = [one.input_ids for one in labelled]
        return plain, plain
    pairs = []
    template = None if info.template is None else served.template_of(info.template)
    for one in examples:
        bare = encode([one], tokenizer, max_length=room, too_long="skip")[-1:]
        around = bare if template is None else encode_with(template, [one], tokenizer, room)
        if bare and around:
            pairs.append((_prompt(bare[0]), _prompt(around[0])))
    return [before for before, _ in pairs], [after for _, after in pairs]


def _prompt(one: Encoded) -> Tokens:
    return one.input_ids[: one.prompt_length]


def _requests(engine: Engine, info: AdapterInfo, prompts: Sequence[Tokens], adapted: bool) -> list[EngineRequest]:
    """A turn's requests: to write so many tokens, or to read the prompt where that is all that the adapter does."""
    reads = info.head is not None or not engine.info.generates
    sampling = SamplingParams(max_tokens=_TOKENS, temperature=0.0, ignore_eos=True)
    return [
        served.request(number, prompt, sampling, adapted, task="embed" if reads else "generate")
        for number, prompt in enumerate(prompts)
    ]


def _seconds(engine: Engine, requests: Sequence[EngineRequest]) -> float:
    """A token's time for all of the requests: the median of their steps, of which all but the first few decode;
    or, where they are only read, the whole time."""
    # A GPU's work is waited for where the token is chosen, always from all logits.
    on_cpu = engine.info.device == "cpu"

    def clock() -> float:
        return engine.stats().model_seconds if on_cpu else time.perf_counter()

    times = [clock()]
    for _ in served.steps(engine, requests):
        times.append(clock())
    if requests[0].task == "embed":
        return times[-1] - times[0]
    return median(after - before for before, after in pairwise(times))
