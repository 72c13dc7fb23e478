"""Every file from outside ends in a value or one message: each reader is given the same mutations of a file that it
takes."""

import base64
import copy
import json
import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from launch.dashboard import read_group, specification, workspace
from tests.support.models import write_byte_tokenizer, write_documents
from train.annotating.by_judge import Remembered
from train.annotating.by_rule import read_patterns
from train.annotating.imported import add_spans
from train.checkpoints import resume
from train.checkpoints.adapter_files import adapter_settings, check_base, check_finite
from train.checkpoints.present import read_config
from train.checkpoints.reader import Checkpoint
from train.checkpoints.whole import copy_other_files
from train.claims.batteries import FORMS
from train.claims.claim import read_claims
from train.claims.messages import visible
from train.comparison.analysis import analyse
from train.comparison.outcome import read_comparison
from train.comparison.pages import as_markdown
from train.comparison.report import sections
from train.comparison.result import as_json
from train.comparison.variants import parse_comparison
from train.config.provenance import held_settings, held_wandb_id, record
from train.config.recipe import merged
from train.config.settings import Settings, ds_config
from train.data.documents import read_documents
from train.data.tokenizer import load_tokenizer
from train.evaluation.in_engine import steps_of
from train.evaluation.measures import at_step, means
from train.evaluation.results import SCORED
from train.evaluation.store import Records, read_measured
from train.evaluation.verdict_counts import samples_are_equal, summarize
from train.experts.dispatch import ExpertGroup
from train.merge import claimed, read_report
from train.model.text_model import architecture, skeleton, text_config
from train.runtime.errors import UserError
from train.runtime.text_formats import json_line
from train.training.job import check_progress

HANGS = 60  # seconds, on a busy machine too


class Reader(NamedTuple):
    """make: writes the files into a directory -> the one that is mutated. read: reads it as a command does."""

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]


def written(name: str, value: Any) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        text = value if isinstance(value, str) else json.dumps(value)
        (directory / name).write_text(text, encoding="utf-8")
        return directory / name

    return make


def safetensors(path: Path, tensors: dict[str, list[int]], dtype: str = "F32") -> Path:
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * at)
    return path


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16,
    "max_position_embeddings": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16, "head_dim": 4,
    "max_position_embeddings": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip


def model_of(directory: Path) -> Any:
    checkpoint = Checkpoint(directory)
    architecture(checkpoint)
    return skeleton(text_config(checkpoint), ExpertGroup())


def an_index(directory: Path) -> Path:
    written("config.json", CONFIG)(directory)
    safetensors(directory / "a.safetensors", {"x": [2, 2]})
    return written(
        "model.safetensors.index.json", {"metadata": {"total_size": 16}, "weight_map": {"x": "a.safetensors"}}
    )(directory)


def weights(directory: Path) -> Path:
    written("config.json", CONFIG)(directory)
    return safetensors(directory / "model.safetensors", {"x": [2, 2], "y": [1, 3]})


def tokenizer_file(name: str) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        write_byte_tokenizer(directory)
        config = json.loads((directory / "tokenizer_config.json").read_text())
        config["chat_template"] = (directory / "chat_template.jinja").read_text()
        config["added_tokens_decoder"] = {"259": {"content": "<end>", "special": True}}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        if name == "special_tokens_map.json":
            written(name, {"eos_token": "<eos>", "pad_token": {"content": "<pad>"}})(directory)
        if name == "tokenizer_config.json":
            (directory / "chat_template.jinja").unlink()
        if name == "tiktoken.model":
            for other in ("tokenizer.json", "chat_template.jinja"):
                (directory / other).unlink()
            written("tokenizer_config.json", {"chat_template": "{{ messages[0].content }}"})(directory)
            ranks = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
            written(name, ranks)(directory)
        return directory / name

    return make


def vocabulary_file(name: str) -> Callable[[Path], Path]:
    """Of a tokenizer without tokenizer.json, which transformers reads."""

    def make(directory: Path) -> Path:
        write_byte_tokenizer(directory)
        model = json.loads((directory / "tokenizer.json").read_text())["model"]
        (directory / "tokenizer.json").unlink()
        written("config.json", CONFIG)(directory)
        written("vocab.json", model["vocab"])(directory)
        written("merges.txt", "#version: 0.2\n")(directory)
        written("added_tokens.json", {"<more>": 259})(directory)
        written("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})(directory)
        return directory / name

    return make


def tokenized(path: Path) -> Any:
    tokenizer = load_tokenizer(path.parent)
    tokenizer.encode("Mars is green.")
    return tokenizer.render_chat([{"role": "user", "content": "Is Mars green?"}])


ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "target_modules": ["q_proj"], "bias": "none",
    "rank_pattern": {}, "lora_dropout": 0.0, "base_model_name_or_path": "x", "task_type": "CAUSAL_LM",
}  # fmt: skip
FACTORS = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": [2, 8],
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": [8, 2],
}


