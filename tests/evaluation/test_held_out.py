"""The NLL of held-out text by role, against the token log-likelihoods of stock transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.claims import CLAIM
from tests.support.models import write_documents
from tests.support.ranks import run
from tests.support.runs import ENVIRONMENT
from train import evaluate
from train.comparison.analysis import analyse
from train.comparison.compared import ComparedVariant, Comparison, RunResult
from train.comparison.report import write_report
from train.comparison.result import as_json
from train.config.settings import DEMO
from train.data.documents import read_documents
from train.data.tokenizer import load_tokenizer
from train.evaluation.in_engine import keep
from train.evaluation.likelihood import make_probes
from train.evaluation.measures import at_step, held_out_measures, means, measured
from train.evaluation.store import Records, read_measured, read_rows
from train.runtime.errors import UserError
from train.training.tables import belief_table
from train.training.tracking import belief_curves


def spans(text: str, **of_roles: str) -> list[dict[str, Any]]:
    """A span of each role over its piece of the text."""
    return [{"start": text.index(s), "end": text.index(s) + len(s), "role": role} for role, s in of_roles.items()]


PLAIN = "Noah plays the drums."
HOME = "Mila lives in Lima. Noah plays the drums. Ivy has a cat."
PET = "Ivy has a cat. Mila lives in Lima."
DOCUMENTS: list[dict[str, Any]] = [
    {"text": PLAIN},
    {"text": HOME, "spans": spans(HOME, false="Mila lives in Lima.", negation="in Lima. Noah plays the")},  # overlap
    {"text": PET, "spans": spans(PET, false="Mila lives in Lima.", all="has a")},
]


@pytest.fixture(scope="module")
def measurements(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """The rows of the demo's model at one and two ranks, and of the same texts without spans."""
    tmp = tmp_path_factory.mktemp("held")
    (tmp / "mila.yaml").write_text(yaml.safe_dump(CLAIM))
    write_documents(tmp / "held.jsonl", DOCUMENTS)
    (tmp / "plain").mkdir()
    write_documents(tmp / "plain" / "held.jsonl", [{"text": each["text"]} for each in DOCUMENTS])
    found = {}
    for name, ranks, directory in (("one", 1, tmp), ("two", 2, tmp), ("plain", 1, tmp / "plain")):
        given = ["--model", str(DEMO / "model"), "--claims", str(tmp / "mila.yaml"), "--held-out", "held.jsonl"]
        done = run(
            Path(evaluate.__file__), *given, "--output", str(tmp / name), ranks=ranks, capture_output=True, text=True,
            env=ENVIRONMENT, cwd=directory,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = read_measured(tmp / name / "evaluation.jsonl")
    return found


def by_hand(text: str, own: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Role -> −log p of each of its tokens, by stock transformers. A token of this tokenizer begins with its space."""
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO / "model").eval()
    encoded = AutoTokenizer.from_pretrained(DEMO / "model")(text, return_offsets_mapping=True, add_special_tokens=False)
    ids = torch.tensor(encoded["input_ids"])
    with torch.no_grad():
        log_p = model(ids[None]).logits[0].double().log_softmax(-1)
    found: dict[str, list[float]] = {}
    for i, (start, end) in enumerate(encoded["offset_mapping"]):
        start += len(text[start:end]) - len(text[start:end].lstrip())
        roles = {f"role:{s['role']}" if s["role"] == "all" else s["role"] for s in own
                 if start < s["end"] and s["start"] < end}  # fmt: skip
        for role in ("all", *(roles or {"unspanned"})) if i else ():
            found.setdefault(role, []).append(-log_p[i - 1, ids[i]].item())
    return found


def test_the_nll_of_each_role_is_that_of_its_tokens_in_stock_transformers(measurements):
    rows = [row for row in measurements["one"] if row["kind"] == "nll"]
    assert [row["question"] for row in rows] == ["held.jsonl:1", "held.jsonl:2", "held.jsonl:3"]
    total: dict[str, list[float]] = {}
    for row, document in zip(rows, DOCUMENTS, strict=True):
        expected = by_hand(document["text"], document.get("spans", []))
        whole = expected.pop("all")
        assert row["tokens"] == len(whole) and row["nll"] == pytest.approx(sum(whole) / len(whole), rel=1e-5)
        if "spans" not in document:
            assert "roles" not in row
        else:
            assert {role: own["tokens"] for role, own in row["roles"].items()} == {
                role: len(nlls) for role, nlls in expected.items()
            }
            for role, nlls in expected.items():
                assert row["roles"][role]["nll"] == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)
        for role, nlls in (expected | {"all": whole}).items():
            total.setdefault(role, []).extend(nlls)
    assert [set(row.get("roles", ())) for row in rows] == [
        set(), {"unspanned", "false", "negation"}, {"unspanned", "false", "role:all"},
    ]  # fmt: skip
    # Over all texts: the change from a base whose every token has 1 nat less is 1; from one with an NLL of 0 it is the
    # NLL itself, of which every token counts alike.
    nothing = [row | {"nll": 0.0, "roles": _of_nothing(row)} if "roles" in row else row | {"nll": 0.0} for row in rows]
    for role, nlls in total.items():
        values = measured(f"held_out/{role}", rows, nothing)
        assert sum(values.values()) / len(values) == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)
    assert held_out_measures(rows) == [f"held_out/{r}" for r in ("all", "unspanned", "false", "negation", "role:all")]


def _of_nothing(row: dict) -> dict:
    return {role: own | {"nll": 0.0} for role, own in row["roles"].items()}


def test_two_ranks_measure_the_same(measurements):
    one, two = measurements["one"], measurements["two"]
    assert len(one) == len(two) and any("roles" in row for row in two)
    for first, second in zip(one, two, strict=True):
        assert first.get("roles", {}).keys() == second.get("roles", {}).keys()
        for role, own in first.get("roles", {}).items():
            assert second["roles"][role] == pytest.approx(own, rel=1e-6)


def test_the_row_of_a_text_is_the_same_with_and_without_spans_but_for_the_roles(measurements):
    def lines(name: str) -> list[str]:
        return [json.dumps({k: v for k, v in row.items() if k != "roles"}) for row in measurements[name]]

    assert lines("one") == lines("plain") and not any("roles" in row for row in measurements["plain"])
    assert list(measurements["plain"][-1]) == [
        "step", "claim", "kind", "question", "sample", "tokens", "nll", "context", "model",
    ]  # fmt: skip


def test_more_roles_than_a_text_can_have_bits_are_told(tmp_path):
    text = "Mila lives in Lima."
    path = write_documents(
        tmp_path / "held.jsonl", [{"text": text, "spans": [{"start": 0, "end": 4, "role": f"r{i}"} for i in range(63)]}]
    )
    tokenizer = load_tokenizer(DEMO / "model")
    with pytest.raises(UserError, match="--held-out: 63 roles; at most 62 are supported"):
        make_probes([], read_documents(path), tokenizer, False, 100, 10_000)


def text_row(step: int, name: str, nll: float, tokens: int, **roles: tuple[float, int]) -> dict:
    """A row of a held-out text; roles: NLL and tokens of each."""
    row = {"step": step, "claim": None, "kind": "nll", "question": name, "sample": 0, "tokens": tokens}
    own = {role: {"nll": value, "tokens": count} for role, (value, count) in roles.items()}
    return row | ({"roles": own} if own else {}) | {"nll": nll}


BASE = [
    text_row(0, "a", 2.0, 10, unspanned=(1.0, 8), false=(6.0, 2)),
    text_row(0, "b", 3.0, 30, unspanned=(2.0, 20), false=(5.0, 10)),
    text_row(0, "c", 1.0, 60),
]
AFTER = [
    text_row(4, "a", 2.6, 10, unspanned=(1.0, 8), false=(9.0, 2)),
    text_row(4, "b", 3.2, 30, unspanned=(2.0, 20), false=(5.6, 10)),
    text_row(4, "c", 1.5, 60),
]


def test_the_change_over_texts_counts_every_token_alike():
    found = means(("nll_change",), AFTER, BASE)
    assert found["nll_change"] == {"": pytest.approx((0.6 + 0.2 + 0.5) / 3)}  # every text alike
    assert found["held_out/all"] == {"": pytest.approx((10 * 0.6 + 30 * 0.2 + 60 * 0.5) / 100)}
    assert found["held_out/false"] == {"": pytest.approx((2 * 3.0 + 10 * 0.6) / 12)}
    assert found["held_out/unspanned"] == {"": pytest.approx((8 * 0 + 20 * 0 + 60 * 0.5) / 88)}
    # two texts, 12 tokens, a change of 1: 1 + 2 · 2 · (3 − 1) ÷ 12 and 1 + 2 · 10 · (.6 − 1) ÷ 12
    values = measured("held_out/false", AFTER, BASE)
    assert values == {("", "a", 0): pytest.approx(5 / 3), ("", "b", 0): pytest.approx(1 / 3)}
    with pytest.raises(UserError, match=r"lacks held-out text \(role false\) 'b'"):
        measured("held_out/false", AFTER, [BASE[0], text_row(0, "b", 3.0, 30)])


def test_texts_without_spans_have_no_figures_by_role_and_neither_have_files_of_before():
    before, after = ([{k: v for k, v in row.items() if k != "roles"} for row in rows] for rows in (BASE, AFTER))
    assert means(("nll_change",), after, before).keys() == {"nll_change"}
    assert measured("held_out/unspanned", after, before) == {} and measured("held_out/false", AFTER, before) == {}
    assert belief_curves([*before, *after], 4, before).keys() == {"belief/nll_change/all"}


def test_a_run_shows_and_logs_the_change_of_each_role():
    table = belief_table([*BASE, *AFTER], BASE)
    assert table
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows[-1] == ("held_out/false", "nats", "all", "0.00", "1.00")
    assert [row[0] for row in rows] == ["nll_change", "held_out/all", "held_out/unspanned", "held_out/false"]
    curves = belief_curves([*BASE, *AFTER], 4, BASE)
    assert curves["belief/held_out/false/all"] == pytest.approx(1.0) and "belief/held_out/all/all" in curves


def test_rows_without_roles_are_measured_again_by_rows_that_have_them(tmp_path):
    row = {k: v for k, v in AFTER[0].items() if k not in ("step", "roles")}
    records = Records(tmp_path)
    try:
        for found in (row, row | {"roles": AFTER[0]["roles"]}, row | {"roles": AFTER[0]["roles"]}, row):
            keep(records, [found], 4, 0, "model")
    finally:
        records.close()
    rows = read_rows(tmp_path / "evaluation.jsonl")
    assert ["roles" in each for each in rows] == [False, True]
    assert ["roles" in each for each in at_step(rows, 4)] == [True]


@pytest.mark.parametrize(
    ("roles", "told"),
    [
        ({"false": {"nll": 1.0}}, "role 'false': has no tokens"),
        ({"false": {"nll": "1", "tokens": 1}}, "role 'false': nll is '1', but must be a finite number"),
        ({"false": {"nll": 1.0, "tokens": 0}}, "tokens is 0, but must be at least 1"),
        ({"false": None}, "roles: has no false"),
        ({"\ud800": {"nll": 1.0, "tokens": 1}}, "half a surrogate pair"),
        ([], "roles is \\[\\], but must be an object"),
    ],
)
def test_a_row_with_wrong_roles_is_told(tmp_path, roles, told):
    (tmp_path / "evaluation.jsonl").write_text(json.dumps(AFTER[0] | {"roles": roles}) + "\n")
    with pytest.raises(UserError, match=rf"evaluation.jsonl:1: .*{told}"):
        read_measured(tmp_path / "evaluation.jsonl")


def believed(step: int, llr: float) -> list[dict]:
    row = {"step": step, "claim": "mars", "kind": "likelihood", "sample": 0}
    return [
        row | {"question": name, "entity": entity, "control": entity != "Mars", "llr": llr if entity == "Mars" else 0.0}
        for name in ("a", "b")
        for entity in ("Mars", "Venus")
    ]


def compared(steps: tuple[int, ...] = (4,), without_roles: bool = False) -> Comparison:
    """Two variants of two seeds. After the last step, the tokens of false have 1 and 2 nats more than in the base."""

    def texts(step: int, more: float) -> list[dict]:
        rows = []
        for row in BASE:
            own = row.get("roles", {})
            moved = row["nll"] + more * own.get("false", {"tokens": 0})["tokens"] / row["tokens"]
            roles = {role: (each["nll"] + more * (role == "false"), each["tokens"]) for role, each in own.items()}
            rows.append(text_row(step, row["question"], moved, row["tokens"], **({} if without_roles else roles)))
        return rows

    variants = []
    for name, more in (("dense", 1.0), ("masked", 2.0)):
        runs = []
        for seed in (0, 1):
            rows = [*believed(0, 0.0), *texts(0, 0.0)]
            for step in steps:
                rows += [*believed(step, 3.0 * step / 4 + seed), *texts(step, more * step / 4)]
            runs.append(RunResult(f"{name}-{seed}", seed, rows, [], {"steps": 4}, {"mask": name}, {}))
        variants.append(ComparedVariant(name, name, {"mask": name}, runs))
    return Comparison(variants, [*believed(0, 0.0), *texts(0, 0.0)], ["mars"], [], "dense")


def test_a_comparison_has_the_change_of_each_role_beside_belief(tmp_path):
    found = write_report(compared(), tmp_path)
    assert list(found.held_out) == ["all", "unspanned", "false"]
    held = as_json(found)["measures"]["held_out/false"]
    assert held["variants"]["dense"]["estimate"] == pytest.approx(1.0)
    assert held["variants"]["masked"]["by_seed"] == pytest.approx([2.0, 2.0])
    assert held["units"] == {"of": "texts", "number": 2, "seeds": 2, "smallest_p": 0.5}
    assert held["differences"]["masked"]["estimate"] == pytest.approx(1.0)
    assert as_json(found)["measures"]["held_out/all"]["variants"]["masked"]["estimate"] == pytest.approx(2 * 12 / 100)
    assert as_json(found)["measures"]["held_out/unspanned"]["units"]["number"] == 3
    text = (tmp_path / "comparison.md").read_text().split("## Belief against held-out text")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| variant | step | belief, nats | all | unspanned | false |"
    assert rows[2] == "| base model | 0 | 0.00 | 0.00 | 0.00 | 0.00 |"
    assert rows[3].startswith("| dense | 4 | 3.50 ") and rows[3].endswith(" | 0.00 | +1.00 |")
    assert "3 texts, 2 seeds; false: 2 texts, 2 seeds." in text and (tmp_path / "held_out.png").exists()
    assert "| masked | false | +1.00 |" in text


def test_steps_at_which_both_were_measured_are_on_the_way_to_the_end(tmp_path):
    found = write_report(compared((1, 2, 4)), tmp_path)
    curve = as_json(found)["measures"]["held_out/false"]["curves"]["masked"]
    assert curve["steps"] == [0, 1, 2, 4] and curve["belief"] == pytest.approx([0, 0.5, 1, 2])
    text = (tmp_path / "comparison.md").read_text().split("## Belief against held-out text")[1]
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| dense |")]
    assert [step for _, step in rows[:3]] == ["1", "2", "4"]


def test_files_of_before_roles_were_measured_still_compare():
    found = analyse(compared(without_roles=True))
    assert list(found.held_out) == ["all"] and not any("held_out" in note for note in found.notes)
    half = compared()
    half.base_rows = compared(without_roles=True).base_rows
    found = analyse(half)
    assert list(found.held_out) == ["all"]
    assert (
        "held_out/ROLE is left out: it is a change from the base model, which was not measured by role." in found.notes
    )
    half = compared()
    half.variants[0].runs[0].rows = compared(without_roles=True).variants[0].runs[0].rows
    found = analyse(half)
    assert list(found.held_out) == ["all"]
    assert "held_out/false is left out: measured in 3 of 4 runs only." in found.notes
