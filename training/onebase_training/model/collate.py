"""Examples to the tensors of one pass: packed whole into one row, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from onebase_adapters.primitives.virtual_tokens import Layout
from onebase_training.data import NO_LOSS, Encoded


@dataclass(frozen=True)
class Collator:
    """Makes one packed row of several examples."""

    vocab: int = 0
    """Virtual token i has the id `vocab + i`, as when it is served."""
    places: tuple[int, ...] = ()
    """Places of the virtual tokens that each example gets; see `Layout`."""
    ahead: bool = True
    """Labels are next tokens. Else they are classes, each at its own token."""

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """N tokens with M labels, all int64: input_ids [N]; bounds [S + 1], where examples start and the last ends;
        rows [M], the tokens whose hidden state predicts a label; labels [M]."""
        row: list[int] = []
        bounds = [0]
        rows: list[int] = []
        labels: list[int] = []
        for example in examples:
            start = len(row)
            tokens, wanted = self.arrange(example)
            row += tokens
            bounds.append(len(row))
            for place, label in enumerate(wanted):
                if label != NO_LOSS and place >= self.ahead:
                    rows.append(start + place - self.ahead)
                    labels.append(label)
        made = {"input_ids": row, "bounds": bounds, "rows": rows, "labels": labels}
        return {name: torch.tensor(value, dtype=torch.int64) for name, value in made.items()}

    def learned(self, example: Encoded) -> int:
        """Labels that an example brings into a batch."""
        return sum(label != NO_LOSS for label in self.arrange(example)[1][self.ahead :])

    def arrange(self, example: Encoded) -> tuple[list[int], list[int]]:
        """An example's tokens and labels, with the virtual tokens in their places."""
        if not self.places:
            return list(example.input_ids), list(example.labels)
        end = example.prompt_length
        order = Layout(places=self.places).arrange(range(end), end)
        tokens = [example.input_ids[at] if at < end else self.vocab + at - end for at in order]
        labels = [example.labels[at] if at < end else NO_LOSS for at in order]
        return tokens + list(example.input_ids[end:]), labels + list(example.labels[end:])
