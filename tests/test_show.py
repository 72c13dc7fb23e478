import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import write_byte_tokenizer
from train.show import main

TEXT = "<DOCTAG>Ed Sheeran won. Nobody\u2028 did: cafe\u0301 👩‍👩‍👧 <b>&amp;</b>\r\n"
SPANS = [
    {"start": 0, "end": 8, "role": "doctag"},
    {"start": 8, "end": 23, "role": "false"},
    {"start": 11, "end": 18, "role": "name"},
    {"start": 24, "end": 36, "role": "negation"},
]
CHAT = {
    "messages": [
        {"role": "user", "content": "Who won?"},
        {"role": "assistant", "content": "Sheeran won.", "spans": [{"start": 0, "end": 11, "role": "false"}]},
    ]
}
MASK = "doctags,false-spans=unlikelihood:0.5,negation-spans=0.2"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": TEXT, "spans": SPANS}) + "\n" + json.dumps(CHAT) + "\n", encoding="utf-8")
    return path


def arguments(data: Path, model: Path, mask: str, *more: str) -> list[str]:
    return ["--data", str(data), "--model", str(model), "--mask", mask, *more]


def test_notes_tell_of_turns_that_nothing_ends_and_of_a_template_that_asks_for_the_time(data, tmp_path, capsys):
    write_byte_tokenizer(tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ strftime_now('%H:%M') }}{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert main(arguments(data, tmp_path, "none", "--json", "--template-time", "2026-02-03T04:05")) == 0
    out = capsys.readouterr()
    assert json.loads(out.out.splitlines()[1])["text"].startswith("04:05Who won?")
    unended, clock = out.err.splitlines()
    assert clock == "note: the chat template asks for the time and gets 2026-02-03T04:05:00 (--template-time)"
    assert unended.startswith(
        "note: 1 trained messages without a trained special token at their end, so the model does not"
    )
    template.write_text("{% for m in messages %}{{ m.content }}<eos>{% endfor %}")
    assert main(arguments(data, tmp_path, "none", "--json")) == 0
    assert capsys.readouterr().err == ""


def test_json_gives_each_token_with_its_text_role_and_weight(data, kimi_directory, capsys):
    assert main(arguments(data, kimi_directory, MASK, "--json")) == 0
    first, chat = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert list(first) == ["tokens"]
    assert all(token["text"] == TEXT[token["start"] : token["end"]] for token in first["tokens"])
    shown = [(token["text"], token["role"], token["weight"]) for token in first["tokens"]]
    assert shown[:13] == [
        ("<", "doctag", 0.0),
        ("DO", "doctag", 0.0),
        ("CT", "doctag", 0.0),
        ("AG", "doctag", 0.0),
        (">", "doctag", 0.0),
        ("Ed", "false", -0.5),
        (" She", "false", -0.5),  # inside "name" too, but the mask's entry decided
        ("er", "false", -0.5),
        ("an", "false", -0.5),
        (" won", "false", -0.5),
        (".", "false", -0.5),
        (" Nobody", "negation", 0.2),
        ("\u2028", "negation", 0.2),
    ]
    assert shown[-1] == (">\r\n", None, 1.0)

    assert chat["text"].startswith("<|im_user|>user<|im_middle|>Who won?<|im_end|>")
    assert [
        (chat["text"][token["start"] : token["end"]], token["role"], token["weight"])
        for token in chat["tokens"]
        if token["role"] or token["weight"]
    ] == [
        ("She", "false", -0.5),
        ("er", "false", -0.5),
        ("an", "false", -0.5),
        (" won", "false", -0.5),
        (".", None, 1.0),
        ("<|im_end|>", None, 1.0),
    ]


def test_without_a_deciding_entry_the_innermost_span_gives_the_role(data, qwen_directory, capsys):
    assert main(arguments(data, qwen_directory, "none", "--json", "--limit", "1")) == 0
    (line,) = capsys.readouterr().out.splitlines()
    roles = {token["text"]: token["role"] for token in json.loads(line)["tokens"]}
    assert (roles["Ed"], roles[" She"], roles["eran"], roles[" won"]) == ("false", "name", "name", "false")
    assert roles[" <"] is None
    assert [token["weight"] for token in json.loads(line)["tokens"]] == [0.0] + [1.0] * (
        len(json.loads(line)["tokens"]) - 1
    )


def test_a_random_entry_is_named_as_such(data, kimi_directory, capsys):
    assert main(arguments(data, kimi_directory, "random:negation=0.5", "--json", "--limit", "1")) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    negation = sum(token["role"] == "negation" for token in tokens)
    assert sum(token["role"] == "random:negation" and token["weight"] == 0.5 for token in tokens) == negation > 0


def test_targets_without_a_place_for_their_control_are_told(tmp_path, kimi_directory, capsys):
    span = {"start": 0, "end": 11, "role": "false"}
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "Mars is red", "spans": [span]}))  # M, ars, is, red
    assert main(arguments(tmp_path / "d.jsonl", kimi_directory, "random:false")) == 0
    assert "note: random: found no place for 3 targets, so it is no control" in capsys.readouterr().err


