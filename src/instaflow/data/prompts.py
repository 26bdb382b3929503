"""Prompts for a teacher to draw: a text file, Parquet, or a data set of the hub, read as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from instaflow.errors import DataError

COLUMNS = ("prompt", "text", "caption", "TEXT")


def read_prompts(source: str, count: int | None = None) -> list[str]:
    """The first `count` prompts of a source, or all of them; blank ones left out.

    Args:
        source: a .txt file with one a line; a .parquet file or a hub data set id with a column
            prompt, text or caption.
        count: how many.

    Raises:
        DataError: nothing there, no such column, none or fewer than `count`.
    """
    prompts = list(islice((line for line in map(str.strip, _stream(source)) if line), count))
    if not prompts:
        raise DataError(f"{source} has no prompt in it")
    if count is not None and len(prompts) < count:
        raise DataError(f"{source} has {len(prompts)} prompts, and {count} are asked for")
    return prompts


def _stream(source: str) -> Iterator[str]:
    path = Path(source)
    if path.suffix == ".parquet" and path.is_file():
        yield from _parquet(path)
    elif path.is_file():
        try:
            with path.open(encoding="utf-8") as file:
                yield from file
        except UnicodeDecodeError as error:
            raise DataError(f"{source} is no text in UTF-8: {error.reason} at byte {error.start}") from error
    elif path.suffix:
        raise DataError(f"no such file of prompts: {source}")
    else:
        yield from _hub(source)


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        column = _column(path, table.schema_arrow.names)
        for batch in table.iter_batches(columns=[column]):
            yield from (text or "" for text in batch.column(0).to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _hub(name: str) -> Iterator[str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = iter(load_dataset(name, split="train", streaming=True))
        first = next(rows)
    except (DatasetNotFoundError, OSError, ValueError, StopIteration) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"no file {name!r} here, and no such data set on the hub: {reason[:150]}") from error
    column = _column(name, list(first))
    yield str(first[column] or "")
    yield from (str(row[column] or "") for row in rows)


def _column(source: object, names: list[str]) -> str:
    for column in COLUMNS:
        if column in names:
            return column
    raise DataError(f"{source} has the columns {', '.join(names)}; prompts are looked for in {', '.join(COLUMNS)}")
