"""The engine: `step()` schedules, runs the model once over everything that is due, samples, and emits.

Single-threaded; only the reading of adapters happens elsewhere (see `residency`).
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
from msgspec.structs import replace

from onebase_adapters.errors import AdapterError
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.base.describe import cache_shape
from onebase_engine.base.load_base import _eos_tokens, load_base, model_bytes
from onebase_engine.base.package_files import Progress
from onebase_engine.cache.block_pool import BlockPool
from onebase_engine.engine_config import EngineConfig
from onebase_engine.engine_info import EngineInfo, EngineStats
from onebase_engine.grammar import GrammarError, Grammars
from onebase_engine.kernels.batch import BLOCK
from onebase_engine.kernels.cpu.build import Build
from onebase_engine.request import EngineRequest, Output
from onebase_engine.residency.resident_adapters import Residency
from onebase_engine.residency.waiting import Aside
from onebase_engine.runner.batched_model import ServedModel
from onebase_engine.runner.batching import Chunk
from onebase_engine.runner.encoder_decoder import EncoderDecoder
from onebase_engine.runner.paged_attention import ATTENTION_NAME, register_attention
from onebase_engine.sampling.prompt_outputs import PromptReader
from onebase_engine.sampling.sampler import Choice, sample
from onebase_engine.scheduling.scheduler import Plan, Scheduler, Work
from onebase_engine.scheduling.sequence import Sequence
from onebase_engine.start_phases import Phases
from onebase_engine.startup import _cache_blocks, _give_back_memory

log = logging.getLogger(__name__)


def _nothing() -> None:
    pass


class Engine:
    """A served base with its scheduler and cache. Every submitted request gets exactly one last Output."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        wake: Callable[[], None] = _nothing,
        progress: Progress = log.info,
        phases: Phases | None = None,
        kernels: Build | None = None,
    ) -> None:
        """Load the base and take the cache's memory. `wake` is called, from another thread, when a step may find
        something new to do; `phases` are those of a start that has begun, `kernels` are being compiled already.
        Raises BaseModelError or ConfigError."""
        phases = phases or Phases(progress)
        phases.begin("loading weights")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        register_attention()
        base = load_base(config.base, attention=ATTENTION_NAME, progress=phases.tell)
        phases.begin("preparing weights")
        if base.device.type == "cpu":
            kernels = kernels or Build(phases.tell)
            kernels.wait()
        blocks = _cache_blocks(config, base.model.config, base.device)
        self.model: ServedModel | EncoderDecoder
        if base.shape.encoder_decoder:
            self.model = EncoderDecoder(base, slots=config.max_adapters)
        else:
            self.model = ServedModel(base, slots=config.max_adapters, blocks=blocks, head=config.head)
        phases.begin("warming up")
        self.model.warm_up(all_kinds=kernels is None or kernels.over)
        _give_back_memory()
        self.pool = BlockPool(blocks, BLOCK, reuse=config.reuse_prefixes and not base.shape.encoder_decoder)
        context = min(config.max_model_len or base.shape.context, base.shape.context)
        whole_prompts = base.shape.encoder or base.shape.encoder_decoder
        self.scheduler = Scheduler(
            self.pool,
            max_batch_tokens=max(config.max_batch_tokens, context if whole_prompts else 1),
            max_running=config.max_running,
            whole_prompts=whole_prompts,
        )
        self.residency = Residency(self.model, wake)
        self._reader = PromptReader(self.model)
        self._grammars = Grammars(
            lambda: str(base.tokenizer.backend_tokenizer.to_str()),
            base.shape.vocab,
            _eos_tokens(base.model, base.tokenizer.eos_token_id),
            wake,
        )
        self._sequences: dict[str, Sequence] = {}
        self._aside = Aside(self.residency)
        self._arrivals = 0
        self._steps = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._cached_tokens = 0
        self._eos = frozenset(_eos_tokens(base.model, base.tokenizer.eos_token_id))
        phases.end()
        log.info(
            "the engine is loaded",
            extra={"fields": {part.replace(" ", "_"): round(took, 2) for part, took in phases.seconds.items()}},
        )
        token_bytes = cache_shape(base.model.config).token_bytes
        self.info = EngineInfo(
            model=base.shape.name,
            fingerprint=base.shape.fingerprint,
            model_type=base.shape.model_type,
            quantization=config.base.quantization,
            device=str(base.device),
            vocab=base.shape.vocab,
            context=context,
            generates=not base.shape.encoder,
            cache_tokens=blocks * BLOCK,
            weight_bytes=model_bytes(base.model),
            cache_bytes=blocks * BLOCK * token_bytes,
            eos_token_ids=tuple(sorted(self._eos)),
            load_seconds=phases.seconds,
            max_adapters=config.max_adapters,
        )

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing until something new arrives (a command, or a read adapter)."""
        return self.scheduler.idle

    @property
    def busy(self) -> int:
        """Requests that have not ended."""
        return len(self._sequences)

    def submit(self, request: EngineRequest) -> Output | None:
        """Accept a request; or refuse it at once, with its only Output."""
        refusal = self._refusal(request)
        if refusal is not None:
            return _failure(request.id, *refusal)
        self._arrivals += 1
        sequence = Sequence(request, self._arrivals, self._eos)
        if request.sampling.grammar is not None:
            sequence.grammar = self._grammars.start(request.sampling.grammar)
        self._sequences[request.id] = sequence
        self._aside.add(sequence)
        return None

    def read_adapter(self, digest: str, folder: str) -> Future[LoweredAdapter]:
        """Start reading an adapter's folder; the result is for `residency.admit`."""
        return self.residency.add(digest, Path(folder))

    def close(self) -> None:
        """Let go of what runs beside the steps."""
        self.residency.close()
        self._grammars.close()

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it holds; nothing if it has ended."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence)

    def abort_all(self) -> list[Output]:
        """End everything, as `abort`."""
        ended = list(self._sequences)
        for request_id in ended:
            self.abort(request_id)
        return [Output(request_id, finish_reason="abort") for request_id in ended]

    def step(self) -> list[Output]:
        """Advance everything that is due by one forward pass."""
        outputs = self._call_in_those_aside()
        plan = self.scheduler.plan()
        for sequence in plan.preempted:
            self.model.release(sequence.request.id)
        if not plan.work:
            return outputs
        self._steps += 1
        try:
            scores = self.model.forward([self._chunk(work) for work in plan.work])
        except (MemoryError, RuntimeError) as error:
            return outputs + self._fail(plan, error)
        rows = self._reader.read(plan, scores)
        done = [work.sequence for work in plan.work if work.samples]
        sampled = [sequence for sequence in done if sequence.request.task == "generate"]
        choices = sample(scores, rows, sampled)
        for work in plan.work:
            self.scheduler.advance(work)
            self._prompt_tokens += max(0, min(work.count, work.sequence.prompt_tokens - work.start))
        outputs += [self._emit(s, choice) for s, choice in zip(sampled, choices, strict=True)]
        return outputs + [self._conclude(s) for s in done if s.request.task != "generate"]

    def stats(self) -> EngineStats:
        """A snapshot."""
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=self.scheduler.waiting + len(self._aside),
            blocks_total=self.pool.total,
            blocks_free=self.pool.free,
            blocks_cached=self.pool.cached,
            blocks_used=self.pool.used,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            cached_tokens=self._cached_tokens,
            preemptions=self.scheduler.preemptions,
            adapters_loaded=self.residency.loaded,
            adapter_bytes=self.residency.bytes,
            adapter_loads=self.residency.loads,
            adapter_evictions=self.residency.evictions,
        )

    def uses(self, digest: str) -> bool:
        """Whether a request that has not ended needs this loaded adapter."""
        return any(digest in sequence.request.loaded for sequence in self._sequences.values())

    def _refusal(self, request: EngineRequest) -> tuple[str, str] | None:
        """(kind, why) for a request that can never run."""
        tokens = len(request.prompt) + request.most_tokens
        if request.id in self._sequences:
            return "internal", f"request id {request.id} is in use"
        if not request.prompt:
            return "internal", "the prompt has no tokens"
        if request.task == "generate" and not self.info.generates:
            return "task", f"{self.info.model} is an encoder: it classifies and embeds, but generates nothing"
        if self.model.shape.encoder_decoder and request.task != "generate":
            return "task", f"{self.info.model} is an encoder-decoder: it generates, and does nothing else here"
        if self.model.shape.encoder_decoder and request.sampling.prompt_logprobs is not None:
            return "task", f"{self.info.model} is an encoder-decoder: a prompt's tokens have no logprobs"
        if (refusal := self._too_large(tokens)) is not None:
            return refusal
        for digest in request.loaded:
            if not self.residency.knows(digest):
                return "adapter", f"adapter {digest} is not loaded"
        return None

    def _too_large(self, tokens: int) -> tuple[str, str] | None:
        if tokens > self.info.context:
            return "too_large", f"{tokens} tokens asked for, the context holds {self.info.context}"
        if not self.scheduler.fits(tokens):
            return "too_large", f"{tokens} tokens asked for, the whole cache holds {self.info.cache_tokens}"
        return None

    def _call_in_those_aside(self) -> list[Output]:
        """Queue the sequences whose grammar is compiled and whose adapter has become resident."""
        outputs = []
        for sequence, outcome in self._aside.settle(self._steps):
            if isinstance(outcome, AdapterError | GrammarError):
                del self._sequences[sequence.request.id]
                whose = "composition" if sequence.request.parts else "adapter"
                kind = "grammar" if isinstance(outcome, GrammarError) else whose
                outputs.append(_failure(sequence.request.id, kind, outcome.message))
                continue
            sequence.place(*outcome, self.info.vocab)
            refusal = self._too_large(sequence.prompt_tokens + sequence.request.most_tokens)
            self.scheduler.add(sequence)
            if refusal is not None:  # only now, with the adapter's virtual tokens
                self._end(sequence)
                outputs.append(_failure(sequence.request.id, *refusal))
        return outputs

    def _emit(self, sequence: Sequence, choice: Choice) -> Output:
        first = sequence.generated == 0
        if choice.token < 0:
            self._end(sequence)
            if sequence.grammar is not None and (why := sequence.grammar.error) is not None:
                return _failure(sequence.request.id, "grammar", f"The grammar failed: {why}")
            return _failure(
                sequence.request.id, "adapter", "The logits are not finite: the adapter's numbers overflow."
            )
        reason = sequence.append(choice.token)
        if reason is not None:
            self._end(sequence)
        self._generated_tokens += 1
        if first:
            self._cached_tokens += sequence.cached_tokens
        stopped = reason == "stop"
        return Output(
            sequence.request.id,
            tokens=() if stopped else (choice.token,),
            logprobs=() if stopped or choice.logprobs is None else (choice.logprobs,),
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first and sequence.prompt_logprobs else None,
            cached_tokens=sequence.cached_tokens if first else 0,
            waited=sequence.waited if first else 0.0,
            finish_reason=reason,
            stop_token=choice.token if stopped else None,
        )

    def _conclude(self, sequence: Sequence) -> Output:
        output = replace(self._reader.conclude(sequence), waited=sequence.waited)
        self._end(sequence)
        return output

    def _chunk(self, work: Work) -> Chunk:
        sequence = work.sequence
        return Chunk(
            tokens=sequence.tokens[work.start : work.start + work.count],
            start=work.start,
            blocks=sequence.blocks,
            slot=sequence.slot,
            sample=work.samples,
            all_logits=self._reader.wants_every_row(sequence),
            sequence=sequence.request.id,
            prompt=sequence.prompt_tokens,
        )

    def _fail(self, plan: Plan, error: Exception) -> list[Output]:
        """A forward pass failed. Out of memory costs the largest piece of work its request; the others' pieces
        are simply due again. Any other failure ends all that took part, since nobody knows whose fault it was."""
        requests = [work.sequence.request.id for work in plan.work]
        log.exception("the forward pass failed", extra={"fields": {"requests": requests}})
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if out_of_memory:
            failed = [max(plan.work, key=lambda work: work.count).sequence]
            kind, why = "out_of_memory", "The device ran out of memory for this request."
        else:
            failed = [work.sequence for work in plan.work]
            kind, why = "internal", f"The model failed: {error}"
        for sequence in failed:
            self._end(sequence)
        return [_failure(sequence.request.id, kind, why) for sequence in failed]

    def _end(self, sequence: Sequence) -> None:
        """Free all that a sequence holds."""
        del self._sequences[sequence.request.id]
        if sequence in self._aside:
            self._aside.remove(sequence)
            return
        self._reader.forget(sequence)
        self.model.release(sequence.request.id)
        self.scheduler.remove(sequence)
        if sequence.request.adapter is not None:
            self.residency.release(sequence.request.adapter)


def _failure(request_id: str, kind: str, why: str) -> Output:
    log.info("a request failed: %s", why, extra={"fields": {"requests": [request_id], "error": kind}})
    return Output(request_id, finish_reason="error", error=why, error_kind=kind)
