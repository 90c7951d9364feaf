"""What a start says: nothing takes longer in silence than two seconds."""

import time

import pytest

from onebase_engine import start_phases as module
from onebase_engine.start_phases import Phases


def test_a_long_part_says_so_and_each_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.1)
    told: list[str] = []
    phases = Phases(told.append)
    phases.begin("importing")
    phases.begin("loading weights")
    time.sleep(0.45)
    assert told[:2] == ["loading weights: 0 s"] * 2
    phases.end()
    told.clear()
    time.sleep(0.25)
    assert told == []
    assert list(phases.seconds) == ["importing", "loading weights"]
    assert phases.seconds["importing"] < 0.1 <= 0.45 <= phases.seconds["loading weights"]


def test_a_part_that_speaks_for_itself_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.4)
    told: list[str] = []
    phases = Phases(told.append)
    phases.begin("preparing weights")
    for count in range(6):
        phases.tell(f"{count} of 6")
        time.sleep(0.1)
    assert told == [f"{count} of 6" for count in range(6)]
    phases.end()
