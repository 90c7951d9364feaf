"""`README.md` of a result: a model card as hubs read it: what the adapter is, how it did, and how it is used."""

import json

from onebase_training.run_result import TrainResult


def render_card(result: TrainResult, hub_id: str) -> str:
    """Markdown behind a header of YAML, which JSON's values are as well."""
    notes, whole = result.notes, result.notes["method"] == "full"
    header = {
        "base_model": hub_id,
        "library_name": "transformers" if whole else "peft",
        "tags": ["onebase", notes["method"]],
    }
    data, before, after = notes["data"], result.before.marks, result.after.marks
    name = result.output.name
    serve = (
        f"onebase serve --model {name}"
        if whole
        else f"onebase serve --model {notes['base']['model']} --adapter-root .   # and register the folder {name}"
    )
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in header.items()),
        "---",
        "",
        f"# {name}",
        "",
        f"Trained by OneBase with {notes['method']} on {hub_id} ({notes['base']['quantization']}): "
        f"{data['examples']:,} examples, {result.steps:,} steps, {result.parameters:,} parameters.",
        "",
        "| held out | before | after |",
        "|---|---|---|",
        *(f"| {mark} | {_number(before.get(mark))} | {_number(value)} |" for mark, value in after.items()),
        "",
        f"Measured on {data['held_out_examples']:,} examples. `report.html` has the curve and examples of answers, "
        "`onebase.json` all settings.",
        "",
        "```console",
        f"$ {serve}",
        "```",
        "",
    ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
