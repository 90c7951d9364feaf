"""How a run is shown while it goes on: a bar in a terminal, lines now and then without one."""

import io
import re
import time

import pytest
from rich.console import Console

from onebase.cli.terminal import run_view as terminal
from onebase_contract.events import Evaluated, Part, Progress, Stage, Step

STEP = Step(3, 10, 1.25, 1e-3, 480.0, 100.0)


def tell_all(progress: Progress) -> None:
    progress(Stage("measuring the base (on 40 examples)"))
    progress(Part(16, 40, "answers"))
    progress(STEP)
    progress(Evaluated(3, 0.5, 0.75, best=True))


def test_a_terminal_shows_stages_and_a_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with terminal.watched(console) as progress:
        tell_all(progress)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "measuring the base (on 40 examples)" in shown
    assert "step 3: held-out loss 0.5000, accuracy 0.750, the best so far" in shown
    assert re.search(r"3 of 10, loss 1.250, 480 tokens/s, 2 min left", shown)


@pytest.mark.slow
def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_EVERY", 0.0)
    console = Console(file=io.StringIO(), force_terminal=False, width=40)
    with terminal.watched(console) as progress:
        progress(Stage("measuring the base (on 40 examples)"))
        progress(Part(16, 40, "answers"))
        time.sleep(1.5)
        progress(STEP)
        time.sleep(1.5)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "measuring the base (on 40 examples)"
    assert "measuring the base: 16 of 40 answers" in lines
    assert lines[-1] == "step 3 of 10: loss 1.250, 480 tokens/s, 2 min left"


def test_without_a_terminal_a_quick_run_says_no_more_than_its_stages() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with terminal.watched(console) as progress:
        tell_all(progress)
    assert len(console.file.getvalue().splitlines()) == 2  # type: ignore[attr-defined]
