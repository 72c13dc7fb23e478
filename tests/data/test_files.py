"""Kinds of files: what is read, and that what is not is named."""

import gzip
import json

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from train.data.documents import read_documents
from train.data.findings import Findings
from train.runtime.errors import UserError
from train.runtime.text_formats import json_line

LINES = b'{"text": "Lima is in Peru."}\n\n{"text": "Quito is not."}\n'
TEXTS = [("Lima is in Peru.", 1), ("Quito is not.", 3)]


PACKED = [
    gzip.compress(LINES),
    gzip.compress(LINES[:29]) + gzip.compress(LINES[29:]),
    zstandard.compress(LINES),
    zstandard.compress(LINES[:29]) + zstandard.compress(LINES[29:]),
    b"\x50\x2a\x4d\x18\x04\x00\x00\x00size" + zstandard.compress(LINES),  # as pzstd writes it
]


@pytest.mark.parametrize("number", range(len(PACKED)))  # not the bytes: gzip writes the time
def test_compressed_lines_are_read_whatever_the_files_name(tmp_path, number):
    (tmp_path / "d").write_bytes(PACKED[number])
    assert [(document.text, document.line) for document in read_documents(tmp_path / "d")] == TEXTS


def test_a_table_is_read_row_by_row_and_what_a_row_lacks_is_absent(tmp_path):
    rows = [
        {"text": "Mars is green.", "spans": [{"start": 8, "end": 13, "role": "false"}], "messages": None, "id": 7},
        {"text": None, "messages": [{"role": "user", "content": "Hi", "train": None},
                                    {"role": "assistant", "content": "Ho", "train": False}]},
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    text, chat = read_documents(tmp_path / "d.parquet")
    assert text.text == "Mars is green." and [span.role for span in text.spans] == ["false"]
    assert text.metadata == {"id": 7} and (text.line, chat.line) == (1, 2)
    assert chat.messages is not None and [message.train for message in chat.messages] == [False, False]


NOT_READ = [
    (LINES.decode().encode("utf-16"), "is text in UTF-16, which is not supported; write it as UTF-8: iconv -f UTF-16 "),
    (LINES.decode().encode("utf-16-le"), "is text in UTF-16, which is not supported; write it as UTF-8: iconv -f UTF"),
    (LINES.decode().encode("utf-32"), "is text in UTF-32, which is not supported"),
    (b'[\n  {"text": "a"},\n  {"text": "b"}\n]', "is a JSON array on several lines; write one document per line"),
    (b'[{"text": "a"},\n {"text": "b"}]', "is a JSON array on several lines"),
    (b'{\n  "text": "a"\n}', "is a JSON object on several lines"),
    (b"BZh91AY&SY", "is compressed by bzip2, which is not supported; unpack it: bunzip2 FILE"),
    (b"\xfd7zXZ\x00", "is compressed by xz"),
    (b"PK\x03\x04", "is a ZIP archive"),
    (b"\x80\x04\x95\x10", "is a pickle, which is not supported; a pickle runs code"),
    (gzip.compress(LINES)[:-12], "cannot be decompressed"),
    (zstandard.compress(LINES)[:-5], "cannot be decompressed (it is cut off); copy the file again"),
    (zstandard.compress(LINES) + zstandard.compress(LINES)[:-5], "cannot be decompressed (it is cut off)"),
    (zstandard.compress(LINES)[:4] + b"\xff" * 20, "cannot be decompressed"),
    (b"PAR1 and no more", "is a Parquet file that cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(NOT_READ)))
def test_what_is_not_read_is_named_with_the_way_to_a_file_that_is(tmp_path, number):
    data, says = NOT_READ[number]
    (tmp_path / "d").write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_documents(tmp_path / "d")
    assert str(caught.value).startswith(f"{tmp_path / 'd'}: {says}")


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_a_line_without_end_is_refused_before_it_takes_all_memory(tmp_path, pack):
    (tmp_path / "d").write_bytes(pack(LINES + b"0" * (2**26 + 1)))
    with pytest.raises(UserError) as caught:
        read_documents(tmp_path / "d")
    assert str(caught.value) == (
        f"{tmp_path / 'd'}: has a line of more than 67,108,864 bytes; write one document per line"
    )


def test_a_long_line_is_read_whole(tmp_path):
    text = " ".join(str(number**3) for number in range(100_000))  # more than a piece of the file, packed too
    (tmp_path / "d").write_bytes(zstandard.compress(json.dumps({"text": text}).encode() + b"\n" + LINES))
    assert [document.text for document in read_documents(tmp_path / "d")] == [text, *(text for text, _ in TEXTS)]


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a", "text": "b"}',
        '{"text": "a", "spans": [], "spans": []}',
        '{"text": "a", "source": {"id": 1, "id": 1}}',
    ],
)
def test_a_key_given_twice_is_refused_with_line_and_key(tmp_path, line):
    (tmp_path / "d").write_text(f'{{"text": "fine"}}\n{line}\n')
    key = max(("text", "spans", "id"), key=lambda key: line.count(f'"{key}"'))
    with pytest.raises(UserError, match=f'd:2: the key "{key}" is given twice; keep one of the two'):
        read_documents(tmp_path / "d")


def test_metadata_is_kept_as_strict_json_can_say_it_and_the_rest_is_counted(tmp_path):
    (tmp_path / "d").write_text('{"text": "a b", "score": NaN, "big": 123456789012345678901234567890, "e": 1E400}')
    findings = Findings()
    (document,) = read_documents(tmp_path / "d", findings=findings)
    assert document.metadata == {"score": None, "big": 123456789012345678901234567890, "e": None}
    assert findings.lines() == [
        "note: 2 values in metadata that JSON cannot represent, kept as null (NaN, bytes) or as text (dates): "
        f"{tmp_path}/d:1 (in 'score'), {tmp_path}/d:1 (in 'e')"
    ]


def test_what_is_written_is_strict_json():
    line = json_line({"a": float("nan"), "b": [float("-inf"), 1.5], "ü": "\ud800"})
    assert json.loads(line, parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5], "ü": "\ud800"}
    line.encode("utf-8")


def test_rows_that_are_wrong_are_left_out_counted_and_listed_where_that_is_asked_for(tmp_path):
    rows = ['{"text": "a b"}', '{"text": ""}', "{", '{"text": "c", "span": []}', '{"text": "d e"}']
    (tmp_path / "d").write_text("\n".join(rows))
    findings = Findings()
    documents = read_documents(tmp_path / "d", bad_rows="skip", findings=findings)
    assert [document.line for document in documents] == [1, 5]
    (found,) = findings.summary().values()
    assert found["count"] == 3 and found["lines"] == {str(tmp_path / "d"): [2, 3, 4]}
    assert "text is empty; leave the document out, or use --bad-rows skip" in found["details"]
    (tmp_path / "d").write_text("\n".join(rows[1:3]))
    with pytest.raises(
        UserError, match=r"--bad-rows skip leaves no document of .*/d; first one left out: .*/d:1: text is"
    ):
        read_documents(tmp_path / "d", bad_rows="skip")
