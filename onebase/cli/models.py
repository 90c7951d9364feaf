"""`onebase models`: the table of families."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def models(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the families of models that are served and trained, how they run, and the tests that prove it."""
    from rich.console import Console
    from rich.table import Table

    from onebase_engine.base.families import FAMILIES, FUSED

    if as_json:
        print(json.dumps([{"family": name, "fused": name in FUSED, **asdict(f)} for name, f in FAMILIES.items()]))
        return
    console = Console()
    table = Table(box=None)
    for column in ("family", "layers", "4 bits", "codes", "GGUF", "served by", "trained by", "models"):
        table.add_column(column, no_wrap=True)
    for name, family in FAMILIES.items():
        layers = "fused" if name in FUSED else "its own"
        tests = [Path(test).stem for test in (family.served, family.trained)]
        table.add_row(name, layers, "yes", _told(family.codes), _told(family.gguf), *tests, family.about)
    console.print(table)
    console.print(
        "layers: our fused ones, where a model's other settings allow them, or its own of transformers between our "
        "kernels; 4 bits: NF4 and FP4, made while loading; codes: checkpoints of GPTQ, AWQ and compressed-tensors; "
        "served by, trained by: the test that compares it with transformers and PEFT. Other classes are refused."
    )


def _told(read: object) -> str:
    return "yes" if read else "-"
