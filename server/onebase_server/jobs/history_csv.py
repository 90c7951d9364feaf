"""A job's result file: its curves as CSV, as OpenAI's `fine-tune-results` have them."""

import csv
import io

from onebase_server.jobs.job_store import JobBook

_COLUMNS = ("step", "train_loss", "valid_loss", "learning_rate")


def write_history(book: JobBook, job_id: str) -> str:
    """Write the losses that the job told of, one row a step; returns the file's id."""
    rows: dict[int, dict[str, object]] = {}
    for event in book.events(job_id):
        if event.kind == "metrics":
            rows.setdefault(event.data["step"], {}).update(event.data)
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for step in sorted(rows):
        writer.writerow(rows[step])
    content = io.BytesIO(text.getvalue().encode())
    return book.add_file(content, f"{job_id}.csv", "fine-tune-results").id
