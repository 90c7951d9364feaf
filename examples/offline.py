"""`python -m examples.offline [FOLDER FOLDER]`: the default base and its adapters from Python, without a server.

Give folders that `onebase train` wrote; each prompt is then asked of the base and of each of them, in one batch.
"""

from pathlib import Path
from typing import Annotated

import typer

from onebase import LLM, SamplingParams
from onebase.cli.main import run

PROMPTS = ("The capital of France is", "Water boils at")


def offline(
    folders: Annotated[list[Path] | None, typer.Argument(help="Adapters' folders; none: the base alone.")] = None,
) -> None:
    """Ask the base and adapters a few things."""
    adapters = {folder.name: folder for folder in folders or []}
    with LLM(adapters=adapters) as llm:
        asked = [(prompt, name) for prompt in PROMPTS for name in (None, *adapters)]
        greedy = SamplingParams(temperature=0, max_tokens=16, stop="\n")
        outputs = llm.generate([prompt for prompt, _ in asked], greedy, [name for _, name in asked])
        for output in outputs:
            print(f"{output.adapter or 'base'}: {output.prompt}{output.outputs[0].text}")

        print("\nA conversation, as it is written:")
        for piece in llm.stream([{"role": "user", "content": "Name three colours."}], greedy):
            print(piece, end="", flush=True)

        paris, rome = llm.score(PROMPTS[0], [" Paris", " Rome"])
        print(f"\n\nlog-probability of Paris {paris.logprob:.2f}, of Rome {rome.logprob:.2f}")


if __name__ == "__main__":
    cli = typer.Typer(add_completion=False)
    cli.command()(offline)
    run(cli)
