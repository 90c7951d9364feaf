"""The engine from Python, without a process or HTTP: prompts in, texts out, each under the adapter that it names.

One thread at a time may use an LLM. Iterators that are not at their end share the steps with later calls.
"""

import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from onebase_adapters.errors import AdapterError, AdapterExistsError, AdapterNotFoundError, ConfigError
from onebase_adapters.formats.checks import check_folder
from onebase_engine.base.base_spec import DEFAULT_BASE, BaseSpec, Quantization
from onebase_engine.base.catalog import fetch_base
from onebase_engine.engine_config import EngineConfig
from onebase_engine.engine_info import AdapterInfo, EngineInfo
from onebase_engine.llm_values import (
    ClassificationOutput,
    CompletionOutput,
    RequestOutput,
    SamplingParams,
    ScoreOutput,
)
from onebase_engine.request import EngineRequest, Output, Task, TokenLogprobs
from onebase_engine.startup import start_engine
from onebase_engine.text.answer import Answer, generation_error
from onebase_engine.text.hard_prompt import templated, templated_tokens, templated_turns
from onebase_engine.text.stop_strings import OutputText
from onebase_engine.text.tokenizer import load_codec

Message = Mapping[str, Any]
Prompt = str | Sequence[int]
"""Text, or token ids."""
Names = str | Sequence[str | None] | None
"""One adapter for all prompts, or one for each; None is the base alone."""
Settings = SamplingParams | Sequence[SamplingParams] | None
"""One for all prompts, or one for each."""

_WAKE_SECONDS = 0.05
"""So often an engine that waits for an adapter or a grammar is looked after, even if nothing wakes it."""


@dataclass(frozen=True)
class _Loaded:
    name: str | None
    digest: str | None
    info: AdapterInfo | None


_BASE = _Loaded(None, None, None)


@dataclass(frozen=True)
class _Asked:
    """One prompt as the engine gets it."""

    text: str | None
    tokens: tuple[int, ...]
    adapter: _Loaded
    field: str
    """For messages."""
    said: int = 0
    """As in EngineRequest."""


