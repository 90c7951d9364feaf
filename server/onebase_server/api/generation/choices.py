"""One sequence of a response as it grows: the engine's outputs become text, counts and an ending."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from msgspec.structs import replace

from onebase_engine.request import EngineRequest, Output
from onebase_engine.text.answer import Answer, GenerationError
from onebase_engine.text.stop_strings import OutputText
from onebase_server.api.adapters.directory import Target
from onebase_server.api.prometheus import SequenceTimer
from onebase_server.api.schemas.generation import Generation
from onebase_server.api.services import Services
from onebase_server.engine_process.engine_client import EngineClient
from onebase_server.logs import note


class Choice(Answer):
    """An answer that is timed."""

    __slots__ = ("timer",)

    def __init__(self, index: int, request: EngineRequest, text: OutputText, timer: SequenceTimer) -> None:
        super().__init__(index, request, text)
        self.timer = timer

    def take(self, output: Output) -> str:
        self.timer.waited = output.waited or self.timer.waited
        return super().take(output)


Show = Callable[[Choice, str], Awaitable[None]]
"""Takes a choice and the text it has just got; called for every output, the last one included."""


def make_choices(
    services: Services, body: Generation, target: Target, request: EngineRequest, count: int, first_index: int
) -> list[Choice]:
    """`count` sequences of one prompt, under `target`."""
    choices = []
    stops = (*(body.stop or ()), *(target.template.stop if target.template is not None else ()))
    for index in range(first_index, first_index + count):
        sampling = request.sampling.of_choice(index - first_index)
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
