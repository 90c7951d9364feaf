"""A check's findings on the terminal, with the exact tokens that are learned in colour."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from onebase_training.data.data_check import Check
from onebase_training.data.encoding.encode import NO_LOSS, Encoded

_BAR = 36
_BINS = 10
_LABELS = 12
_EDGE = 48
"""Tokens shown at both ends of a run that is too long to show whole."""


def show(check: Check, tokenizer: Any, console: Console) -> None:
    """Print everything that was found."""
    for part in _parts(check, tokenizer):
        console.print(part, highlight=False)


def _parts(check: Check, tokenizer: Any) -> Iterator[RenderableType]:
    yield _title(check)
    yield _section("Tokens", _lengths(check))
    if check.labels:
        yield _section("Labels", _bars(check.labels))
    if len(check.tasks) > 1:
        yield _section("Tasks", _bars(check.tasks))
    yield _section("Findings", Group(*_findings(check)))
    samples = [_sample(one, tokenizer) for one in check.samples]
    yield _section("What is learned (green, each token shaded apart); the rest is only read", Group(*samples))


def _title(check: Check) -> Text:
    data = check.data
    text = Text.assemble((data.source, "bold"), f": {_count(data, 'example')}, format {data.format}")
    if check.held_out is not None:
        text.append(f"; held out: {check.held_out.source}, {_count(check.held_out, 'example')}")
    return text.append(f"\nmeasured by {check.metric}; sha256 {data.digest[:16]}")


def _section(title: str, body: RenderableType) -> RenderableType:
    return Group("", Text(title, "bold"), Padding(body, (0, 0, 0, 2)))


def _lengths(check: Check) -> RenderableType:
    lengths = sorted(check.lengths)
    total = sum(lengths)
    middle, most = lengths[len(lengths) // 2], lengths[int(0.95 * (len(lengths) - 1))]
    summary = (
        f"{total:,} in {len(lengths):,} sequences, {check.learned:,} of them learned "
        f"({check.learned / total:.0%}); median {middle}, 95% up to {most}, longest {lengths[-1]}"
    )
    # Ten bins over what is usual; one more takes the tail.
    width = -(-most // _BINS)
    counts = Counter(min((length - 1) // width, _BINS) for length in lengths)
    table = Table.grid(padding=(0, 1))
    for place in range(max(counts) + 1):
        first = place * width + 1
        name = f"{first} or more" if place == _BINS else f"{first} to {first + width - 1}"
        colour = "cyan" if first <= check.max_length else "red"
        table.add_row(
            Text(name, justify="right"), _bar(counts[place], max(counts.values()), colour), str(counts[place])
        )
    return Group(summary, table)


def _bars(counts: Mapping[str, int]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    total = sum(counts.values())
    for name, count in list(counts.items())[:_LABELS]:
        table.add_row(
            Text(name, overflow="ellipsis"),
            _bar(count, max(counts.values()), "magenta"),
            f"{count} ({count / total:.0%})",
        )
    if len(counts) > _LABELS:
        table.add_row(f"and {len(counts) - _LABELS} more")
    return table


def _bar(count: int, most: int, colour: str) -> Text:
    return Text("█" * -(-count * _BAR // max(1, most)), colour)


def _findings(check: Check) -> Iterator[Text]:
    yield _length_finding(check)
    yield from _prompt_findings(check)
    if len(check.labels) > 1 and max(check.labels.values()) > 10 * min(check.labels.values()):
        rarest, total = min(check.labels, key=lambda name: check.labels[name]), sum(check.labels.values())
        yield _finding(False, f"the rarest label is {rarest!r}: {check.labels[rarest]} of {total}")
    if check.spellings:
        names = "; ".join(" and ".join(map(repr, group)) for group in check.spellings[:4])
        yield _finding(False, f"labels that differ only in spaces, case or Unicode form: {names}")
    for name, count in sorted(check.data.unused.items()):
        yield _finding(False, f"the column {name!r} is not used (something is in it in {_count(count, 'record')})")
    if check.data.skipped:
        yield _finding(
            False, f"{_count(check.data.skipped, 'record')} left out; the first: {check.data.skipped[0]}"
        )
    if check.loose:
        where = _lines(check.loose)
        yield _finding(False, f"chats that begin with the assistant, or end with another (not learned): {where}")


def _length_finding(check: Check) -> Text:
    if not check.too_long:
        return _finding(True, f"all fit into {check.max_length} tokens")
    uncuttable = sum(one.prompt >= check.max_length for one in check.too_long)
    detail = f" ({uncuttable} in the prompt alone)" if uncuttable else ""
    return _finding(
        False,
        f"{len(check.too_long)} longer than {check.max_length} tokens{detail}: training refuses them, or skips or "
        f"cuts them if told to. The longest has {max(one.tokens for one in check.too_long)}. "
        f"{_lines([one.line for one in check.too_long]).capitalize()}",
    )


def _prompt_findings(check: Check) -> Iterator[Text]:
    surplus = sum(len(group) - 1 for group in check.duplicates)
    if surplus:
        where = f"{_count(check.duplicates, 'group')}, the first in {_lines(check.duplicates[0])}"
        few = surplus < 0.01 * len(check.data)
        yield _finding(few, f"{_count(surplus, 'near-duplicate prompt')} in {where}")
    else:
        yield _finding(True, "no near-duplicate prompts")
    if check.conflicts:
        where = f"{_count(check.conflicts, 'prompt')}, the first in {_lines(check.conflicts[0])}"
        yield _finding(not check.labels, f"the same prompt with different answers: {where}")
    if check.leaks:
        held_out, training = check.leaks[0]
        yield _finding(
            False,
            f"{_count(check.leaks, 'held-out prompt')} nearly as in training, so the measurement would flatter; "
            f"the first in line {held_out} (line {training} in training)",
        )
    elif check.held_out is not None:
        yield _finding(True, "no held-out prompt is a near-duplicate of one in training")


def _finding(good: bool, text: str) -> Text:
    return Text.assemble(("✓ ", "green") if good else ("! ", "bold yellow"), text)


def _count(things: Sized | int, noun: str) -> str:
    number = things if isinstance(things, int) else len(things)
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _lines(lines: Sequence[int]) -> str:
    shown = ", ".join(map(str, lines[:8]))
    return f"line{'s' if len(lines) > 1 else ''} {shown}{', ...' if len(lines) > 8 else ''}"


def _sample(one: Encoded, tokenizer: Any) -> RenderableType:
    text = Text()
    shade = 0
    for ids, learned in _runs(one):
        pieces = list(token_texts(ids, tokenizer))
        if len(pieces) > 3 * _EDGE:
            gap = f" … {len(pieces) - 2 * _EDGE} tokens … "
            pieces = [*pieces[:_EDGE], gap, *pieces[-_EDGE:]]
        for piece in pieces:
            shade = 1 - shade
            visible = piece.replace("\r", "␍").replace("\n", "⏎\n")
            text.append(visible, ("black on green3", "black on green1")[shade] if learned else "bright_black")
    return Group(Text(f"{one.example.place}, {len(one.input_ids)} tokens", "italic"), text, "")


def _runs(one: Encoded) -> Iterator[tuple[list[int], bool]]:
    run: list[int] = []
    learned = False
    for token, label in zip(one.input_ids, one.labels, strict=True):
        if (label != NO_LOSS) != learned and run:
            yield run, learned
            run = []
        learned = label != NO_LOSS
        run.append(token)
    yield run, learned


def token_texts(ids: Sequence[int], tokenizer: Any) -> Iterator[str]:
    """Yield the text of each token; tokens of one character's bytes come together."""
    before: list[int] = []
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        # Behind its predecessors: alone, a token may lose its leading space.
        start = len(tokenizer.decode(before))
        text = tokenizer.decode(before + pending)[start:]
        if not text.endswith("\ufffd") or len(pending) == 4:
            yield text
            before, pending = pending, []
    if pending:
        yield tokenizer.decode(pending)
