"""Text files read as streams: lines, elements of a JSON array, rows of a table; bad pieces come as `LeftOut`."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from megatron_internvlx.data.manifest import read_json
from megatron_internvlx.data.sources.record import MAX_TEXT_BYTES, LeftOut

_CHUNK = 1 << 20
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_WITH_MARK = {"utf-8": "utf-8-sig"}
"""Encoding -> the same, which skips a byte order mark if there is one."""
_QUOTES = 'close the quotes, and write a quote in a text as two ("")'
_EXCEL = re.compile("sep=(.)\\r?\\n?", re.IGNORECASE)
_SEPARATORS = ",;\t|"
Piece = tuple[str, Any] | LeftOut
"""Key and value of a piece of a file, or why it cannot be read."""


def encoding_of(path: Path, given: str | None) -> str:
    """Encoding of a text file: the given one, that of its byte order mark, or UTF-8. Raises ValueError if unknown."""
    if given is not None:
        try:
            " ".encode(given)  # fails for codecs that are no encoding of text, too
        except LookupError:
            raise ValueError(
                f"--encoding {given}: unknown; usual ones are utf-8, utf-16, cp1252, gb18030"
            ) from None
        return _WITH_MARK.get(codecs.lookup(given).name, given)
    with path.open("rb") as file:
        head = file.read(4)
    return next((name for mark, name in _BOMS if head.startswith(mark)), "utf-8")


def open_text(path: Path, encoding: str) -> IO[str]:
    """Open a text file with line ends as they are; undecodable bytes become escapes that `undecodable` finds."""
    return path.open(encoding=encoding, errors="surrogateescape", newline="")


def undecodable(text: str) -> bool:
    """Whether a text from `open_text` had bytes that are not in its encoding."""
    return any("\udc80" <= character <= "\udcff" for character in text) if not text.isascii() else False


def not_text(key: str, encoding: str) -> LeftOut:
    """Error of a piece with bytes that are not in the encoding."""
    name = encoding.removesuffix("-sig").upper()
    return LeftOut(key, "bad_encoding", f"it is not {name}: save the file as UTF-8, or name its --encoding")


def json_lines(path: Path, label: str, given: str | None) -> Iterator[Piece]:
    """Objects of a JSONL file, keys `label:line`; blank lines are skipped, and nothing longer than 64 MB is read."""
    encoding = encoding_of(path, given)
    with open_text(path, encoding) as file:
        number = 0
        while line := file.readline(MAX_TEXT_BYTES):
            number += 1
            key = f"{label}:{number}"
            if len(line) == MAX_TEXT_BYTES and not line.endswith("\n"):
                while (rest := file.readline(MAX_TEXT_BYTES)) and not rest.endswith("\n"):
                    pass
                yield LeftOut(key, "too_long", "the line has over 64 million characters")
                continue
            if not line.strip():
                continue
            if undecodable(line):
                yield not_text(key, encoding)
                continue
            try:
                yield key, read_json(line)
            except (ValueError, RecursionError) as error:
                yield LeftOut(key, "malformed_json", f"not valid JSON: {error}{_json_hint(line)}")


def _json_hint(line: str) -> str:
    text = line.strip()
    if text.startswith("{'"):
        return ": it is a Python dictionary; write it with json.dumps"
    if text.endswith(","):
        return ": lines of JSONL end without a comma"
    if "NaN" in text:
        return ": NaN is not JSON"
    return ": repair or remove the line"


class _ArrayReader:
    """Elements of a JSON array, read in pieces; only one element is in memory at a time."""

    def __init__(self, file: IO[str], path: Path):
        self.file, self.path = file, path
        self.buffer, self.place, self.passed = "", 0, 0
        self.ended = False
        self.twice: list[str] = []
        self.decoder = json.JSONDecoder(object_pairs_hook=self._note_twice)

    def _note_twice(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            self.twice.append(next(name for name in names if names.count(name) > 1))
        return found

    def _fill(self) -> bool:
        """Read more; returns whether there was more. Each read doubles the buffer, so long elements cost little."""
        self.passed += self.place
        self.buffer, self.place = self.buffer[self.place :], 0
        more = self.file.read(max(_CHUNK, len(self.buffer)))
        self.buffer += more
        if len(self.buffer) > 4 * MAX_TEXT_BYTES:
            raise ValueError(f"{self.path}: an element of the array has over 256 million characters")
        return bool(more)

    def next_character(self) -> str:
        """Next character that is not white space, without taking it; "" at the end of the file."""
        while True:
            while self.place < len(self.buffer) and self.buffer[self.place].isspace():
                self.place += 1
            if self.place < len(self.buffer):
                return self.buffer[self.place]
            if not self._fill():
                return ""

    def element(self) -> Any:
        """Decode the element at the place. Raises ValueError with what is wrong and where."""
        while True:
            self.twice.clear()
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.place)
            except json.JSONDecodeError as error:
                # Away from the end of what was read, more text would not mend it. Only strings may be long.
                final = not error.msg.startswith("Unterminated") and error.pos < len(self.buffer) - 32
                if final or not self._fill():
                    raise ValueError(error.msg) from error
                continue
            except RecursionError as error:
                raise ValueError("brackets are nested too deeply") from error
            length = end - self.place
            # A number at the end of the buffer may continue beyond it.
            if end < len(self.buffer) or not self._fill():
                self.place += length
                return value


def json_array(path: Path, label: str, given: str | None) -> Iterator[Piece]:
    """Elements of a JSON array, keys `label[index]` counted from 0, read in pieces of a megabyte.

    Raises ValueError where the array is broken: nothing after that place can be read.
    """
    encoding = encoding_of(path, given)
    with open_text(path, encoding) as file:
        reader = _ArrayReader(file, path)
        if reader.next_character() != "[":
            raise ValueError(f"{path}: it does not start with '[': it is not a JSON array")
        reader.place += 1
        index = 0
        while (sign := reader.next_character()) != "]":
            if index:
                if sign != ",":
                    raise ValueError(
                        _broken(path, index, f"expected ',' or ']', found {sign or 'the end'!r}")
                    )
                reader.place += 1
                reader.next_character()
            try:
                value = reader.element()
            except ValueError as error:
                raise ValueError(_broken(path, index, str(error))) from error
            key = f"{label}[{index}]"
            index += 1
            if reader.twice:
                yield LeftOut(key, "malformed_json", f"the key {reader.twice[0]!r} is given twice: keep one")
            elif undecodable(json.dumps(value, ensure_ascii=False)):
                yield not_text(key, encoding)
            else:
                yield key, value


def _broken(path: Path, index: int, why: str) -> str:
    return (
        f"{path}: the JSON array is broken after {index:,} whole elements: {why}. What follows cannot be read: repair "
        "it (is the file complete?), or write one record per line (JSONL), where a bad one costs only itself"
    )


def separator_of(header: str) -> str:
    """Separator of a table by its header line: comma, semicolon, tab or bar, whichever is in it most often."""
    return max(_SEPARATORS, key=header.count)


def table_rows(path: Path, label: str, given: str | None) -> tuple[list[str], str, Iterator[Piece]]:
    """Header, separator, and rows of a CSV or TSV file as {column: text}, keys `label:line` of the row's first line.

    Raises ValueError for a file without a header.
    """
    encoding = encoding_of(path, given)
    with open_text(path, encoding) as file:
        separator = _named_separator(file)
        header_line = file.readline(MAX_TEXT_BYTES)
        if "\0" in header_line:
            raise ValueError(f"{path}: it is not a text table: save it as CSV in UTF-8")
        if undecodable(header_line):
            raise ValueError(str(not_text(f"{label}:1", encoding)))
        separator = separator or separator_of(header_line)
        try:
            names = next(csv.reader(chain([header_line], file), delimiter=separator, strict=True), [])
        except csv.Error as error:
            raise ValueError(
                f"{path}: the first line does not name the columns: {error}: {_QUOTES}"
            ) from error
    header = [name.strip() for name in names]
    if not any(header):
        raise ValueError(f"{path}: the first line must name the columns, such as image,question,answer")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise ValueError(f"{path}: two columns are named {twice!r}: rename one")
    return header, separator, _rows(path, label, encoding, separator, header)


def _named_separator(file: IO[str]) -> str | None:
    """Separator of a first line `sep=;`, as Excel writes it, which is taken; None if there is none."""
    start = file.tell()
    found = _EXCEL.fullmatch(file.readline(MAX_TEXT_BYTES))
    if found is None:
        file.seek(start)
    return found and found[1]


def _rows(path: Path, label: str, encoding: str, separator: str, header: list[str]) -> Iterator[Piece]:
    csv.field_size_limit(MAX_TEXT_BYTES)
    with open_text(path, encoding) as file:
        before = int(_named_separator(file) is not None)
        reader = csv.reader(file, delimiter=separator, strict=True)
        next(reader)
        while True:
            first = before + reader.line_num + 1
            key = f"{label}:{first}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                last = before + reader.line_num
                lines = f"lines {first}-{last} are lost: " if last > first else ""
                yield LeftOut(key, "bad_row", f"{lines}{error}: {_QUOTES}")
                for line in range(first + 1, last + 1):
                    what = f"lost with line {first}, whose quote is not closed before"
                    yield LeftOut(f"{label}:{line}", "bad_row", what)
                continue
            if not any(cell.strip() for cell in cells):
                continue
            if any(undecodable(cell) for cell in cells):
                yield not_text(key, encoding)
            elif len(cells) != len(header):
                last = before + reader.line_num
                lines = f" in lines {first}-{last} (is a quote not closed?)" if last > first else ""
                yield LeftOut(
                    key,
                    "bad_row",
                    f"{len(cells)} cells{lines}, the header has {len(header)}: put texts that contain "
                    f"{separator!r} in quotes",
                )
            else:
                yield key, dict(zip(header, cells, strict=True))
