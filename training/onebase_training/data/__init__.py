"""Data: files to examples, examples to token ids, and the checks that come before any training."""

from onebase_training.data.encoding.encode import NO_LOSS, Encoded, TooLong, encode, verbalise
from onebase_training.data.encoding.encode_labels import encode_for_head
from onebase_training.data.examples import Dataset, Example, Turn
from onebase_training.data.reading.read_dataset import read_dataset, read_datasets
from onebase_training.data.split import split

__all__ = [
    "NO_LOSS",
    "Dataset",
    "Encoded",
    "Example",
    "TooLong",
    "Turn",
    "encode",
    "encode_for_head",
    "read_dataset",
    "read_datasets",
    "split",
    "verbalise",
]
