"""Stands in for the training process: takes a JobOrder, and does what its data file says.

The first line of the data: {"steps": 3, "delay": 0.01, "error": "...", "kill_at": 2, "exit": 3}.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def tell(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def main() -> None:
    order = json.loads(sys.argv[1])
    options = order["settings"]
    plan = json.loads(Path(options["data"]).read_text().splitlines()[0])
    output = Path(options["output"])
    work = output.parent / f".{output.name}.training"
    first = 1
    if options["resume"]:
        first = int((work / "step").read_text()) + 1
    work.mkdir(parents=True, exist_ok=True)
    print("a library's print", flush=True)
    tell("stage", text=f"fake run from step {first}")
    steps = plan.get("steps", 3)
    for step in range(first, steps + 1):
        time.sleep(plan.get("delay", 0))
        loss = 1 / step
        tell(
            "step", step=step, steps=steps, loss=loss, learning_rate=0.1, tokens_per_second=9.0,
            seconds_left=float(steps - step),
        )  # fmt: skip
        (work / "step").write_text(str(step))
        if step % 2 == 0:
            tell("evaluated", step=step, loss=loss / 2, accuracy=0.5 if step == 4 else None, best=True)
        if plan.get("kill_at") == step and not options["resume"]:
            os.kill(os.getpid(), signal.SIGKILL)
    if "error" in plan:
        shutil.rmtree(work)
        tell("failed", text=plan["error"].replace("{data}", options["data"]))
        sys.exit(1)
    if "exit" in plan:
        print("last words", file=sys.stderr)
        sys.exit(plan["exit"])
    scratch = work / "result"
    scratch.mkdir()
    config = {"peft_type": "LORA", "given": order, **plan.get("config", {})}
    (scratch / "adapter_config.json").write_text(json.dumps(config))
    (scratch / "adapter_model.safetensors").write_bytes(Path(options["data"]).read_bytes())
    (scratch / "onebase.json").write_text('{"metrics": {"after": {"loss": 0.5}}}')
    scratch.replace(output)
    shutil.rmtree(work)


main()
