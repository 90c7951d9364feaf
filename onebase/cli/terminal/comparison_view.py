"""A comparison as a table in the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from onebase_training.comparison.comparison_folder import Entry
from onebase_training.comparison.comparison_page import columns, remarks, table_rows
from onebase_training.comparison.method_comparison import Choice


def show(entries: Sequence[Entry], choice: Choice, console: Console) -> None:
    """Print the table and the recommendation."""
    table = Table(*columns(entries))
    for row in table_rows(entries):
        table.add_row(*row)
    console.print(table)
    for line in remarks(entries):
        console.print(line, highlight=False)
    console.print(f"[bold]{choice.method}[/bold]: {choice.reason}", highlight=False)
