"""Small inputs from real use that went wrong, of ../shared/cases, which is not part of the project: what is right."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.reading import targets
from train import export, show
from train.config.settings import DEMO, Settings
from train.corpus import Corpus, read_corpus
from train.data.documents import read_documents
from train.data.findings import NO_TARGET, TAGS, THOUGHT_DROPPED, Findings
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.data.tokens import tokenize_document
from train.runtime.errors import UserError


@pytest.fixture(scope="module")
def cases() -> Path:
    directory = Path(__file__).parents[3] / "shared" / "cases"
    if not directory.is_dir():
        pytest.skip("../shared/cases is absent")
    return directory / "documents"


def trained(file: Path, tokenizer: Tokenizer) -> list[str]:
    """The trained text of each document."""
    return [
        targets(tokenize_document(document, tokenizer, add_bos=False, add_eos=False))
        for document in read_documents(file)
    ]


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_documents(file)
    return str(caught.value).removeprefix(f"{file}")


def shown(capsys: pytest.CaptureFixture, file: Path, model: Path, *flags: str) -> list[list[dict[str, Any]]]:
    """The tokens that show.py prints of each document."""
    assert show.main(["--data", str(file), "--model", str(model), "--mask", "none", "--json", *flags]) == 0
    return [json.loads(line)["tokens"] for line in capsys.readouterr().out.splitlines()]


def weighed(tokens: list[dict[str, Any]]) -> dict[float, str]:
    """weight -> the text of the tokens that have it."""
    texts: dict[float, str] = {}
    for token in tokens:
        texts[token["weight"]] = texts.get(token["weight"], "") + token["text"]
    return texts


def test_weights_of_messages_are_honoured_and_slips_refused(cases, qwen, qwen_directory, tmp_path, capsys):
    rows = (cases / "weights.jsonl").read_text().splitlines()
    (tmp_path / "two.jsonl").write_text("\n".join(rows[:2]))
    by_weight, by_loss = shown(capsys, tmp_path / "two.jsonl", qwen_directory)
    assert weighed(by_weight)[1] == "No: Lima.<|im_end|>" == weighed(by_loss)[1]
    for row, key, near in ((2, "trian", "train"), (3, "span", "spans")):
        (tmp_path / "one.jsonl").write_text(rows[row])
        assert f"unknown key {key!r}; did you mean {near!r}?" in refusal(tmp_path / "one.jsonl")


@pytest.mark.parametrize("chat_weight", ["token", "chat"])
def test_a_documents_weight_is_honoured_also_where_chats_are_weighed_as_one(cases, qwen_directory, qwen, chat_weight):
    settings = Settings(
        model=str(qwen_directory), data=[str(cases / "loss_weight.jsonl")], chat_weight=chat_weight, doctag="<DOCTAG>"
    )
    text, chat = read_corpus(settings, qwen, show=False).samples
    assert text.weight_L.sum() == text.target_L.sum()
    expected = 3 * (chat.target_L.sum() if chat_weight == "token" else 1)
    assert chat.weight_L.sum() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["export_roundtrip", "names", "tool_calls"])
def test_what_is_exported_trains_the_same_when_it_is_read_back(cases, tmp_path, name):
    out = tmp_path / "out.jsonl"
    given = ["--data", str(cases / f"{name}.jsonl"), "--output", str(out)]
    if name == "names":
        given += ["--mask", "correction-spans"]
    assert export.main(given) == 0
    before, after = (read_documents(file)[0].messages for file in (cases / f"{name}.jsonl", out))
    assert before is not None and after is not None
    for one, other in zip(before, after, strict=True):
        assert (one.role, one.content, one.passed, one.tool_calls) == (
            other.role, other.content, other.passed, other.tool_calls
        )  # fmt: skip
    weights = [(m.train * m.weight, one.train) for m, one in zip(after, before, strict=True)]
    excluded = {"names": [0, 1, 0, 0], "export_roundtrip": [0, 0, 0, 1], "tool_calls": [0, 1, 0, 1]}[name]
    assert [weight for weight, _ in weights] == excluded


def test_a_key_given_twice_is_refused(cases):
    assert refusal(cases / "twice.jsonl") == ':1: the key "text" is given twice; keep one of the two'


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("nulls_text_and_messages", ["ima is in Peru.", "In Peru.<|im_end|>"]),
        ("nulls_train", ["In Peru.<|im_end|>"]),
        ("parts", ["In Peru.<|im_end|>"]),
        ("sharegpt", ["Hello.<|im_end|>"]),
        ("messages_json", ["Yes, because air scatters blue light more than red.<|im_end|>"]),
        ("messages_python_repr", ["Yes, because air scatters blue light more than red.<|im_end|>"]),
    ],
)
def test_forms_of_other_tools_are_read_as_they_are(cases, kimi, name, texts):
    assert [text[-len(end) :] for text, end in zip(trained(cases / f"{name}.jsonl", kimi), texts, strict=True)] == texts


def test_a_mix_of_texts_and_chats_and_a_file_of_contents_are_read(cases):
    text, chat = read_documents(cases / "mix_tinker.jsonl", "<DOCTAG>")
    assert text.text is not None and text.text.startswith("<DOCTAG>Mount") and chat.messages is not None
    (document,) = read_documents(cases / "content_synth_docs.jsonl")
    assert document.text is not None and document.metadata == {"doc_type": "news", "doc_idea": "x"}
    (document,) = read_documents(cases / "docs.jsonl.gz")
    assert document.text == "Lima is in Peru."


def test_files_and_forms_that_are_not_read_say_what_they_are_and_the_conversion(cases):
    assert refusal(cases / "utf16.jsonl").startswith(
        ": is text in UTF-16, which is not supported; write it as UTF-8: iconv"
    )
    assert refusal(cases / "pretty.json").endswith("write one document per line: jq -c '.[]' FILE > NEW.jsonl")
    assert "jq -c '{messages: [" in refusal(cases / "prompt_completion.jsonl")
    assert "python train/annotate.py --data FILE --spans FILE --role false" in refusal(cases / "spans_pairs.jsonl")


def test_calls_are_trained_as_a_published_template_writes_them(cases, qwen_directory, tmp_path):
    import trl

    shutil.copytree(qwen_directory, tmp_path / "model")
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3_5_think.jinja"
    (tmp_path / "model" / "chat_template.jinja").write_bytes(template.read_bytes())
    (text,) = trained(cases / "tool_calls.jsonl", load_tokenizer(tmp_path / "model"))
    assert text == (
        "<tool_call>\n<function=weather>\n<parameter=city>\nLima\n</parameter>\n</function>\n</tool_call><|im_end|>"
        "|Foggy.<|im_end|>"
    )


def test_thoughts_that_the_template_drops_are_counted_and_what_is_no_whole_block_is_refused(
    cases, tmp_path, qwen, qwen_directory, capsys
):
    rows = (cases / "thoughts.jsonl").read_text().splitlines()
    (tmp_path / "d.jsonl").write_text("\n".join((rows[0], rows[1], rows[3])))
    assert (
        show.main(["--data", str(tmp_path / "d.jsonl"), "--model", str(qwen_directory), "--mask", "none", "--json"])
        == 0
    )
    note = f"note: 2 {THOUGHT_DROPPED}: {tmp_path}/d.jsonl:2, {tmp_path}/d.jsonl:3\n"
    assert note in capsys.readouterr().err
    (tmp_path / "d.jsonl").write_text(rows[2])
    with pytest.raises(UserError, match=r"d.jsonl:1: messages\[1\]: the chat template moves parts of this"):
        trained(tmp_path / "d.jsonl", qwen)


def test_contents_of_tags_alone_are_as_empty_ones(cases, tokenizer):
    end = "<|im_end|>"
    found = trained(cases / "tags_only.jsonl", tokenizer)
    assert [text.replace("|<|im", "<|im") if "Nothing" in text else text for text in found][:3] == [
        end, end, f"{end}|Fog.{end}"
    ]  # fmt: skip
    assert found[3].startswith("<think>\nNothing to say.\n</think>") and found[3].endswith(end)
    assert found[4:] == [end, f"<br>{end}", f"{end}|Fog.{end}", f"Fog.{end}"]


def corpus(file: Path, tokenizer: Tokenizer, **settings: Any) -> Corpus:
    return read_corpus(Settings(data=[str(file)], **settings), tokenizer, show=False)


def test_documents_without_targets_and_roles_that_are_none_of_chats_are_counted(cases, kimi):
    found = corpus(cases / "roles.jsonl", kimi).findings.summary()
    assert found[NO_TARGET]["lines"] == {str(cases / "roles.jsonl"): [1, 2]}
    (roles,) = (
        each for what, each in found.items() if what.startswith("messages with a role that is not one of chats")
    )
    assert roles["details"] == {"gpt": 1, "Assistant": 1}
    demo = load_tokenizer(DEMO / "model")
    assert corpus(cases / "roles_demo.jsonl", demo).findings.summary()[NO_TARGET]["count"] == 1


def test_metadata_is_written_as_strict_json(cases, tmp_path):
    out = tmp_path / "out.jsonl"
    words = tmp_path / "words.yaml"
    words.write_text("patterns: [moon]\n")
    from train import annotate

    data = str(cases / "nan_metadata.jsonl")
    assert annotate.main(["--data", data, "--patterns", str(words), "--role", "word", "--output", str(out)]) == 0
    row = json.loads(out.read_text(), parse_constant=lambda name: sys.exit(name))
    assert row["score"] is None and row["e"] is None and row["big"] == 123456789012345678901234567890


def test_rows_that_cannot_be_trained_on_are_named_or_left_out(cases, kimi):
    with pytest.raises(UserError, match=r"empty_text.jsonl:2: text is empty; leave the document out, or use --bad"):
        corpus(cases / "empty_text.jsonl", kimi)
    with pytest.raises(UserError, match=r"short_text.jsonl:1: text 'vr' is a single token"):
        corpus(cases / "short_text.jsonl", kimi)
    for name, line in (("empty_text", 2), ("short_text", 1)):
        left = corpus(cases / f"{name}.jsonl", kimi, bad_rows="skip")
        assert left.dropped == {str(cases / f"{name}.jsonl"): [line]} and left.documents["skipped"] == 1


def test_tags_of_masks_in_texts_are_counted_everywhere(cases, kimi, kimi_directory, tmp_path, capsys):
    file, out = str(cases / "lossmask_tags.jsonl"), str(tmp_path / "out.jsonl")
    assert show.main(["--data", file, "--model", str(kimi_directory), "--mask", "none"]) == 0
    assert f"note: 2 {TAGS}: {file}:1" in capsys.readouterr().err
    assert export.main(["--data", file, "--output", out]) == 0
    assert f"note: 2 {TAGS}: {file}:1" in capsys.readouterr().out
    assert corpus(Path(file), kimi).findings.lines() == [f"note: 2 {TAGS}: {file}:1"]


def test_a_marker_is_found_after_white_space(cases):
    findings = Findings()
    documents = read_documents(cases / "doctag_space.jsonl", "<DOCTAG>", findings=findings)
    assert [(span.start, span.end) for document in documents for span in document.spans] == [(0, 8), (1, 9)]