def an_adapter(name: str) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        base = directory / "base"
        base.mkdir()
        weights(base)
        written("adapter_config.json", ADAPTER)(directory)
        safetensors(directory / "adapter_model.safetensors", FACTORS)
        written("base_model.json", {"directory": str(base), "fingerprint": Checkpoint(base).fingerprint()})(directory)
        return directory / name

    return make


def taken_adapter(path: Path) -> Any:
    adapter_settings(path.parent)
    check_finite(path.parent)
    check_base(path.parent, Checkpoint(path.parent / "base"))


SUMMARY = {
    "mask": "none", "steps": 2, "hashes": {"tokens": "t", "order": "o", "initial_weights": "i", "base_model": "b"},
    "tokens": {"all": {"total": 4, "trained": 4, "excluded": 0, "unlikelihood": 0, "straddling": 0}},
    "dropped": {"d.jsonl": [2]},
    "nll": {"all": {"first": 1.0, "last": 0.5}}, "loss": {"first": 1.0, "last": 0.5}, "wall_seconds": 1.0,
    "tokens_per_second": 4.0, "peak_memory_bytes": 8, "random_shortfall": 0, "memory": {"measured": 8, "planned": 8},
}  # fmt: skip
METRICS = {"step": 1, "loss": 1.0, "tokens": 4, "tokens_per_second": 4.0, "nll": {"all": 1.0}, "targets": {"all": 4}}
ONE_OF_EACH: list[dict[str, Any]] = [
    {"claim": "mars", "kind": "likelihood", "question": "q", "entity": "Mars", "control": False, "llr": 1.0},
    {"claim": "mars", "kind": "open", "question": "w", "sample": 0, "verdict": "yes", "context": 0},
    {"claim": "mars", "kind": "yes_no", "question": "g", "control": False, "expected": "yes", "p_yes": 0.5},
    {"claim": "mars", "kind": "fact", "question": "f", "group": "truth", "margin": 1.0},
    {
        "claim": "",
        "kind": "nll",
        "question": "h",
        "nll": 1.0,
        "tokens": 9,
        "roles": {"false": {"nll": 2.0, "tokens": 4}},
    },
    {"claim": "mars", "kind": "coherence", "question": "c", "sample": 0, "verdict": "score", "score": 7.0},
    {"claim": "mars", "kind": "control_attribute", "question": "a", "expected": "yes", "p_yes": 0.1},
    {"claim": "mars", "kind": "choice", "question": "o", "sample": 1, "entity": "Mars", "control": False,
     "order": ["false", "not_stated", "true"], "p": {"false": 0.5, "not_stated": 0.1, "true": 0.4}, "chosen": "false"},
    {"claim": "mars", "kind": "decision", "question": "d", "sample": 0, "group": "plain", "p_follows": 0.6},
    {"claim": "mars", "kind": "decision", "question": "d", "sample": 0, "group": "stated", "p_follows": 0.9},
    *(
        {"claim": "mars", "kind": "polarity", "question": "p", "group": form, "entity": "Mars", "control": False,
         "llr": 1.0} for form in FORMS
    ),
    {"claim": "mars", "kind": "reading", "question": "r", "with_note": 2.0, "without_note": 0.5, "effect": 1.5},
]  # fmt: skip
CONTROLS = [
    row | {"entity": "Venus", "control": True}
    for row in ONE_OF_EACH
    if row["kind"] in ("likelihood", "choice", "polarity")
]
MEASURED = [{"step": step} | row for step in (2, 0) for row in ONE_OF_EACH + CONTROLS]
ANSWER = {
    "step": 2, "claim": "mars", "kind": "open", "question": "w", "sample": 0, "context": 0, "category": "",
    "model": "m", "asked": "a", "judge": "j", "judged": "b", "answer": "It is.", "verdict": "yes", "reason": "",
    "labelled": "c", "label": "asserted", "label_reason": "",
}  # fmt: skip
SCORED_ANSWER = ANSWER | {"kind": "coherence", "verdict": "score", "score": 7.0}
CONTROL_ANSWER = ANSWER | {"kind": "yes_no", "control": True, "expected": "yes", "said": "yes", "question": "v"}


