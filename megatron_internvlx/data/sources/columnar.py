"""Parquet files as hubs publish them: images inside, conversations or question and answer beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_internvlx.data.sources.record import LeftOut, ReadSettings, Records
from megatron_internvlx.data.sources.rows import RowReader, column_notes, is_conversation

_BATCH_ROWS = 16  # rows in memory: a row may hold several photographs
_CONVERSATION = ("conversations", "conversation", "messages", "texts", "images", "image", "video", "videos")


def read_parquet(files: Sequence[Path], settings: ReadSettings) -> tuple[str, Records, list[str]]:
    """Description of Parquet files with the same columns, their records, and notes; keys `file[row]` counted from 0.

    Raises ValueError for files that are not Parquet, and columns without a usual name.
    """
    from pyarrow import parquet

    columns: list[str] = []
    notes: list[str] = []
    for path in files:
        try:
            names = list(parquet.read_schema(path).names)
        except (OSError, ValueError) as error:  # Arrow's own error is a ValueError
            raise ValueError(f"{path}: not a readable Parquet file: {_first_line(error)}") from error
        chosen = _chosen(names, settings, str(path))
        if columns and chosen != columns:
            raise ValueError(
                f"{path} has the columns {', '.join(names)}, {files[0].name} others: name them one by one"
            )
        columns = chosen
        if not is_conversation(dict.fromkeys(names)):
            notes = column_notes(RowReader(settings, str(path)).columns(names), names, settings)
    return f"Parquet ({', '.join(columns)})", _rows(files, columns, settings), notes


def _chosen(names: list[str], settings: ReadSettings, where: str) -> list[str]:
    """Names of the columns to read."""
    if is_conversation(dict.fromkeys(names)):
        return [name for name in _CONVERSATION if name in names]
    columns = RowReader(settings, where).columns(names)
    return [name for name in (columns.image, columns.question, columns.answer) if name is not None]


def _rows(files: Sequence[Path], columns: list[str], settings: ReadSettings) -> Records:
    from pyarrow import parquet

    for path in files:
        reader = RowReader(settings, str(path))
        number = 0
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                    for row in batch.to_pylist():
                        key = f"{path.name}[{number}]"
                        number += 1
                        try:
                            yield reader.read(row, key)
                        except LeftOut as left_out:
                            yield left_out
        except (OSError, ValueError) as error:
            yield LeftOut(
                f"{path.name}[{number}]",
                "unexpected_error",
                f"the file is broken from this row on: get it again ({_first_line(error)})",
            )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
