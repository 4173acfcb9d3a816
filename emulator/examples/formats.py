"""From a file to its rows: JSON Lines, JSON, CSV, Parquet and text, all but Parquet also compressed by gzip."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from offsite.emulator.examples.base import Reader
from offsite.emulator.examples.fault import QUOTED, Fault, strange_columns
from offsite.emulator.examples.files import ending

PIECE = 1 << 27  # characters of a line, of a field of CSV, of a JSON document that is not in lines
RATIO = 200  # of a compressed file's characters to its bytes, above which it is none of text; that has up to 30
BATCH = 256  # rows of Parquet in memory

NOT_JSON = "rows that are not JSON"
DEEP = "rows nested too deeply"
TWICE = "rows that name a column twice"
NOT_CSV = "rows that are not CSV"
DAMAGED = "damaged files or parts of files"
UNREADABLE = "rows that Parquet holds in damaged or strange values"
TOO_LARGE = "files with too much in one piece"

Row = tuple[str, Any]  # its place in the file, and the row or the Fault that it is


def rows(path: Path, reader: Reader) -> Iterator[Row]:
    """Yield the rows of a file; raises Fault where the rest cannot be read, OSError as the system does."""
    kind = ending(path)
    if kind == ".parquet":
        yield from _parquet(path, reader)
        return
    lines = _lines(path)
    if kind in (".csv", ".tsv"):
        yield from _csv(lines)
    elif kind == ".txt":
        yield from _paragraphs(lines)
    else:
        yield from _json(lines, path)


def _lines(path: Path) -> Iterator[str]:
    """Yield lines. A byte that is not UTF-8 becomes half a character, which whoever reads a text refuses."""
    packed = path.suffix.lower() == ".gz"
    with path.open("rb") as file, gzip.open(file) if packed else file as binary:
        size, bound = 0, max(PIECE, RATIO * path.stat().st_size)
        try:
            marked = binary.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff")  # as Windows writes
            encoding = "utf-16" if marked else "utf-8-sig"
            text = io.TextIOWrapper(binary, encoding, errors="surrogateescape")
            while line := text.readline(PIECE):
                size += len(line)
                if len(line) == PIECE:
                    raise Fault(TOO_LARGE, f"a line has more than {PIECE:,} characters")
                if packed and size > bound:
                    raise Fault(TOO_LARGE, f"unpacks to more than {bound:,} characters; unpack it yourself")
                yield line.strip("\ufeff")  # of a file that was made of several
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Fault(DAMAGED, f"not gzip, or damaged, or cut off: {error}") from None
        except UnicodeDecodeError as error:
            raise Fault(DAMAGED, f"not UTF-16, though it begins like that: {error.reason}") from None


def _json(lines: Iterator[str], path: Path) -> Iterator[Row]:
    """Yield a row of each line, or the elements of one document of which the first line is only the beginning."""
    begun = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parsed(line)
        cut = isinstance(row, Fault) and (line.lstrip().startswith("[") or ending(path) == ".json")
        if not begun and (cut or isinstance(row, list)):
            yield from _elements("".join(_bounded(chain([line], lines))))
            return
        begun = True
        yield f"line {number}", row


def _elements(text: str) -> Iterator[Row]:
    document = _parsed(text)
    if isinstance(document, Fault):
        raise document
    for number, row in enumerate(document if isinstance(document, list) else [document], start=1):
        yield f"element {number}", row


def _bounded(lines: Iterator[str]) -> Iterator[str]:
    size = 0
    for line in lines:
        size += len(line)
        if size > PIECE:
            raise Fault(TOO_LARGE, f"a JSON document of more than {PIECE:,} characters; write JSON Lines")
        yield line


def _parsed(text: str) -> Any:
    """Parse JSON; return a Fault if it is none. In what nobody reads, NaN and infinity are harmless."""
    try:
        return _DECODER.decode(text.strip())
    except Fault as fault:
        return fault
    except RecursionError:
        return Fault(DEEP, "its lists or objects are nested too deeply")
    except json.JSONDecodeError as error:
        return Fault(NOT_JSON, f"not JSON: {error.msg} at character {error.pos + 1}")
    except ValueError as error:  # a number of more than 4,300 digits
        return Fault(NOT_JSON, f"not JSON that can be read: {error}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise Fault(TWICE, "an object names a column twice, so that either may be meant")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # one, because making it takes as long as a row


def _csv(lines: Iterator[str]) -> Iterator[Row]:
    """Yield the rows below a header, told apart by what separates most of it: comma, semicolon or tabulator."""
    head = next((line for line in lines if line.strip()), "")
    csv.field_size_limit(PIECE)
    reader = csv.reader(chain([head], lines), delimiter=max(",;\t", key=head.count), strict=True)
    names: list[str] = []
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"line {reader.line_num}", Fault(NOT_CSV, f"not CSV: {error}")
            continue
        if not names:
            names = [name.strip() for name in fields]
        elif len(fields) > len(names):
            yield (
                f"line {reader.line_num}",
                Fault(NOT_CSV, f"{len(fields)} fields under a header of {len(names)}; put quotes around a text"),
            )
        elif fields:
            yield f"line {reader.line_num}", dict(zip(names, fields, strict=False))


def _paragraphs(lines: Iterator[str]) -> Iterator[Row]:
    """Yield what blank lines separate; encoding cuts a long one into sequences."""
    paragraph: list[str] = []
    start = 0
    for number, line in enumerate(chain(lines, [""]), start=1):
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line.rstrip("\n"))
        elif paragraph:
            yield f"line {start}", {"text": "\n".join(paragraph)}
            paragraph = []


def _parquet(path: Path, reader: Reader) -> Iterator[Row]:
    """Yield rows of the columns that are read, a batch in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    broken = (pyarrow.ArrowException, OSError)  # pyarrow raises OSError for pages that it cannot make sense of
    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except broken as error:
        raise Fault(DAMAGED, f"not a Parquet file, or damaged: {_said(error)}") from None
    with file:
        number = 0
        columns = [name for name in file.schema_arrow.names if name in reader.columns]
        if not columns:
            raise strange_columns(file.schema_arrow.names, reader.shapes, count=file.metadata.num_rows)
        for group in range(file.num_row_groups):
            end = number + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns):
                    for row in _plain(batch):
                        number += 1
                        yield f"row {number}", row
            except broken as error:
                sentence = f"the rest of row group {group + 1} is damaged: {_said(error)}"
                yield f"row {number + 1}", Fault(UNREADABLE, sentence, count=end - number)
                number = end


def _plain(batch: Any) -> Iterator[Any]:
    """Turn a batch into dicts, and each row by itself where one of them cannot be."""
    strange = (ValueError, ArithmeticError, OSError)
    try:
        yield from batch.to_pylist()
    except strange:
        for at in range(batch.num_rows):
            try:
                yield batch.slice(at, 1).to_pylist()[0]
            except strange as error:
                yield Fault(UNREADABLE, f"its values cannot be read: {_said(error)}")


def _said(error: BaseException) -> str:
    """A library's message, on one line."""
    return " ".join(str(error).split())[:QUOTED]