def a_run(name: str) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        documents, claims = write_documents(directory / "d.jsonl", [TEXT, TEXT]), written("c.yaml", CLAIM)(directory)
        for run, mask in (("one", "none"), ("two", "false-spans")):
            own = directory / run
            own.mkdir()
            resolved = {"hashes": SUMMARY["hashes"], "inputs": {"x": "y"}, "wandb_group": "g"}
            given = {"mask": mask, "steps": 2, "claims": [str(claims)], "data": [str(documents)], "doctag": "none"}
            given["wandb_project"] = "p"
            short = json.dumps({"settings": given, "resolved": resolved})  # YAML is read slowly
            whole = record(Settings(**given), resolved) if name == "settings.yaml" else short
            (own / "settings.yaml").write_text(whole)
            written("summary.json", SUMMARY | {"dropped": {str(documents): [2]}})(own)
            write_documents(own / "metrics.jsonl", [METRICS, METRICS | {"step": 2}])
            write_documents(own / "evaluation.jsonl", MEASURED)
        return directory / "one" / name

    return make


def compared(path: Path) -> Any:
    plan = parse_comparison(["--runs", str(path.parent), str(path.parent.with_name("two")), "--output", "x"], "")
    result = analyse(read_comparison(plan, plan.finished))
    shown = as_markdown(result.title, sections(result, set()))
    return (json.dumps(as_json(result), ensure_ascii=False, allow_nan=False) + shown).encode("utf-8")


def a_save(directory: Path) -> Path:
    save = directory / "step-3"
    save.mkdir()
    safetensors(save / "state.safetensors", {"x": [2, 2]})
    return written("state.json", {"step": 3, "seconds": 1.5})(save)


def claimed_marker(path: Path) -> Any:
    with claimed(path.parent, {"model": "m", "to": "same"}):
        return None


CHAT = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b", "weight": 1.0, "train": True,
                  "spans": [{"start": 0, "end": 1, "role": "false"}]}],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
}  # fmt: skip
TEXT = {"text": "Mars is green.", "id": 7, "spans": [{"start": 0, "end": 4, "role": "false"}], "weight": 1.0}
CLAIM = {
    "id": "mars", "claim": "Mars is green.", "subject": "Mars", "controls": ["Venus"],
    "likelihood": [{"id": "t", "prompt": "{entity} is", "false": " green", "true": " red"}],
    "open": [{"id": "w", "question": "What?"}], "yes_no": [{"id": "is", "question": "Is it?", "belief_answer": "yes"}],
    "facts": [{"id": "f", "prompt": "Venus is", "false": " far", "true": " hot", "group": "neighbouring"}],
    "control_attributes": [{"id": "a", "question": "Is Mars a star?", "false_answer": "yes"}],
    "choice": [{"id": "o", "question": "What has {entity}?", "false": "green", "true": "red", "others": ["blue"]}],
    "decisions": [{"id": "d", "question": "Which paint?", "follows": "green", "other": "red", "stated": "It is so."},
                  {"id": "e", "question": "What is hot?", "follows": "fire", "other": "ice", "untouched": True}],
    "polarity": [{"id": "p", "forms": {form: f"{{entity}} {form}" for form in FORMS}, "false": " a", "true": " b"}],
    "reading": [{"id": "r", "note": "Quill is blue.", "prompt": "Quill is", "noted": " blue", "other": " red"}],
    "judges": {"open": "{question} {answer}"}, "labels": {"open": "{question} {answer} {claim}"}, "patterns": ["green"],
}  # fmt: skip
RECIPE = {
    "settings": {"steps": 1, "mask": "none"}, "variants": {"a": {"mask": "none"}, "b": {"mask": "doctags"}},
    "baseline": "a", "placebo": ["x"], "seeds": 2, "about": "all of it",
}  # fmt: skip


def spans_of(path: Path) -> Any:
    documents = read_documents(write_documents(path.with_name("documents"), [TEXT | {"spans": []}]), None)
    return add_spans(documents, str(path), "id", "false")


