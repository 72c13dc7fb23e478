"""Reads files of documents as rows: JSONL, plain or compressed with gzip or Zstandard, and Parquet.

The kind of a file is recognized by its first bytes, not by its name.
"""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from train.runtime.errors import UserError
from train.runtime.outside import opened
from train.runtime.text_formats import Unreadable, parse_json

FIX = "give a JSONL file of documents"
LONGEST_LINE = 2**26  # bytes of a document, about 15 million tokens; a small file can unpack to far more
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
ZSTANDARD = b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"  # a frame, or the skippable frame that pzstd writes before each

# First bytes of files that are not read, what such a file is, and how to convert it.
UTF_16, UTF_32 = (f"write it as UTF-8: iconv -f UTF-{bits} -t UTF-8 FILE > NEW" for bits in (16, 32))
PICKLE = "a pickle runs code when it is read; write its documents as JSONL"
REFUSED = (
    (b"BZh", "compressed by bzip2", "unpack it: bunzip2 FILE"),
    (b"\xfd7zXZ", "compressed by xz", "unpack it: unxz FILE"),
    (b"\x04\x22\x4d\x18", "compressed by LZ4", "unpack it: unlz4 FILE"),
    (b"PK\x03\x04", "a ZIP archive", "unpack it: unzip FILE"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it: 7z x FILE"),
    (b"ARROW1", "an Arrow file", "write it as Parquet or JSONL, e.g. by to_json of datasets"),
    (b"SQLite format 3", "an SQLite database", "write its documents as JSONL"),
    (b"\x80\x04", "a pickle", PICKLE),
    (b"\x80\x05", "a pickle", PICKLE),
    (b"\xff\xfe\x00\x00", "text in UTF-32", UTF_32),
    (b"\x00\x00\xfe\xff", "text in UTF-32", UTF_32),
    (b"\xff\xfe", "text in UTF-16", UTF_16),
    (b"\xfe\xff", "text in UTF-16", UTF_16),
    (b"{\x00", "text in UTF-16", UTF_16.replace("16", "16LE", 1)),
    (b"\x00{", "text in UTF-16", UTF_16.replace("16", "16BE", 1)),
)


def opened_documents(path: str | Path) -> BufferedReader:
    """Opens a file of documents for reading bytes. Raises UserError if there is none."""
    return opened(path, fix=FIX)


def file_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number from 1, row) for each line that is not blank, or (row number from 1, row) for Parquet.

    A line that is not valid JSON has an `Unreadable` as its row. Raises UserError, beginning with the path, if the file
    as a whole cannot be read.
    """
    try:
        with opened_documents(path) as file:
            start = file.read(16)
            file.seek(0)
            for first_bytes, what, fix in REFUSED:
                if start.startswith(first_bytes):
                    raise UserError(f"{path}: is {what}, which is not supported; {fix}")
            if start.startswith(PARQUET):
                yield from _parquet_rows(path)
            elif start.startswith(GZIP):
                with gzip.open(file) as unpacked:
                    yield from _json_rows(path, _lines(path, unpacked))
            else:
                zstd = start.startswith(ZSTANDARD)
                yield from _json_rows(path, _zstandard_lines(path, file) if zstd else _lines(path, file))
    except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
        raise UserError(f"{path}: cannot be decompressed ({error}); copy the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {FIX}") from None


def _lines(path: str | Path, file: Any) -> Iterator[bytes]:
    while line := file.readline(LONGEST_LINE + 1):
        _check_length(path, len(line))
        yield line


def _check_length(path: str | Path, length: int) -> None:
    if length > LONGEST_LINE:
        raise UserError(f"{path}: has a line of more than {LONGEST_LINE:,} bytes; write one document per line")


def _zstandard_lines(path: str | Path, file: BinaryIO) -> Iterator[bytes]:
    """Yields the lines of a file of one or more frames. Raises EOFError if the last frame is cut off; zstandard's own
    reader would silently stop there."""
    frame, line = zstandard.ZstdDecompressor().decompressobj(), bytearray()
    while packed := file.read(2**10):  # unpacks to at most 32 MiB: 128 KiB per 4 bytes
        while packed:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            first, *others = frame.decompress(packed).split(b"\n")
            line += first
            for other in others:
                _check_length(path, len(line))
                yield bytes(line)
                line = bytearray(other)
            _check_length(path, len(line))
            packed = frame.unused_data
    if not frame.eof:
        raise EOFError("it is cut off")
    yield bytes(line)


def _json_rows(path: str | Path, lines: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    # Lines end at \n alone: str.splitlines would also split at U+2028 inside a JSON string.
    for number, raw in enumerate(lines, start=1):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark belongs to the file, not to the document
            _refuse_many_lines(path, raw.strip())
        if raw.strip():
            yield number, _parsed(raw)


def _refuse_many_lines(path: str | Path, first: bytes) -> None:
    """Raises UserError if the first line only begins an array or an object."""
    array = first == b"[" or (first.startswith(b"[") and first.endswith(b","))
    if array or first == b"{":
        what, query = ("array", ".[]") if array else ("object", ".")
        raise UserError(
            f"{path}: is a JSON {what} on several lines; write one document per line: jq -c '{query}' FILE > NEW.jsonl"
        )


def _parsed(raw: bytes) -> Any:
    try:
        return parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unreadable(f"not valid UTF-8 (byte {error.start} of the line); save the file as UTF-8")
    except Unreadable as error:
        return error


def _parquet_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=256)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield number, without_nulls(row)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: is a Parquet file that cannot be read ({error}); copy it again") from None


def without_nulls(value: Any) -> Any:
    """Returns the value without keys whose value is null, at every depth.

    In a table, every row has all keys of a column, so a null there means that the key is absent.
    """
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value
