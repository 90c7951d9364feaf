"""Training an encoder-decoder (T5): prompts in padded batches for the encoder, completions as the decoder's labels.

Rows are padded and not packed: attention with a bias by relative position knows no examples side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from onebase_training.data import NO_LOSS, Encoded
from onebase_training.model.collate import Collator

PAIRED_METHODS = ("lora", "qlora", "prompt-tuning")
"""The methods that train an encoder-decoder."""


@dataclass(frozen=True)
class PairCollator(Collator):
    """Makes a padded batch of several examples. Of a chat only the last answer is learned: the rest is prompt."""

    decoder_start: int = 0
    """The token that the decoder begins with."""

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """B examples with M labels, all int64: input_ids [B, P], the prompts; seen [B, P], 1 where there is no
        padding; decoder_ids [B, D]; rows [M], which of the B * D decoder's tokens predict a label; labels [M]."""
        arranged = [self.arrange(example) for example in examples]
        answers = [len(one.input_ids) - one.prompt_length for one in examples]
        width = max(answers)
        prompts = [tokens[:-count] for (tokens, _), count in zip(arranged, answers, strict=True)]
        written = [
            [self.decoder_start, *tokens[-count:-1]] for (tokens, _), count in zip(arranged, answers, strict=True)
        ]
        wanted = [labels[-count:] for (_, labels), count in zip(arranged, answers, strict=True)]
        learned = [
            (row * width + place, label)
            for row, labels in enumerate(wanted)
            for place, label in enumerate(labels)
            if label != NO_LOSS
        ]
        input_ids, seen = padded(prompts)
        return {
            "input_ids": input_ids,
            "seen": seen,
            "decoder_ids": padded(written)[0],
            "rows": torch.tensor([row for row, _ in learned]),
            "labels": torch.tensor([label for _, label in learned]),
        }

    def learned(self, example: Encoded) -> int:
        return sum(label != NO_LOSS for label in example.labels[example.prompt_length :])


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, longest] int64 with zeros behind the shorter rows, and 1 where there is no padding."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()