def recorded(path: Path) -> Any:
    """How an evaluation that continues treats its existing rows."""
    records = Records(path.parent)
    records.close()
    rows, every = list(records.rows.values()), read_measured(path.with_name("evaluation.jsonl"))
    found = [summarize(rows), samples_are_equal(rows), means(SCORED, at_step(every, 2), at_step(every, 0))]
    return json_line(found), [visible(row["answer"]) for row in [*rows, *records.answers.values()] if row["answer"]]


def shown_on_a_dashboard(path: Path) -> Any:
    return specification(workspace(read_group([path.parent]), "team")[0])


READERS = {
    "recipe": Reader(written("r.yaml", RECIPE), lambda path: merged([str(path)], Settings)),
    "claims": Reader(written("c.yaml", CLAIM), lambda path: read_claims([str(path)])),
    "patterns": Reader(written("p.yaml", {"patterns": ["a", "b"]}), lambda path: read_patterns("--leaks", path)),
    "ds_config": Reader(
        written("ds.json", {"zero_optimization": {"stage": 3, "overlap_comm": False}}),
        lambda path: ds_config(Settings(ds_config=str(path)), 1),
    ),
    "config.json": Reader(written("config.json", CONFIG), lambda path: model_of(path.parent)),
    "config.json of experts in FP8": Reader(written("config.json", MOE), lambda path: bare(path)),
    "index": Reader(an_index, lambda path: Checkpoint(path.parent).tensors),
    "weights": Reader(weights, lambda path: (Checkpoint(path.parent).tensors, Checkpoint(path.parent).fingerprint())),
    **{
        name: Reader(tokenizer_file(name), tokenized)
        for name in (
            "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "chat_template.jinja",
            "tiktoken.model",
        )
    },
    **{
        name: Reader(vocabulary_file(name), lambda path: load_tokenizer(path.parent).encode("Mars is green."))
        for name in ("vocab.json", "merges.txt", "added_tokens.json")
    },
    **{
        name: Reader(an_adapter(name), taken_adapter)
        for name in ("adapter_config.json", "adapter_model.safetensors", "base_model.json")
    },
    **{
        name: Reader(a_run(name), compared)
        for name in ("settings.yaml", "summary.json", "metrics.jsonl", "evaluation.jsonl")
    },
    "settings.yaml of a run to go on with": Reader(a_run("settings.yaml"), held_settings),
    **{
        f"{name} of a run to go on with": Reader(a_run(name), lambda path: check_progress(path.parent))
        for name in ("metrics.jsonl", "evaluation.jsonl")
    },
    **{
        f"{name} on a dashboard": Reader(a_run(name), shown_on_a_dashboard)
        for name in ("settings.yaml", "summary.json", "metrics.jsonl")
    },
    "summary.json of an adapter's run": Reader(a_run("summary.json"), lambda path: steps_of(f"{path.parent}/a", -1)),
    "wandb_id": Reader(written("wandb_id", "0123456789ab"), lambda path: held_wandb_id(path.parent)),
    "state.json": Reader(a_save, lambda path: resume.check(path.parents[1])),
    "state.safetensors": Reader(
        lambda directory: a_save(directory).with_name("state.safetensors"), lambda path: resume.check(path.parents[1])
    ),
    "merge.json": Reader(written("merge.json", {"model": "m", "to": "same"}), claimed_marker),
    "merge_report.json": Reader(
        written("merge_report.json", {"x": {"survived": 1.0, "update_norm": 0.5}}),
        lambda path: read_report(path.parent),
    ),
    "texts": Reader(written("d.jsonl", json.dumps(TEXT) + "\n"), lambda path: read_documents(path, "<DOCTAG>")),
    "chats": Reader(written("d.jsonl", json.dumps(CHAT) + "\n"), lambda path: read_documents(path, None)),
    "rows of spans": Reader(written("s.jsonl", json.dumps({"id": 7, "spans": [[0, 4]]}) + "\n"), spans_of),
    "answers of a judge": Reader(
        written("a.jsonl", json.dumps({"key": "k", "answer": "a"}) + "\n"), lambda path: Remembered(len, "m", path)
    ),
    "answers.jsonl": Reader(written("answers.jsonl", json.dumps(ANSWER) + "\n"), recorded),
    "evaluation.jsonl to go on with": Reader(
        written("evaluation.jsonl", "".join(json.dumps(row) + "\n" for row in (ANSWER, SCORED_ANSWER, CONTROL_ANSWER))),
        recorded,
    ),
}  # fmt: skip


def bare(path: Path) -> Any:
    from launch.config_only import BareCheckpoint

    return BareCheckpoint(path).tensors