class LLM:
    """A base in memory and any number of adapters by name, in one batch."""

    def __init__(
        self,
        model: str = DEFAULT_BASE,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        quantization: Quantization = "nf4",
        device: str = "auto",
        max_model_len: int | None = None,
        cache_gib: float | None = None,
        max_adapters: int = EngineConfig.max_adapters,
        threads: int | None = None,
    ) -> None:
        """Load the base (catalog name, folder, .gguf file or hub id) and the adapters' folders by name.

        The settings are those of `onebase serve`. Raises BaseModelError, ConfigError, or AdapterError and its
        branches."""
        spec = BaseSpec(str(model), quantization, device=device)
        self._codec = load_codec(fetch_base(spec.model))
        self._woken = threading.Event()
        config = EngineConfig(
            spec, max_model_len=max_model_len, cache_gib=cache_gib, max_adapters=max_adapters, threads=threads
        )
        self._engine = start_engine(config, wake=self._woken.set)
        self._adapters: dict[str, _Loaded] = {}
        self._numbers = count()
        self._arrived: dict[str, deque[Output]] = {}
        """Outputs of requests that have not ended, until their iterator takes them."""
        self._stepping = False
        self._dropped: list[str] = []
        """Requests that were given up during a step."""
        self._closed = False
        try:
            for name, path in (adapters or {}).items():
                self.load_adapter(name, path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def info(self) -> EngineInfo:
        """Facts about the loaded base and its cache."""
        return self._engine.info

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """What is loaded, by name."""
        return {name: loaded.info for name, loaded in self._adapters.items() if loaded.info is not None}

    def close(self) -> None:
        """End what runs. Nothing can be asked afterwards; the memory is free once the LLM is out of scope."""
        if not self._closed:
            self._closed = True
            self._engine.abort_all()
            self._engine.close()

    def load_adapter(self, name: str, path: str | Path) -> AdapterInfo:
        """Add the adapter in a folder, which must stay as it is while the adapter is loaded.

        Raises AdapterExistsError (the name is taken), or AdapterError and its other branches."""
        self._check_open()
        if name in self._adapters:
            raise AdapterExistsError(f"The name {name!r} is taken: unload that adapter first.", field="name")
        folder = Path(path).expanduser().resolve()
        check_folder(folder, self._codec.tokenizer.get_vocab())
        # Not the name alone: what the prefix cache holds of an adapter must not serve the next one of its name.
        digest = f"{name}#{next(self._numbers)}"
        info = self._engine.load_adapter(digest, folder).result()
        self._adapters[name] = _Loaded(name, digest, info)
        return info

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises AdapterNotFoundError, or AdapterError while an iterator is not at its end."""
        self._check_open()
        if not self._engine.unload_adapter(self._find(name, "name").digest or ""):
            raise AdapterError(f"{name!r} is in use: take its iterator to the end, or close it.", field="name")
        del self._adapters[name]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Settings = None,
        adapter: Names = None,
    ) -> list[RequestOutput]:
        """Continue one prompt or several, together. Settings and adapter are for all of them, or one for each.

        Raises ConfigError (a prompt that cannot be asked), AdapterNotFoundError, or GenerationError: then none of
        them goes on."""
        asked = self._asked_all(_listed(prompts), adapter)
        return self._generate(asked, sampling_params)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Settings = None,
        adapter: Names = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, by the base's chat template. Raises as `generate`, and
        ChatTemplateError."""
        one = not messages or isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if one else messages
        loaded = self._named(adapter, len(conversations))
        asked = [
            self._asked_chat(turns, its, _field("messages", number, len(conversations)), chat_template_kwargs or {})
            for number, (turns, its) in enumerate(zip(conversations, loaded, strict=True))
        ]
        return self._generate(asked, sampling_params)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        adapter: str | None = None,
    ) -> Iterator[str]:
        """Continue a prompt, or answer a conversation: the text piece by piece. Leaving the iterator ends the
        request. Raises as `generate` and `chat`."""
        params = sampling_params or SamplingParams()
        if params.n != 1:
            raise ConfigError("A stream is one sequence: n must be 1.", field="n")
        loaded = self._find(adapter, "adapter")
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            asked = self._asked_chat(prompt, loaded, "prompt", {})
        else:
            asked = self._asked(prompt, loaded, "prompt")  # type: ignore[arg-type]  # then they are token ids
        return self._pieces(self._answers(asked, params))

    def classify(
        self, prompts: Prompt | Sequence[Prompt], adapter: str | Sequence[str]
    ) -> list[ClassificationOutput]:
        """Label texts, or each of their tokens, by the heads of adapters. Raises as `generate`, and AdapterError
        for an adapter without a head."""
        asked = self._asked_all(_listed(prompts), adapter)
        found = []
        for one in asked:
            head = one.adapter.info.head if one.adapter.info is not None else None
            if head is None:
                raise AdapterError(f"{one.adapter.name!r} has no classification head.", field="adapter")
            found.append((one, head.labels))
        outputs = self._read(asked, "classify")
        return [
            ClassificationOutput(one.tokens, labels, output.probabilities)
            for (one, labels), output in zip(found, outputs, strict=True)
        ]

    def embed(self, prompts: Prompt | Sequence[Prompt], adapter: Names = None) -> list[tuple[float, ...]]:
        """The mean of each prompt's last hidden states, of length 1. Raises as `generate`."""
        return [output.embedding for output in self._read(self._asked_all(_listed(prompts), adapter), "embed")]

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt],
        adapter: Names = None,
    ) -> list[ScoreOutput]:
        """How likely each continuation is after its prompt; one of either may be for all of the other. Raises as
        `generate`."""
        starts, ends = _listed(prompts), _listed(continuations)
        number = max(len(starts), len(ends))
        starts = _each(starts * number if len(starts) == 1 else starts, number, "prompts")
        ends = _each(ends * number if len(ends) == 1 else ends, number, "continuations")
        asked = []
        for at, (one, end) in enumerate(zip(self._asked_all(starts, adapter), ends, strict=True)):
            field = _field("continuations", at, number)
            tokens = tuple(self._encode(end, field, special=False))
            self._check(tokens, field)
            asked.append(_Asked(one.text, one.tokens + tokens, one.adapter, one.field, len(tokens)))
        scores = []
        for one, output in zip(asked, self._read(asked, "score"), strict=True):
            logprobs = tuple(entry for entry in output.prompt_logprobs or () if entry is not None)
            total = sum(entry.logprob for entry in logprobs)
            scores.append(ScoreOutput(total, one.tokens[-one.said :], logprobs))
        return scores

    def _generate(self, asked: Sequence[_Asked], sampling_params: Settings) -> list[RequestOutput]:
        params = _each(
            SamplingParams() if sampling_params is None else sampling_params, len(asked), "sampling_params"
        )
        answers = [self._answers(one, its) for one, its in zip(asked, params, strict=True)]
        flat = [answer for group in answers for answer in group]
        texts = [""] * len(flat)
        tokens: list[list[int]] = [[] for _ in flat]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in flat]
        fields = [one.field for one, group in zip(asked, answers, strict=True) for _ in group]
        with closing(self._run(flat, fields)) as pieces:
            for at, output, text in pieces:
                texts[at] += text
                tokens[at] += output.tokens[: flat[at].text.tokens - len(tokens[at])]
                logprobs[at] += flat[at].new_logprobs
        made = iter(zip(flat, texts, tokens, logprobs, strict=True))
        results = []
        for one, group in zip(asked, answers, strict=True):
            outputs = tuple(_completed(*next(made)) for _ in group)
            first = group[0]
            results.append(
                RequestOutput(
                    one.text, one.tokens, outputs, one.adapter.name, first.prompt_logprobs, first.cached_tokens
                )
            )
        return results

    def _pieces(self, answers: Sequence[Answer]) -> Iterator[str]:
        with closing(self._run(answers, ["prompt"])) as pieces:
            for _, _, text in pieces:
                if text:
                    yield text

    def _answers(self, asked: _Asked, params: SamplingParams) -> list[Answer]:
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            self._check_ids(ids, name)
        template = asked.adapter.info.template if asked.adapter.info is not None else None
        stops = (*params.stop, *(template.stop if template is not None else ()))
        answers = []
        for index in range(params.n):
            text = OutputText(
                self._codec.detokenizer(asked.tokens, skip_special=params.skip_special_tokens),
                stops,
                include_stop=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )
            answers.append(Answer(index, self._request(asked, params.of_choice(index)), text))
        return answers

    def _request(self, asked: _Asked, params: SamplingParams, task: Task = "generate") -> EngineRequest:
        number, digest = str(next(self._numbers)), asked.adapter.digest
        return EngineRequest(number, asked.tokens, params, digest, task=task, said=asked.said, scored=asked.said)

    def _run(
        self, answers: Sequence[Answer], fields: Sequence[str]
    ) -> Generator[tuple[int, Output, str], None, None]:
        """Each output with its answer's number and its new text, until all have ended."""
        with closing(self._outputs([answer.request for answer in answers], fields)) as outputs:
            for at, output in outputs:
                text = answers[at].take(output)
                if answers[at].finish_reason is not None:
                    self._drop([answers[at].request.id])  # a stop string ends it before the engine does
                yield at, output, text

    def _read(self, asked: Sequence[_Asked], task: Task) -> list[Output]:
        """The outputs of requests that generate nothing."""
        requests = [self._request(one, SamplingParams(), task) for one in asked]
        found: dict[int, Output] = {}
        with closing(self._outputs(requests, [one.field for one in asked])) as outputs:
            for at, output in outputs:
                found[at] = output
        return [found[at] for at in range(len(requests))]

    def _outputs(
        self, requests: Sequence[EngineRequest], fields: Sequence[str]
    ) -> Generator[tuple[int, Output], None, None]:
        """Submit requests, and step until they have ended or have been dropped. Whatever happens, none of them
        stays behind. Raises GenerationError for the first that fails."""
        self._check_open()
        numbers = {request.id: at for at, request in enumerate(requests)}
        try:
            for request in requests:
                self._arrived[request.id] = deque()
                refusal = self._engine.submit(request)
                if refusal is not None:
                    self._arrived[request.id].append(refusal)
            while waiting := [request_id for request_id in numbers if request_id in self._arrived]:
                if not any(self._arrived[request_id] for request_id in waiting):
                    self._check_open()
                    self._step()
                for request_id in waiting:
                    while self._arrived.get(request_id):
                        output = self._arrived[request_id].popleft()
                        if output.finish_reason in ("error", "abort"):
                            error = generation_error(output)
                            error.field = error.field or fields[numbers[request_id]]
                            raise error
                        if output.finish_reason is not None:
                            del self._arrived[request_id]
                        yield numbers[request_id], output
        finally:
            self._drop(list(numbers))

    def _step(self) -> None:
        """One step of the engine for all that is due; its outputs go to whom they belong."""
        self._woken.clear()
        self._stepping = True
        try:
            with _interrupted_afterwards():
                outputs = self._engine.step()
                for output in outputs:
                    if output.id in self._arrived:
                        self._arrived[output.id].append(output)
        finally:
            self._stepping = False
            dropped, self._dropped = self._dropped, []
            self._drop(dropped)
        if not outputs and self._engine.idle:
            self._woken.wait(_WAKE_SECONDS)

    def _drop(self, request_ids: Sequence[str]) -> None:
        """Give up what has not ended. The collector may do this to an iterator at any time, even within a step."""
        for request_id in request_ids:
            self._arrived.pop(request_id, None)
            if self._stepping:
                self._dropped.append(request_id)
            else:
                self._engine.abort(request_id)

    def _asked_all(self, prompts: Sequence[Prompt], adapter: Names) -> list[_Asked]:
        loaded = self._named(adapter, len(prompts))
        return [
            self._asked(prompt, its, _field("prompts", number, len(prompts)))
            for number, (prompt, its) in enumerate(zip(prompts, loaded, strict=True))
        ]

    def _asked(self, prompt: Prompt, adapter: _Loaded, field: str) -> _Asked:
        template = adapter.info.template if adapter.info is not None else None
        text = templated(template, prompt) if isinstance(prompt, str) else None
        tokens = self._encode(prompt if text is None else text, field)
        if text is None:
            tokens = templated_tokens(self._codec, template, tokens)
        self._check(tokens, field)
        return _Asked(text, tuple(tokens), adapter, field)

    def _asked_chat(
        self, messages: Sequence[Any], adapter: _Loaded, field: str, variables: Mapping[str, Any]
    ) -> _Asked:
        template = adapter.info.template if adapter.info is not None else None
        own = adapter.info.chat_template if adapter.info is not None else None
        text = self._codec.chat(own).render(templated_turns(template, messages), **variables)
        tokens = self._encode(text, field, special=False)  # the chat template has written them already
        self._check(tokens, field)
        return _Asked(text, tuple(tokens), adapter, field)

    def _encode(self, prompt: Prompt, field: str, *, special: bool = True) -> list[int]:
        if not isinstance(prompt, str):
            if not isinstance(prompt, Sequence) or not all(isinstance(token, Integral) for token in prompt):
                raise ConfigError(f"{field} must be text or token ids, not {type(prompt).__name__}.", field=field)
            return [int(token) for token in prompt]
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"Character {error.start} is a lone surrogate.", field=field) from error
        return self._codec.encode(prompt, add_special_tokens=special)

    def _check(self, tokens: Sequence[int], field: str) -> None:
        if not tokens:
            raise ConfigError(f"{field} is empty: it has no tokens.", field=field)
        self._check_ids(tokens, field)

    def _check_ids(self, tokens: Sequence[int] | Mapping[int, float], field: str) -> None:
        vocabulary = self._engine.info.vocab
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise ConfigError(f"Token {token} is not in the vocabulary of {vocabulary} tokens.", field=field)

    def _named(self, adapter: Names, number: int) -> list[_Loaded]:
        return [self._find(name, "adapter") for name in _each(adapter, number, "adapter")]

    def _find(self, name: str | None, field: str) -> _Loaded:
        if name is None:
            return _BASE
        loaded = self._adapters.get(name)
        if loaded is None:
            known = f"There are {', '.join(sorted(self._adapters))}." if self._adapters else "None is loaded."
            raise AdapterNotFoundError(f"No adapter is named {name!r}. {known}", field=field)
        return loaded

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("This LLM is closed: make another.")


def _completed(
    answer: Answer, text: str, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> CompletionOutput:
    wanted = answer.request.sampling.logprobs is not None
    return CompletionOutput(
        answer.index,
        text,
        tuple(tokens),
        answer.finish_reason or "abort",
        answer.stop_reason,
        tuple(logprobs) if wanted else None,
    )


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as several."""
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))
    return [prompts] if one else list(prompts)  # type: ignore[list-item,arg-type]  # as was just checked


def _each(values: Any, number: int, field: str) -> list[Any]:
    """One value for all, or one for each. Raises ConfigError."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        return [values] * number
    if len(values) != number:
        raise ConfigError(
            f"{field} has {len(values)} entries for {number}: give one, or one for each.", field=field
        )
    return list(values)


def _field(name: str, number: int, of: int) -> str:
    return name if of == 1 else f"{name}[{number}]"


@contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Ctrl-C takes effect at the end: half a step would leave the engine's books wrong."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda *call: came.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        handler(*came[0])