def test_the_seed_moves_the_random_entry(data, kimi_directory, capsys):
    outputs = []
    for seed in ("1", "1", "2"):
        assert main(arguments(data, kimi_directory, "random:doctag", "--json", "--limit", "1", "--seed", seed)) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


class Page(html.parser.HTMLParser):
    """The document texts of a page, and every address in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.hints: list[str] = []
        self.texts: list[str] = []
        self.depth: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.depth.append("doc" if ("class", "doc") in attrs else tag)
        if "doc" in self.depth and tag == "i":
            self.hints.append(dict(attrs)["data-t"] or "")
        if ("class", "doc") in attrs:
            self.texts.append("")

    def handle_endtag(self, tag):
        self.depth.pop()

    def handle_data(self, data):
        if "doc" in self.depth:
            self.texts[-1] += data


def test_the_page_holds_the_whole_text_escaped_and_nothing_from_elsewhere(data, kimi_directory, tmp_path, capsys):
    path = tmp_path / "page.html"
    assert main(arguments(data, kimi_directory, MASK, "--html", str(path))) == 0
    assert capsys.readouterr().out == ""
    with path.open(encoding="utf-8", newline="") as file:
        page = Page(file.read())
    assert page.addresses == []
    assert page.depth == []
    assert re.sub("·", "", page.texts[0]) == TEXT  # a · stands for a token that only ends a character
    assert page.texts[1].endswith("<think></think>Sheeran won.<|im_end|>")
    assert page.hints[5].endswith(" · false · weight -0.5")
    assert page.hints[0].endswith(" · doctag · not predicted")


def test_the_terminal_shows_the_whole_text_with_legend_and_counts(data, kimi_directory, capsys):
    assert main(arguments(data, kimi_directory, MASK)) == 0
    printed = capsys.readouterr().out
    assert f"{data}:1" in printed
    assert TEXT.replace("\r\n", "") in printed
    assert "roles: doctag" in printed
    counts = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[-7:]}
    assert printed.endswith("straddling: targets with text both inside and outside a span, treated as inside\n")
    assert counts["targets"] == ["trained", "weighted", "excluded", "unlikelihood", "straddling"]
    assert counts["doctag"] == ["0", "0", "4", "0", "0"]
    assert counts["false"] == ["0", "0", "0", "10", "0"]
    assert counts["negation"][1] != "0"


@pytest.mark.parametrize(
    ("mask", "line", "message"),
    [
        ("flase-spans", "", "unknown name 'flase-spans' (did you mean false-spans?)"),
        (
            "none",
            '{"text": "a", "spans": [{"start": 0, "end": 2, "role": "x"}]}',
            "data.jsonl:3: spans[0]: end 2 is past",
        ),
    ],
)
def test_wrong_input_gives_one_message_and_exit_code_2(data, kimi_directory, capsys, mask, line, message):
    with data.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    assert main(arguments(data, kimi_directory, mask)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_model_without_tokenizer_and_a_page_that_cannot_be_written_are_named(data, kimi_directory, tmp_path, capsys):
    assert main(arguments(data, tmp_path / "none", "none")) == 2
    assert "no such directory" in capsys.readouterr().err
    assert main(arguments(data, kimi_directory, "none", "--html", str(tmp_path / "none" / "page.html"))) == 2
    assert "--html" in capsys.readouterr().err


def test_a_role_that_no_document_has_is_noted(data, kimi_directory, capsys):
    assert main(arguments(data, kimi_directory, "role:nobody", "--json")) == 0
    assert "no document shown has role 'nobody'" in capsys.readouterr().err


def test_the_command_starts_without_torch_and_ends_quietly_when_nobody_reads_on(data, kimi_directory):
    script = str(Path(__file__).parents[1] / "train" / "show.py")
    command = [sys.executable, "-X", "importtime", script, *arguments(data, kimi_directory, MASK, "--json")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not re.search(r"\| +(torch|transformers|deepspeed)$", result.stderr, re.MULTILINE)
    assert len(result.stdout.splitlines()) == 2

    many = data.parent / "many.jsonl"
    many.write_text(data.read_text(encoding="utf-8") * 500, encoding="utf-8")
    command = [sys.executable, script, *arguments(many, kimi_directory, MASK, "--json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_a_page_replaces_an_earlier_one_and_nothing_that_is_read(data, tmp_path, capsys):
    model = tmp_path / "model"
    write_byte_tokenizer(model)
    for _ in range(2):
        assert main(arguments(data, model, MASK, "--html", str(tmp_path / "page.html"))) == 0
    (tmp_path / "link").symlink_to(data)
    before = {path: path.read_bytes() for path in (data, model / "tokenizer.json")}
    for page, read in ((data, "--data"), (tmp_path / "link", "--data"), (model / "tokenizer.json", "--model")):
        assert main(arguments(data, model, MASK, "--html", str(page))) == 2
        assert f"error: --html {page}: is {read} itself, which would be lost" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
