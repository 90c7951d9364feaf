"""Merging from folder to folder: written aside, read back, compared with what is served, only then put in place."""

from collections.abc import Sequence
from pathlib import Path

from onebase_adapters.atomic_files import staged_directory
from onebase_adapters.errors import AdapterError, ConfigError
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.base.package_files import Progress
from onebase_engine.export.agreement import agreement, served_tokens
from onebase_engine.export.lowered_on_base import load_lowered
from onebase_engine.export.merged_model import write_merged


def merge_checked(
    path: Path,
    output: Path,
    spec: BaseSpec,
    prompts: Sequence[str | Sequence[int]],
    *,
    least: float,
    progress: Progress,
) -> float:
    """Merge the adapter in `path` into its base and write the model to `output`; gives the share of the served
    adapter's greedy tokens after `prompts` that the written model finds likeliest, too.

    Raises ConfigError (output exists), AdapterError and its branches (it cannot be merged, or fewer than `least`
    agree: then nothing is written), BaseModelError or StorageError.
    """
    if output.exists():
        raise ConfigError(f"{output} exists. Choose another output.", field="output")
    base, adapter = load_lowered(path, spec, progress)
    progress(f"merging into the base as it is served: {base.held}")
    with staged_directory(output) as folder:
        write_merged(base, adapter, folder)
        progress("comparing with the served adapter")
        agreed = agreement(folder, served_tokens(spec, path, prompts), spec.device)
        if agreed < least:
            raise AdapterError(
                f"Only {agreed:.1%} of the served adapter's greedy tokens are the merged model's best, too: "
                f"nothing is written. --least-agreement {agreed:.2f} keeps it all the same.",
                field="least_agreement",
            )
    return agreed