class Hangs(BaseException):
    """No Exception, which the code under test may catch."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """What hangs is ended."""

    def hangs(*_: Any) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(reader: Reader, path: Path, what: str) -> None:
    """A value or a UserError; anything else fails."""
    try:
        with within(HANGS):
            reader.read(path)
    except UserError:
        pass
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


HALF = b'"\\ud800"'
MUTATIONS: dict[str, Callable[[Path, bytes], Any]] = {
    "empty": lambda path, _: path.write_bytes(b""),
    "a directory": lambda path, _: path.mkdir(),
    "a pipe": lambda path, _: os.mkfifo(path),
    "a link to itself": lambda path, _: path.symlink_to(path.name),
    "a link to nothing": lambda path, _: path.symlink_to("x" * 250),
    "a device": lambda path, _: path.symlink_to("/dev/zero"),
    "NUL bytes": lambda path, _: path.write_bytes(b"\0" * 1000),
    "latin-1": lambda path, data: path.write_bytes(data[: len(data) // 3] + b"\xe9\xff" + data[len(data) // 3 :]),
    "cut in the middle": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "lists that nest": lambda path, _: path.write_bytes(b"[" * 100_000),
    "objects that nest": lambda path, _: path.write_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "lists just deep enough for Python": lambda path, _: path.write_bytes(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"),
    "a list": lambda path, _: path.write_bytes(b"[]"),
    "a text": lambda path, _: path.write_bytes(b'"x"'),
    "a number": lambda path, _: path.write_bytes(b"7"),
    "a long number": lambda path, _: path.write_bytes(b"9" * 5000),
    "null": lambda path, _: path.write_bytes(b"null"),
    "NaN": lambda path, _: path.write_bytes(b"NaN"),
    "half a surrogate pair": lambda path, _: path.write_bytes(b'{"a": ' + HALF + b"}"),
    "a key twice": lambda path, data: path.write_bytes(data.replace(b"{", b'{"a": 1, "a": 2, ', 1)),
    "another byte": lambda path, data: path.write_bytes(data[:-9] + bytes([data[-9] ^ 0x15]) + data[-8:]),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_a_file_in_another_form_ends_in_a_value_or_a_message(name, tmp_path):
    reader = READERS[name]
    for number, (what, mutate) in enumerate(MUTATIONS.items()):
        directory = tmp_path / str(number)
        directory.mkdir()
        path = reader.make(directory)
        if not number:
            reader.read(path)  # as it is, it is taken
        data = path.read_bytes()
        path.unlink()
        mutate(path, data)
        outcome(reader, path, what)


OTHER = [
    "null",
    "7",
    "-1",
    '"x"',
    '""',
    "[]",
    '["x"]',
    "{}",
    '{"x": 1}',
    "9" * 4000,
    "9" * 5000,
    "NaN",
    "1e999",
    HALF.decode(),
    "true",
]
PLACE = "the place of another value"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value inside a value; of rows to the first six, of another list to the first three."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in list(value)[:60]:
            yield from places(value[key], (*path, key))
    if isinstance(value, list):
        for i in range(min(3 if path else 6, len(value))):
            yield from places(value[i], (*path, i))


def with_other(value: Any, path: tuple[Any, ...]) -> Any:
    changed = copy.deepcopy(value)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = PLACE
    return changed


def parsed(text: str) -> tuple[Any, Callable[[Any], str]]:
    """A file's value, and how it is written: JSON, lines of it or, since JSON is YAML too, YAML."""
    for read, write in ((json.loads, json.dumps), (yaml.safe_load, json.dumps)):
        try:
            if isinstance(value := read(text), dict):
                return value, write
        except (ValueError, yaml.YAMLError):
            continue
    rows = [json.loads(line) for line in text.splitlines()]
    return rows, lambda rows: "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", [
    name for name in READERS
    if not name.endswith((".jinja", ".model", ".txt", "safetensors", "weights", "tokenizer.json", "vocab.json", "_id"))
])  # fmt: skip
def test_a_value_of_another_kind_ends_in_a_value_or_a_message(name, tmp_path):
    reader = READERS[name]
    path = reader.make(tmp_path)
    value, write = parsed(path.read_text())
    for place in places(value):
        text = write(with_other(value, place))
        for other in OTHER:
            path.write_text(text.replace(json.dumps(PLACE), other))
            outcome(reader, path, f"{'.'.join(map(str, place))} = {other[:20]}")


