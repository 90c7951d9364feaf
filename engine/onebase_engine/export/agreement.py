"""Whether what was written says what is served: the served adapter's greedy tokens, and how many of them are the
written model's best after the same ones before. Nothing is called done before that."""

from collections.abc import Sequence
from pathlib import Path

from onebase_adapters.errors import AdapterError
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.llm import LLM
from onebase_engine.llm_values import SamplingParams

TEXTS = (
    "The capital of France is",
    "Water boils at a lower temperature on a mountain because",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Dear Sir or Madam,\n\nI am writing to",
    "Name three primary colours:",
    "Once upon a time, in a village by the sea,",
    "Q: What is 17 plus 25?\nA:",
    "The committee has decided that the meeting",
)
_NEW = 32


def served_tokens(
    spec: BaseSpec, adapter: Path, prompts: Sequence[str | Sequence[int]]
) -> list[tuple[list[int], list[int]]]:
    """Each prompt's tokens, and those that the adapter writes after it, the likeliest each."""
    greedy = SamplingParams(max_tokens=_NEW, temperature=0.0)
    with LLM(spec.model, {"served": adapter}, quantization=spec.quantization, device=spec.device) as llm:
        outputs = llm.generate(list(prompts), greedy, "served")
    return [(list(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in outputs]


def check_agreement(agreed: float, least: float) -> None:
    """Raises AdapterError where fewer than `least` of the tokens agree."""
    if agreed < least:
        raise AdapterError(
            f"Only {agreed:.1%} of the served adapter's greedy tokens are the written model's best, too: "
            f"nothing is written. --least-agreement {agreed:.2f} keeps it all the same.",
            field="least_agreement",
        )


def agreement(model: Path, written: Sequence[tuple[list[int], list[int]]], device: str) -> float:
    """The share of the written tokens that a model in bfloat16 finds likeliest, too."""
    asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    some = [pair for pair in written if pair[1]]
    with LLM(str(model), quantization="none", device=device) as llm:
        outputs = llm.generate([prompt + tokens for prompt, tokens in some], asked)
    same = total = 0
    for (prompt, tokens), output in zip(some, outputs, strict=True):
        known = (output.prompt_logprobs or ())[len(prompt) :]
        for token, found in zip(tokens, known, strict=True):
            total += 1
            same += found is not None and bool(found.top) and found.top[0][0] == token
    return same / total if total else 1.0
