"""What commands print: names as they are, control characters as codes, and a message where nothing can be written."""

import errno
import json
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.table import Table

from tests.support.models import write_byte_tokenizer, write_documents
from train.checkpoints.writer import SafetensorsWriter
from train.comparison.forest_plot import plain, wrapped
from train.runtime.command import command
from train.runtime.errors import UserError, refused
from train.runtime.outputs import write_whole
from train.runtime.shown import shown, size_shown
from train.runtime.terminal import Terminal

SHOW = Path(__file__).resolve().parents[2] / "train" / "show.py"


def test_sizes_have_three_digits_in_the_largest_unit_in_which_they_are_not_nearly_nothing():
    sizes = (0, 12, 99, 100, 5_324, 99_999, 100_000, 8_400_000, 99_949_999, 100_000_000, 742_000_000, 9.99e9, 9.996e9)
    assert [size_shown(size) for size in sizes] == [
        "0 bytes", "12 bytes", "99 bytes", "0.10 KB", "5.32 KB", "100 KB", "0.10 MB", "8.40 MB", "99.9 MB", "0.10 GB",
        "0.74 GB", "9.99 GB", "10.0 GB",
    ]  # fmt: skip
    assert size_shown(80e9) == "80.0 GB" and size_shown(1.2346e12) == "1,235 GB"


def test_control_characters_and_halves_of_surrogates_are_shown_as_codes():
    assert shown("a\x1b]52;c;aGk=\x07b\x1b[2J\r\x9b\x7f") == r"a\x1b]52;c;aGk=\x07b\x1b[2J\r\x9b\x7f"
    assert shown("\u202eabc\ud800") == r"\u202eabc\ud800"
    assert shown("é\t漢\n👩‍👩‍👧") == "é\t漢\n👩‍👩‍👧"


def test_a_progress_bar_moves_the_cursor_and_a_name_that_ends_like_it_does_not(capsys):
    @command
    def main() -> int:
        print("a name\x1b[A\x1b[A")
        for written in ("\rsteps\r", "\x1b[A\x1b[A"):  # as tqdm does
            sys.stdout.write(written)
        return 0

    assert main() == 0
    assert capsys.readouterr().out == "a name\\x1b[A\\x1b[A\n\rsteps\\r\x1b[A\x1b[A"


def test_markup_in_names_is_text_in_tables_titles_and_lines(capsys):
    @command
    def main() -> int:
        table = Table("role", title="--mask role:[/x]")
        table.add_row("[red]a[/red]")
        table.add_row("\x1b[2Jb :smile:")
        Terminal().print(table, "[/x]", r"\[bold]")
        print("a note on [/x]\x1b[2J")
        return 0

    assert main() == 0
    out = capsys.readouterr().out
    for text in (
        "--mask role:[/x]",
        "[red]a[/red]",
        r"\x1b[2Jb :smile:",
        "\n[/x]",
        r"\[bold]",
        r"a note on [/x]\x1b[2J",
    ):
        assert text in out
    assert "\x1b" not in out


def test_an_error_is_one_message_with_its_code(capsys):
    @command
    def main() -> int:
        raise UserError("--data a\x1b[2Jb\ud800: no such file")

    assert main() == 2
    assert capsys.readouterr().err == "error: --data a\\x1b[2Jb\\ud800: no such file\n"


def test_a_file_that_the_system_refuses_is_a_message(tmp_path, capsys):
    @command
    def main() -> int:
        (tmp_path / ("x" * 300)).exists()
        return 0

    assert main() == 2
    assert capsys.readouterr().err.endswith(": File name too long.\n")


def test_a_full_disk_is_a_message_with_the_file_where_it_is_known(tmp_path, capsys):
    @command
    def main(write) -> int:
        write()
        return 0

    def without_a_name():
        with open("/dev/full", "w") as file:
            file.write("x")

    again = "Free disk space, and start the same command again.\n"
    assert main(without_a_name) == 2
    assert capsys.readouterr().err == f"error: No space left on device. {again}"
    (tmp_path / "summary.json.partial").symlink_to("/dev/full")
    assert main(partial(write_whole, tmp_path / "summary.json", "x")) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/summary.json: No space left on device. {again}"
    (tmp_path / "w.partial").symlink_to("/dev/full")
    assert main(partial(SafetensorsWriter, tmp_path / "w", {"w": (torch.float32, (2,))})) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/w: No space left on device. {again}"
    copied = OSError(errno.ENOSPC, "No space left on device", "from", None, "to")
    assert str(refused(copied)) == f"to: No space left on device. {again.strip()}"
    assert (refused(copied).code, refused(OSError(errno.EIO, "Input/output error")).code) == (2, 1)


