"""Tables of images with questions and answers, and folders of images with captions beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_internvlx.data.sources.record import (
    MAX_TEXT_BYTES,
    LeftOut,
    ReadSettings,
    Records,
    SourceImage,
    SourceRecord,
)
from megatron_internvlx.data.sources.rows import DESCRIBE, Columns, RowReader, column_notes, one_round
from megatron_internvlx.data.sources.text_files import encoding_of, not_text, table_rows


def read_table(path: Path, settings: ReadSettings) -> tuple[str, Records, list[str]]:
    """Description of a CSV or TSV file ("table (comma; image, question, answer)"), its records, and notes.

    Raises ValueError if its columns have no usual names and are not named by the user.
    """
    header, separator, pieces = table_rows(path, path.name, settings.encoding)
    reader = RowReader(settings, str(path))
    columns = reader.columns(header)
    names = ", ".join(filter(None, (columns.image, columns.question, columns.answer)))
    word = {",": "comma", ";": "semicolon", "\t": "tab"}.get(separator, separator)

    def records() -> Records:
        for piece in pieces:
            if isinstance(piece, LeftOut):
                yield piece
                continue
            key, row = piece
            try:
                yield reader.read({name: row[name] for name in _used(columns)}, key)
            except LeftOut as left_out:
                yield left_out

    return f"table (separated by {word}; {names})", records(), column_notes(columns, header, settings)


def _used(columns: Columns) -> list[str]:
    return [name for name in (columns.image, columns.question, columns.answer) if name is not None]


def caption_of(image: Path) -> Path | None:
    """Text file of the same name beside an image, also with its suffix in capitals; None if there is none."""
    names = (image.with_suffix(suffix) for suffix in (".txt", ".TXT", ".Txt"))
    return next((path for path in names if path.is_file()), None)


def read_captions(
    folder: Path, images: Sequence[Path], settings: ReadSettings
) -> Iterator[SourceRecord | LeftOut]:
    """Records of images with a text file of the same name beside them: the text is the answer."""
    question = DESCRIBE if settings.question is None else settings.question
    for path in images:
        key = path.relative_to(folder).as_posix()
        caption = caption_of(path)
        if caption is None:
            name = path.with_suffix(".txt").name
            yield LeftOut(key, "empty_answer", f"there is no {name} beside it: write its caption there")
            continue
        if caption.stat().st_size > MAX_TEXT_BYTES:
            yield LeftOut(key, "too_long", f"{caption.name} has over {MAX_TEXT_BYTES:,} bytes: shorten it")
            continue
        encoding = encoding_of(caption, settings.encoding)
        try:
            text = caption.read_bytes().decode(encoding).strip()
        except UnicodeDecodeError:
            yield not_text(f"{key[: -len(path.suffix)]}.txt", encoding)
            continue
        yield SourceRecord(key, one_round(question, text, 1), [SourceImage(key)])
