"""JSON objects out of files, streamed: one a line, or the items of one array.

Every fault names its line. Knows nothing of what the objects mean.
"""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dear_batch.errors import InputError

_READ_CHARACTERS = 1 << 20
_ITEM_CHARACTERS = 256 << 20

Record = dict[str, Any]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file to read from, decompressed if its name ends in `.gz`.

    Raises:
        InputError: the file is missing, empty, cut, or cannot be read.
    """
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path.name} is empty (0 bytes).", where=str(path))
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"Cannot read {path.name}: {error}.",
            where=str(path),
            next_step="correct the path, or copy the file again",
        ) from error


def json_lines(path: Path) -> Iterator[tuple[int, Record]]:
    """(line number from 1, object) of each line that is not blank; `.gz` is decompressed.

    Raises:
        InputError: the file cannot be read, or a line is not a JSON object.
    """
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _record(line, f"{path}, line {number}")


def _record(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"Malformed JSON: {error}.", where=where) from error
    if not isinstance(record, dict):
        raise InputError(
            "Not a JSON object.",
            where=where,
            valid="one JSON object a line",
            next_step="for one JSON array of queries: dear-batch convert rankgpt",
        )
    return record


def json_items(path: Path) -> Iterator[tuple[int, Record]]:
    """(line number, object) of each item of a file that is one JSON array.

    Raises:
        InputError: the file cannot be read, is not an array of objects, or is malformed.
    """
    # A byte order mark is what some editors on Windows begin a file with.
    with opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
        yield from _ArrayReader(text, path).items()


class _ArrayReader:
    """Decodes the items of an array one by one; `json.load` would hold all of them."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._line = "", 1

    def items(self) -> Iterator[tuple[int, Record]]:
        self._expect("[", "the start of an array")
        while self._next_character() != "]":
            line = self._line
            yield line, self._item()
            if self._next_character() != "]":
                self._expect(",", "a comma or the end of the array")
        self._advance(1)
        if self._next_character():
            raise self._error("Text after the end of the array")

    def _item(self) -> Record:
        while True:
            try:
                item, end = json.JSONDecoder().raw_decode(self._text)
            except json.JSONDecodeError as error:
                if len(self._text) < _ITEM_CHARACTERS and self._more():
                    continue
                self._line += error.lineno - 1
                raise self._error(f"Malformed or cut JSON: {error.msg}") from error
            except RecursionError as error:
                raise self._error("JSON nested too deeply") from error
            if not isinstance(item, dict):
                raise self._error("Not a JSON object")
            self._advance(end)
            return item

    def _next_character(self) -> str:
        """The next one that is not white space; none at the end of the file."""
        while True:
            self._advance(len(self._text) - len(self._text.lstrip()))
            if self._text or not self._more():
                return self._text[:1]

    def _expect(self, character: str, what: str) -> None:
        if self._next_character() != character:
            raise self._error(f"Malformed or cut JSON: {what} expected")
        self._advance(1)

    def _advance(self, count: int) -> None:
        self._line += self._text.count("\n", 0, count)
        self._text = self._text[count:]

    def _more(self) -> bool:
        """Read as much again as is held, so that a long item is not decoded too often."""
        try:
            read = self._file.read(max(_READ_CHARACTERS, len(self._text)))
        except UnicodeDecodeError as error:
            raise self._error(f"Not UTF-8: {error}") from error
        self._text += read
        return bool(read)

    def _error(self, what: str) -> InputError:
        return InputError(
            f"{what}.",
            where=f"{self._path}, line {self._line}",
            valid="one JSON array of objects",
            next_step="for one JSON object a line: dear-batch convert tevatron",
        )