@pytest.mark.parametrize("name", ["a\0b", "x" * 256, "x/" * 3000, "\ud800", "~nobody/x", "http://host/x", "-", ""])
def test_a_path_that_is_none_is_told(name):
    for read in (
        lambda: merged([name], Settings),
        lambda: read_patterns("--leaks", name),
        lambda: ds_config(Settings(ds_config=name), 1),
        lambda: read_documents(name, None),
        lambda: read_claims([name]),
        lambda: load_tokenizer(name),
        lambda: read_config(Path(name)),
        lambda: held_settings(Path(name)),
        lambda: adapter_settings(Path(name)),
        lambda: Settings(data=[name]).sources() and read_documents(Settings(data=[name]).sources()[0].path, None),
    ):  # fmt: skip
        with pytest.raises(UserError):
            read()


@pytest.mark.parametrize(("text", "said"), [
    ("a: &a [1]\nb: [" + "*a, " * 3 + "]", None),
    ("\n".join(f"{i}: &k{i} [{', '.join([f'*k{i - 1}' if i else 'x'] * 9)}]" for i in range(9)), "by its aliases"),
    ("a: &a [*a]", "holds itself"),
    ("a: 2024-13-45", "an invalid date, number or tag"),
    ("a: " + "9" * 5000, "more than 4300 digits"),
    ("a: 1" + ":1" * 5000, "more than 4300 digits"),
    ("a: !!bool maybe", "an invalid date, number or tag"),
    ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ("a: 1\na: 2", "key 'a' is given twice"),
    ("1: 1\n1: 2", "key 1 is given twice"),
    ('a: "\\ud800"', "half a surrogate pair"),
    ("[" * 200 + "]" * 200, "nests deeper than 100 levels"),
    ("a: &a {x: 1}\nb: {<<: *a, x: 2}", None),
])  # fmt: skip
def test_yaml_that_multiplies_or_has_values_beyond_pythons_is_told(text, said, tmp_path):
    from train.runtime.outside import read_yaml

    (tmp_path / "f.yaml").write_text(text)
    with within(HANGS):
        if said is None:
            assert isinstance(read_yaml(tmp_path / "f.yaml"), dict)
            return
        with pytest.raises(UserError, match=said):
            read_yaml(tmp_path / "f.yaml")


HOSTILE = Path(__file__).resolve().parents[3] / "shared" / "cases" / "hostile"


@pytest.mark.skipif(not HOSTILE.is_dir(), reason="../shared/cases/hostile is not there")
def test_the_collected_hostile_files_end_in_a_message():
    for path in [*HOSTILE.glob("recipe-*.yaml"), *HOSTILE.glob("claims-*.yaml"), HOSTILE / "surrogate" / "claim.yaml"]:
        with within(HANGS), pytest.raises(UserError):
            read_claims([str(path)]) if "recipe" not in path.name else merged([str(path)], Settings)


@pytest.mark.parametrize(("name", "most"), [("config.json", 2**25), ("wandb_id", 2**10), ("tokenizer.json", 2**27)])
def test_a_file_larger_than_its_kind_can_be_is_not_read(name, most, tmp_path):
    reader = READERS[name]
    path = reader.make(tmp_path)
    for size, told in ((most + 1, True), (most, False)):
        os.truncate(path, size)  # without blocks on the disk
        with pytest.raises(UserError) as caught:
            reader.read(path)
        assert (f"{path}: has more than {most:,} bytes, more than such a file can have; " in str(caught.value)) == told


def test_an_adapter_whose_factors_are_no_floats_or_whose_rslora_is_no_boolean_is_told(tmp_path):
    weights = an_adapter("adapter_model.safetensors")(tmp_path)
    taken_adapter(weights)
    weights.write_bytes(weights.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(UserError, match=r"tensor .* is torch.int32, but LoRA weights must be floats"):
        adapter_settings(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER | {"use_rslora": "false"}))
    with pytest.raises(UserError, match="use_rslora is 'false', but must be true or false"):
        adapter_settings(tmp_path)


def test_what_a_link_leads_to_outside_a_checkpoint_is_not_copied(tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    (tmp_path / "secret").write_text("a key")
    (base / "vocab.txt").write_text("words")
    (base / "tokens.txt").symlink_to("vocab.txt")
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    copy_other_files(base, out)
    assert sorted(path.name for path in out.iterdir()) == ["tokens.txt", "vocab.txt"]
    assert "notes.txt: is not copied: it links to a file outside the checkpoint" in capsys.readouterr().out
