"""The parts of a start: how long each took, and a line now and then about one that takes long."""

import threading
import time
from collections.abc import Callable

_SECONDS = 2.0
"""The longest silence while something loads."""


class Phases:
    """One part after another. A thread of its own speaks for them, since what they do holds theirs up."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        """Seconds of each part that is over."""
        self._say = tell
        self._name: str | None = None
        self._began = self._told = time.monotonic()
        self._over = threading.Event()
        threading.Thread(target=self._speak, name="phases", daemon=True).start()

    def begin(self, name: str) -> None:
        """The next part; what was before it is over."""
        now = time.monotonic()
        if self._name is not None:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._began
        self._name, self._began = name, now

    def end(self) -> None:
        """The last part is over."""
        self.begin("")
        self._over.set()

    def tell(self, line: str) -> None:
        """Pass on what a part has to say."""
        self._told = time.monotonic()
        self._say(line)

    def _speak(self) -> None:
        while not self._over.wait(_SECONDS / 4):
            silent = time.monotonic() - max(self._told, self._began)
            if self._name and silent >= _SECONDS:
                self.tell(f"{self._name}: {time.monotonic() - self._began:.0f} s")
