"""`README.md` of a run's result."""

from onebase_engine.export import model_card
from onebase_engine.export.model_card import Card
from onebase_training.run_result import TrainResult


def render_card(result: TrainResult, hub_id: str) -> str:
    """The card of an adapter, or of a model all of whose weights were trained."""
    notes, whole, name = result.notes, result.notes["method"] == "full", result.output.name
    served = (
        f"onebase serve --model {name}"
        if whole
        else f"onebase serve --model {notes['base']['model']} --adapter-root .   # and register the folder {name}"
    )
    about = (
        f"Trained by OneBase with {notes['method']} on {hub_id} ({notes['base']['quantization']}): "
        f"{result.steps:,} steps, {result.parameters:,} parameters. `report.html` has the curve and examples of "
        "answers, `onebase.json` all settings."
    )
    marks = {"before": result.before.marks, "after": result.after.marks}
    return model_card.render_card(
        Card(
            name=name,
            base=hub_id,
            library="transformers" if whole else "peft",
            relation="finetune" if whole else "adapter",
            about=about,
            commands=[served],
            notes={**notes, "metrics": marks},
        )
    )