@pytest.mark.parametrize("name", ["$x$", r"\frac{", "$", "_hidden", "[/x]", "\x1b[2J", "a" * 100, " "])
def test_pictures_show_names_as_they_are(name):
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure()
    axes = figure.subplots()
    axes.set_title(plain(name))
    axes.set_yticks([0], [wrapped(name)])
    legend = axes.legend(handles=[Line2D([], [], label=plain(name))])
    figure.canvas.draw()
    assert len(legend.get_texts()) == 1


def show_command(tmp_path: Path) -> list[str]:
    write_byte_tokenizer(tmp_path)
    text = "Mars\x1b[2J is green\u202e today é"
    spans = [{"start": 0, "end": 4, "role": "[/x]"}, {"start": 12, "end": 17, "role": "\x1b[31m"}]
    data = write_documents(tmp_path / "d[b].jsonl", [{"text": text, "spans": spans}])
    return [sys.executable, str(SHOW), "--data", str(data), "--model", str(tmp_path), "--mask", "role:[/x]"]


def test_show_sends_nothing_of_a_document_to_the_terminal_that_it_would_obey(tmp_path):
    for environment in ({}, {"PYTHONIOENCODING": "ascii"}, {"FORCE_COLOR": "1"}):
        done = subprocess.run(show_command(tmp_path), capture_output=True, env=os.environ | environment)
        assert done.returncode == 0, done.stderr
        assert b"\x1b[2J" not in done.stdout and b"\x1b[31m" not in done.stdout.replace(b"\\x1b[31m", b"")
        assert b"\\x1b[2J" in done.stdout and b"\\u202e" in done.stdout and b"[/x]" in done.stdout


def test_an_output_that_cannot_be_written_is_a_message(tmp_path):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(show_command(tmp_path), stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        2, "error: the output cannot be written (No space left on device). Free disk space, or redirect the output.\n",
    )  # fmt: skip
    page = tmp_path / "page.html"
    page.write_text("the page before")
    small = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1000, 1000))  # bytes
    for target, why in ((page, "File too large"), ("/dev/full", "No space left on device")):
        given = [*show_command(tmp_path), "--html", str(target)]
        done = subprocess.run(given, capture_output=True, text=True, preexec_fn=small)
        assert done.returncode == 2 and f"--html {target}: cannot be written ({why})" in done.stderr
    assert page.read_text() == "the page before" and [*tmp_path.glob("page*")] == [page]
    done = subprocess.run([*show_command(tmp_path), "--html", "/dev/stdout"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("</html>\n\n") and Path("/dev/stdout").is_symlink()


def unread(*arguments: str) -> tuple[int, bytes]:
    """Exit code and stderr of Python with a stdout that nobody reads."""
    buffered, pipe = os.environ | {"PYTHONUNBUFFERED": ""}, subprocess.PIPE
    with subprocess.Popen([sys.executable, *arguments], stdout=pipe, stderr=pipe, env=buffered) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        said = process.stderr.read()
        return process.wait(), said


def test_a_closed_pipe_is_an_error_of_a_command_that_had_more_to_do_and_none_of_one_that_shows(tmp_path):
    script = "import sys\nfrom train.runtime.command import command\nsys.exit(command(lambda: {} or 0)())"
    message = b"error: the reader of the output is gone; the remaining work was not done.\n"
    assert unread("-c", script.format("print('x' * 10**6)")) == (1, message)
    assert unread("-c", script.format("print('x')")) == (0, b"")  # all was done
    assert unread(str(SHOW), "--help") == unread(*show_command(tmp_path)[1:]) == (0, b"")


def test_metadata_with_half_a_surrogate_is_read_and_shown(tmp_path, capsys):
    from train.show import main

    write_byte_tokenizer(tmp_path)
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "Mars", "note": "\ud800", "spans": []}) + "\n")
    assert main(["--data", str(tmp_path / "d.jsonl"), "--model", str(tmp_path), "--mask", "none"]) == 0
    assert "Mars" in capsys.readouterr().out
