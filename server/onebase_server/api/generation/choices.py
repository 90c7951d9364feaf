"""One sequence of a response as it grows: the engine's outputs become text, counts and an ending."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from msgspec.structs import replace

from onebase_engine.request import EngineRequest, Output, TokenLogprobs
from onebase_engine.text.stop_strings import OutputText
from onebase_server.api.adapters.directory import Target
from onebase_server.api.error_replies import GenerationError, generation_error
from onebase_server.api.prometheus import SequenceTimer
from onebase_server.api.schemas.generation import Generation
from onebase_server.api.services import Services
from onebase_server.engine_process.engine_client import EngineClient
from onebase_server.logs import note


class Choice:
    """A request to the engine, and what has come of it so far."""

    __slots__ = (
        "cached_tokens",
        "completion_tokens",
        "finish_reason",
        "index",
        "new_logprobs",
        "prompt_logprobs",
        "request",
        "stop_reason",
        "text",
        "timer",
    )

    def __init__(self, index: int, request: EngineRequest, text: OutputText, timer: SequenceTimer) -> None:
        self.index = index
        self.request = request
        self.text = text
        self.timer = timer
        self.completion_tokens = 0
        """All that were generated for it: those that a stop string cut off, and the end-of-sequence token, too."""
        self.cached_tokens = 0
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.new_logprobs: Sequence[TokenLogprobs] = ()
        """Of the tokens in the latest output."""
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        """The stop string or stop token that ended it (vLLM's field); None for the model's own end."""

    def take(self, output: Output) -> str:
        """Add an output; returns the text that may now be shown. Raises GenerationError if it is a bad ending."""
        if output.cached_tokens:
            self.cached_tokens = output.cached_tokens
        self.timer.waited = output.waited or self.timer.waited
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        before = self.text.tokens
        shown = self.text.push(output.tokens) if output.tokens else ""
        if output.logprobs:
            self.new_logprobs = output.logprobs[: self.text.tokens - before]
        else:
            self.new_logprobs = ()
        self.completion_tokens = self.text.tokens
        reason = output.finish_reason
        if reason is not None and self.text.stop is None:
            if reason not in ("stop", "length"):
                raise generation_error(output)
            shown += self.text.finish()
            self.finish_reason = reason
            if output.stop_token is not None:
                self.completion_tokens += 1
                if output.stop_token in self.request.sampling.stop_token_ids:
                    self.stop_reason = output.stop_token
        if self.text.stop is not None:
            self.finish_reason = "stop"
            self.stop_reason = self.text.stop
        return shown


Show = Callable[[Choice, str], Awaitable[None]]
"""Takes a choice and the text it has just got; called for every output, the last one included."""


def make_choices(
    services: Services, body: Generation, target: Target, request: EngineRequest, count: int, first_index: int
) -> list[Choice]:
    """`count` sequences of one prompt, under `target`. Of a seed each has its own, so that they differ and can be
    had again."""
    choices = []
    stops = (*(body.stop or ()), *(target.template.stop if target.template is not None else ()))
    for index in range(first_index, first_index + count):
        sampling = request.sampling
        if sampling.seed is not None and index > first_index:
            sampling = replace(sampling, seed=_wrap(sampling.seed + index - first_index))
        text = OutputText(
            services.codec.detokenizer(request.prompt, skip_special=body.skip_special_tokens is not False),
            stops,
            include_stop=bool(body.include_stop_str_in_output),
            min_tokens=sampling.min_tokens,
        )
        own = replace(request, id=f"{request.id}-{index}", sampling=sampling)
        timer = services.metrics.sequence(target.label, len(request.prompt))
        choices.append(Choice(index, own, text, timer))
    return choices


def _wrap(seed: int) -> int:
    """Keep a seed within 64 bits, as the engine takes it."""
    return (seed + 2**63) % 2**64 - 2**63


async def run_all(engine: EngineClient, choices: Sequence[Choice], show: Show) -> None:
    """Generate all choices at once. When one fails, the others are aborted and its error is raised."""
    tasks: list[asyncio.Task[None]] = []
    try:
        if len(choices) == 1:
            await _run(engine, choices[0], show)
        else:
            tasks += [asyncio.create_task(_run(engine, choice, show)) for choice in choices]
            await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        timers = [choice.timer for choice in choices]
        note(
            completion_tokens=sum(choice.completion_tokens for choice in choices),
            finish_reasons=[choice.finish_reason for choice in choices if choice.finish_reason is not None],
            queue_seconds=max(timer.waited for timer in timers),
            first_token_seconds=min((timer.first_token for timer in timers if timer.first_token), default=None),
        )


async def _run(engine: EngineClient, choice: Choice, show: Show) -> None:
    # Leaving the block early closes the generator, and so aborts what the engine still does for it.
    with choice.timer as timer:
        async with aclosing(engine.generate(choice.request)) as outputs:
            async for output in outputs:
                if output.tokens:
                    timer.got(len(output.tokens))
                text = choice.take(output)
                await show(choice, text)
                if choice.finish_reason is not None:
                    timer.end(choice.finish_reason)
                    return
        raise GenerationError("The engine ended the request without saying why.", kind="internal")


def usage_of(groups: Sequence[Sequence[Choice]]) -> dict[str, Any]:
    """OpenAI's `usage` for the choices of each prompt: a prompt counts once, however many choices it has."""
    prompt_tokens = sum(len(group[0].request.prompt) for group in groups)
    completion_tokens = sum(choice.completion_tokens for group in groups for choice in group)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(group[0].cached_tokens for group in groups)},
    }
