"""The engine: `step()` schedules, runs the model once over everything that is due, samples, and emits.

Single-threaded; only adapters are read elsewhere (see `residency`), and grammars compiled (see `grammar`).
"""

import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import asdict, replace

from onebase_adapters.errors import AdapterError
from onebase_engine.engine_info import EngineInfo, EngineStats
from onebase_engine.grammar import GrammarError, Grammars
from onebase_engine.request import EngineRequest, Output
from onebase_engine.residency.resident_adapters import Loading, Residency
from onebase_engine.residency.waiting import Aside
from onebase_engine.runner.batched_model import ServedModel
from onebase_engine.runner.batching import Chunk
from onebase_engine.runner.encoder_decoder import EncoderDecoder
from onebase_engine.sampling.prompt_outputs import PromptReader
from onebase_engine.sampling.sampler import Choice, sample
from onebase_engine.scheduling.scheduler import Plan, Scheduler, Work
from onebase_engine.scheduling.sequence import Sequence, State

log = logging.getLogger(__name__)


class Engine:
    """A served base with its scheduler and cache. Every submitted request gets exactly one last Output."""

    def __init__(
        self,
        model: ServedModel | EncoderDecoder,
        scheduler: Scheduler,
        residency: Residency,
        grammars: Grammars,
        info: EngineInfo,
    ) -> None:
        """The parts as `startup.start_engine` makes them."""
        self.model = model
        self.scheduler = scheduler
        self.pool = scheduler.pool
        self.residency = residency
        self.info = info
        self._reader = PromptReader(model)
        self._grammars = grammars
        self._sequences: dict[str, Sequence] = {}
        self._aside = Aside(residency)
        self._eos = frozenset(info.eos_token_ids)
        self._arrivals = 0
        self._steps = 0
        self._model_seconds = 0.0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._cached_tokens = 0

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

    def load_adapter(self, digest: str, folder: str | Path) -> Loading:
        """Start reading an adapter's folder; requests can name it once the result has been asked for."""
        return self.residency.load(digest, Path(folder))

    def unload_adapter(self, digest: str) -> bool:
        """Forget an adapter, or do nothing: False while a request that has not ended needs it."""
        if any(digest in sequence.request.loaded for sequence in self._sequences.values()):
            return False
        self.residency.forget(digest)
        return True

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
        done = [work.sequence for work in plan.work if work.samples]
        sampled = [sequence for sequence in done if sequence.request.task == "generate"]
        try:  # logits are computed when they are asked for, so all of this can run out of memory
            begun = time.perf_counter()
            scores = self.model.forward([self._chunk(work) for work in plan.work])
            self._model_seconds += time.perf_counter() - begun
            choices = sample(scores, self._reader.read(plan, scores), sampled)
            read = [self._reader.conclude(s) for s in done if s.request.task != "generate"]
        except Exception as error:
            return outputs + self._fail(plan, error)
        for work in plan.work:
            self.scheduler.advance(work)
            self._prompt_tokens += max(0, min(work.count, work.sequence.prompt_tokens - work.start))
        outputs += [self._emit(s, choice) for s, choice in zip(sampled, choices, strict=True)]
        return outputs + [self._conclude(output) for output in read]

    def snapshot(self) -> dict[str, Any]:
        """Who is where and holds what, to be logged when a batch is to be understood; and what is wrong with it."""
        return {
            "sequences": [
                {
                    "request": sequence.request.id,
                    "state": sequence.state.name,
                    "adapter": sequence.request.adapter,
                    "slot": sequence.slot,
                    "tokens": len(sequence.tokens),
                    "computed": sequence.computed,
                    "blocks": list(sequence.blocks),
                }
                for sequence in self._sequences.values()
            ],
            "slots": self.residency.slots(),
            "stats": asdict(self.stats()),
            "faults": self.faults(),
        }

    def faults(self) -> list[str]:
        """Contradictions in the bookkeeping: none as long as there is no bug."""
        placed = [s.request.adapter for s in self._sequences.values() if s.state is not State.ASIDE]
        users = Counter(adapter for adapter in placed if adapter is not None)
        found = self.scheduler.faults()
        if self.residency.users() != users:
            found.append("slots are held for other sequences than there are")
        return found

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
            model_seconds=self._model_seconds,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            cached_tokens=self._cached_tokens,
            preemptions=self.scheduler.preemptions,
            adapters_loaded=self.residency.loaded,
            adapter_bytes=self.residency.bytes,
            adapter_loads=self.residency.loads,
            adapter_evictions=self.residency.evictions,
        )

    def _refusal(self, request: EngineRequest) -> tuple[str, str] | None:
        """(kind, why) for a request that can never run."""
        tokens = len(request.prompt) + request.most_tokens
        if request.id in self._sequences:
            return "internal", f"request id {request.id} is in use"
        if not request.prompt:
            return "internal", "the prompt has no tokens"
        if request.task == "score" and not 0 < request.scored < len(request.prompt):
            return "internal", f"{request.scored} of the prompt's {len(request.prompt)} tokens cannot be scored"
        if request.task in ("generate", "score") and not self.info.generates:
            return "task", f"{self.info.model} is an encoder: it classifies and embeds, but generates nothing"
        if self.model.shape.encoder_decoder and request.task in ("classify", "embed"):
            return (
                "task",
                f"{self.info.model} is an encoder-decoder: it generates and scores, and nothing else",
            )
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
        for sequence, outcome in self._aside.settle():
            if isinstance(outcome, AdapterError | GrammarError):
                del self._sequences[sequence.request.id]
                sequence.move(State.ENDED)
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
        grammar = sequence.grammar
        if choice.token < 0 or (grammar is not None and not grammar.take(choice.token)):
            self._end(sequence)
            if grammar is not None and (why := grammar.error) is not None:
                return _failure(sequence.request.id, "grammar", f"The grammar failed: {why}")
            adapted = sequence.request.adapter is not None
            why = f"The logits are not finite: the {'adapter' if adapted else 'base'}'s numbers overflow."
            return _failure(sequence.request.id, "adapter" if adapted else "internal", why)
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
            prompt_logprobs=(None, *sequence.logprobs) if first and sequence.reads_all else None,
            cached_tokens=sequence.cached_tokens if first else 0,
            waited=sequence.waited if first else 0.0,
            finish_reason=reason,
            stop_token=choice.token if stopped else None,
        )

    def _conclude(self, output: Output) -> Output:
        sequence = self._sequences[output.id]
        self._end(sequence)
        self._cached_tokens += output.cached_tokens
        return replace(output, waited=sequence.waited)

    def _chunk(self, work: Work) -> Chunk:
        sequence = work.sequence
        return Chunk(
            tokens=sequence.tokens[work.start : work.start + work.count],
            start=work.start,
            blocks=sequence.blocks,
            slot=sequence.slot,
            wanted=self._reader.wanted(work),
            sequence=sequence.request.id,
            prompt=sequence.prompt_tokens - sequence.request.said,
        )

    def _fail(self, plan: Plan, error: Exception) -> list[Output]:
        """A step failed, and nothing of it counts. Out of memory costs the largest piece of work its request; the
        others' pieces are simply due again. Any other failure ends all that took part, since nobody knows whose
        fault it was."""
        requests = [work.sequence.request.id for work in plan.work]
        log.exception("a step failed", extra={"fields": {"requests": requests}})
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
        if sequence.state is State.ASIDE:
            self._aside.remove(sequence)
            sequence.move(State.ENDED)
            return
        self._reader.forget(sequence)
        self.model.release(sequence.request.id)
        self.scheduler.remove(sequence)
        if sequence.request.adapter is not None:
            self.residency.release(sequence.request.adapter)


def _failure(request_id: str, kind: str, why: str) -> Output:
    log.info("a request failed: %s", why, extra={"fields": {"requests": [request_id], "error": kind}})
    return Output(request_id, finish_reason="error", error=why, error_kind=kind)
