"""One sequence's text as it may be shown: detokenised, and cut where a stop string begins."""

from collections.abc import Sequence

from onebase_engine.text.detokenizer import Detokenizer


class OutputText:
    """Holds back only what may be the beginning of a stop string; counts the tokens used up to the cut."""

    __slots__ = ("_detokenizer", "_held", "_include_stop", "_min_tokens", "_stops", "stop", "tokens")

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._held = ""
        self.tokens = 0
        """How many tokens the text took, the one that completed a stop string included."""
        self.stop: str | None = None
        """The stop string that was met; nothing may be pushed after it."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that may be shown now. Stops taking tokens at a stop string: see `tokens` and `stop`."""
        if not self._stops:
            self.tokens += len(tokens)
            return self._detokenizer.push(tokens)
        shown = []
        for token in tokens:  # one by one, so that the count does not depend on how the tokens were grouped
            self.tokens += 1
            shown.append(self._cut(self._detokenizer.push((token,))))
            if self.stop is not None:
                break
        return "".join(shown)

    def finish(self) -> str:
        """Give the text that was held back, once no more tokens come."""
        if self.stop is not None:
            return ""
        shown = self._cut(self._detokenizer.flush())
        if self.stop is None:
            shown += self._held
        return shown

    def _cut(self, text: str) -> str:
        if not text or not self._stops or self.tokens <= self._min_tokens:
            return text
        text = self._held + text
        if found := first_stop(text, self._stops):
            end, start, self.stop = found
            return text[: end if self._include_stop else start]
        keep = self._beginning_of_a_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _beginning_of_a_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max(map(len, self._stops)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, int, str] | None:
    """End and start in `text` of the one of `stops` that is complete first, and that one; of two that end together,
    the longer. None where there is none."""
    found = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found) if found else None
