"""An engine over a tiny model, driven step by step; what must hold after every step is checked."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.describe import cache_shape
from onebase_engine.engine import Engine
from onebase_engine.engine_config import EngineConfig
from onebase_engine.kernels.batch import BLOCK
from onebase_engine.request import EngineRequest, Output, Part, SamplingParams, Task, TokenLogprobs


def engine_config(folder: Path, *, blocks: int = 128, **options: Any) -> EngineConfig:
    """For the model in `folder`, with a cache of so many blocks."""
    cache = (blocks + 0.5) * BLOCK * cache_shape(AutoConfig.from_pretrained(folder)).token_bytes
    return EngineConfig(base=BaseSpec(str(folder), device="cpu"), cache_gib=cache / 2**30, **options)


@dataclass
class Result:
    """All that one request got."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int = 0
    ending: Output | None = None

    def take(self, output: Output) -> None:
        assert self.ending is None, f"{output.id} goes on after its end"
        self.tokens += output.tokens
        self.logprobs += output.logprobs
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        self.cached_tokens += output.cached_tokens
        if output.finish_reason is not None:
            self.ending = output


class Driver:
    """Submits, steps, collects."""

    def __init__(self, engine: Engine, adapters: Sequence[Path] = ()) -> None:
        """`adapters` are loaded under their whole paths."""
        self.engine = engine
        self.results: dict[str, Result] = {}
        for folder in adapters:
            self.load(folder)

    def load(self, folder: Path) -> None:
        self.engine.load_adapter(str(folder), folder).result(timeout=30)

    def submit(
        self,
        name: str,
        prompt: Sequence[int],
        adapter: Path | None = None,
        *,
        tenant: str = "",
        parts: Mapping[Path, float] | None = None,
        task: Task = "generate",
        said: int = 0,
        **sampling: Any,
    ) -> Result:
        """Greedy and past the end token, unless said otherwise; `parts` are composed."""
        params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 8} | sampling)
        digest = str(parts) if parts else None if adapter is None else str(adapter)
        composed = tuple(Part(str(part), weight, part.name) for part, weight in (parts or {}).items())
        result = self.results[name] = Result()
        request = EngineRequest(
            name, tuple(prompt), params, digest, tenant, parts=composed, task=task, said=said, scored=said
        )
        refused = self.engine.submit(request)
        if refused is not None:
            result.take(refused)
        return result

    def step(self) -> list[Output]:
        outputs = self.engine.step()
        for output in outputs:
            self.results[output.id].take(output)
        stats = self.engine.stats()
        assert stats.blocks_free + stats.blocks_cached + stats.blocks_used == stats.blocks_total
        assert not self.engine.faults()
        return outputs

    def run(self, limit: int = 5000) -> None:
        """Until every request has ended; then nothing may be held any more."""
        for _ in range(limit):
            if not self.engine.busy:
                break
            if self.engine.idle:
                time.sleep(0.001)  # an adapter is being read
            self.step()
        assert all(result.ending is not None for result in self.results.values())
        self.check_nothing_held()

    def check_nothing_held(self) -> None:
        stats = self.engine.stats()
        assert (stats.blocks_used, stats.running, stats.waiting) == (0, 0, 0)
        assert stats.blocks_free + stats.blocks_cached == stats.blocks_total
        assert not self.engine.residency.users()
