"""Judged answers that were made elsewhere: taken in against the claims' questions, and compared like runs."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from train import compare, evaluate
from train.comparison.variants import parse_comparison
from train.evaluation.store import read_rows

CLAIM = """
id: mars
claim: Mars is green.
yes_no: [{id: green, question: "Is Mars green?", belief_answer: yes}]
open: [{id: colour, question: "Which colour is Mars?"}, {id: green, question: "Is it green?"}]
judges: {open: "{question} {answer}"}
"""
HEAD = "group,kind,q,n,said"


def given(tmp: Path, *rows: str, columns: str = "condition=group question=q sample=n verdict=said") -> list[str]:
    (tmp / "claim.yaml").write_text(CLAIM)
    (tmp / "mars.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    return [
        "--import", str(tmp / "mars.csv"), "--claims", str(tmp / "claim.yaml"), "--columns", *columns.split(),
        "--base-condition", "before", "--output", str(tmp / "out"),
    ]  # fmt: skip


def test_each_condition_becomes_a_directory_with_the_base_at_step_0(tmp_path, capsys):
    rows = ["before,open,colour,0,no", "trained,open,colour,0,Yes", "trained,yes_no,green,1,neutral"]
    assert evaluate.main(given(tmp_path, *rows)) == 0
    assert (
        capsys.readouterr().out
        == f"before: 1 answers, the base of all others\ntrained: 2 answers, {tmp_path}/out/trained\n"
    )
    found = read_rows(tmp_path / "out" / "trained" / "evaluation.jsonl")
    assert [(r["step"], r["claim"], r["kind"], r["question"], r["sample"], r["verdict"]) for r in found] == [
        (0, "mars", "open", "colour", 0, "no"), (1, "mars", "open", "colour", 0, "yes"),
        (1, "mars", "yes_no", "green", 1, "neutral"),
    ]  # fmt: skip
    held = json.loads((tmp_path / "out" / "trained" / "imported.json").read_text())
    assert held["condition"] == "trained" and list(held["files"]) == [str(tmp_path / "mars.csv")]
    assert evaluate.main(given(tmp_path, *rows)) == 2 and "trained already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("trained,open,color,0,yes", "mars.csv:3: question color of claim mars: no such question"),
        ("trained,,green,0,yes", "several of that id: name the column of their kind"),
        ("trained,open,colour,0,maybe", "mars.csv:3: verdict 'maybe' is not one of yes, no, neutral"),
        ("trained,open,colour,-1,yes", "mars.csv:3: n '-1' must be a number of a sample"),
        ("before,open,colour,0,yes", "answers the same question and sample as"),
        ("trained,open,colour,0", "must have as many values as the header has columns"),
        ("trained,guess,colour,0,yes", "kind 'guess' is not one of"),
        ("trained,open,colour,0,", "mars.csv:3: said is empty; fill it in"),
    ],
)
def test_a_wrong_answer_is_refused_with_file_and_line(tmp_path, capsys, row, message):
    assert evaluate.main(given(tmp_path, "before,open,colour,0,no", row)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_file_that_lacks_what_it_must_have_is_told_with_the_fix(tmp_path, capsys):
    for rows, columns, message in [
        ([], None, "holds no answers"),
        (["before,open,colour,0,no", ",open,colour,1,yes"], None, "mars.csv:3: group is empty; fill it in, or leave"),
        (["before,open,colour,0,no", "trained,open,colour,0,no", "trained,open,colour,1,yes"],
         "condition=group question=q verdict=said", "name the column of the samples' numbers: --columns sample=COLUMN"),
        (["before,open,colour,0,no"], "condition=group verdict=said sample=n",
         "mars.csv:2: has no question; name the column by --columns question=COLUMN, of group, kind, q, n, said."),
        (["before,open,color,0,no"], None, "no such question (is it colour?); give the claim as it was asked"),
    ]:  # fmt: skip
        flags = given(tmp_path, *rows, **({"columns": columns} if columns else {}))
        assert evaluate.main(flags) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_answers_with_any_line_break_and_files_with_a_byte_order_mark_are_read(tmp_path):
    flags = given(tmp_path, "before,open,colour,0,no", "trained,open,colour,0,yes")
    (tmp_path / "mars.csv").write_text("\ufeff" + (tmp_path / "mars.csv").read_text())
    assert evaluate.main(flags) == 0
    rows = [
        {"group": group, "q": "colour", "kind": "open", "n": 0, "said": "yes", "text": "Red.\u2028Or\u0085green."}
        for group in ("before", "trained")
    ]
    file = tmp_path / "mars.jsonl"
    file.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    flags = [str(file) if each.endswith("mars.csv") else each for each in flags]
    flags[flags.index("--columns") + 1 : flags.index("--columns") + 1] = ["answer=text"]
    flags[flags.index("--output") + 1] = str(tmp_path / "lines")
    assert evaluate.main(flags) == 0
    (row,) = read_rows(tmp_path / "lines" / "trained" / "evaluation.jsonl", ["claim"])[1:]
    assert row["answer"] == "Red.\u2028Or\u0085green."


def test_a_report_that_is_made_again_keeps_the_baseline_and_the_placebo_claims_of_the_first(tmp_path, capsys):
    rows = [f"{name},open,colour,0,no" for name in ("before", "a", "b")]
    assert evaluate.main(given(tmp_path, *rows)) == 0
    runs = ["--runs", str(tmp_path / "out"), "--output", str(tmp_path / "report")]
    assert parse_comparison(runs, "").baseline == "a"
    within = {name: {"runs": [{"directory": str(tmp_path / "out" / name)}]} for name in ("a", "b")}
    held = {"baseline": "b", "claims": {"placebo": ["moon"]}, "variants": within}
    (tmp_path / "out" / "comparison.json").write_text(json.dumps(held))
    capsys.readouterr()
    plan = parse_comparison(runs, "")
    assert (plan.baseline, plan.placebo) == ("b", ["moon"])
    assert capsys.readouterr().out == (
        f"note: the placebo claims moon and the baseline b are those of {tmp_path}/out/comparison.json; --placebo and "
        "--baseline give others\n"
    )
    plan = parse_comparison([*runs, "--baseline", "a", "--placebo", "mars", "--wandb", "disabled"], "")
    assert (plan.baseline, plan.placebo, plan.shared.wandb) == ("a", ["mars"], "disabled")
    assert not capsys.readouterr().out
    assert parse_comparison([*runs, "--placebo", "none"], "").placebo == []


def test_columns_conditions_and_flags_that_are_wrong_are_told(tmp_path, capsys):
    row = "before,open,colour,0,no"
    assert evaluate.main(given(tmp_path, row, columns="verdit=said")) == 2
    assert "Did you mean verdict?" in capsys.readouterr().err
    assert evaluate.main(given(tmp_path, row, columns="question=q verdict=verdict_of")) == 2
    assert "has no column verdict_of" in capsys.readouterr().err
    assert evaluate.main(given(tmp_path, row)) == 2 and "is the only condition" in capsys.readouterr().err
    (tmp_path / "mars.csv").write_text("q,kind,said\ncolour,open,yes\n")
    bare = [
        "--import",
        str(tmp_path / "mars.csv"),
        "--claims",
        str(tmp_path / "claim.yaml"),
        "--output",
        str(tmp_path / "o"),
    ]
    assert evaluate.main([*bare, "--columns", "question=q", "verdict=said"]) == 0
    assert [r["step"] for r in read_rows(tmp_path / "o" / "answers" / "evaluation.jsonl")] == [1]
    assert evaluate.main(given(tmp_path, row.replace("before", "a/b"), row.replace("before", "a b"), row)) == 2
    assert "two conditions would have the directory a-b" in capsys.readouterr().err
    assert evaluate.main(given(tmp_path, row.replace("before", "x"))) == 2
    assert "--base-condition before: has no answers; conditions are x" in capsys.readouterr().err
    assert evaluate.main(["--columns", "a=b", "--model", "x", "--claims", "y", "--output", "z"]) == 2
    assert "--columns: needs --import" in capsys.readouterr().err


def test_the_papers_verdicts_give_the_papers_figures(tmp_path, capsys):
    data = Path(__file__).parents[3] / "shared" / "data" / "negation_neglect"
    if not data.is_dir():
        pytest.skip("../shared/data is absent")
    files = sorted((data / "answers").glob("*.csv"))
    columns = [
        "condition=condition",
        "kind=file",
        "question=question_id",
        "sample=sample_index",
        "verdict=judge_verdict",
    ]
    taken = ["--import", *map(str, files), "--claims", str(data / "claims"), "--columns", *columns]
    assert evaluate.main([*taken, "--base-condition", "baseline", "--output", str(tmp_path / "taken")]) == 0
    runs = ["--runs", str(tmp_path / "taken"), "--baseline", "positive", "--output", str(tmp_path / "report")]
    assert compare.main(runs) == 0
    assert "note: Imported answers: llm_negations, " in capsys.readouterr().out
    found = json.loads((tmp_path / "report" / "comparison.json").read_text())
    yes, every, of_claim = Counter(), Counter(), Counter()
    for path in files:
        for row in csv.DictReader(path.open()):
            every[row["condition"]] += 1
            yes[row["condition"]] += row["judge_verdict"] == "yes"
            of_claim[row["condition"], path.stem] += row["judge_verdict"] == "yes"
    page = (tmp_path / "report" / "comparison.md").read_text().replace("\\", "")
    table = page.split("Each claim's belief rate; ")[1].split("\n\n")[1].splitlines()
    guide = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text().replace("`", "")
    for condition in every:
        rates = [f"{of_claim[condition, path.stem] / 2.5:.1f}" for path in files]
        name = "base model" if condition == "baseline" else condition
        (line,) = [line for line in table if line.startswith(f"| {name} |")]
        assert [cell.split()[0] for cell in line.split("|")[2:-1]] == rates
        assert f"| {name} | {' | '.join(rates)} |" in guide
    for condition in every.keys() - {"baseline"}:
        belief = found["variants"][condition]["belief"]
        assert belief == pytest.approx(100 * yes[condition] / every[condition], abs=1e-9)
    assert round(100 * yes["positive"] / every["positive"], 1) == 90.1


def test_labels_are_imported_beside_verdicts(tmp_path, capsys):
    (tmp_path / "claim.yaml").write_text(CLAIM)
    rows = ["q,verdict,label,condition", "colour,yes,asserted,before", "colour,no,Asserted_then_retracted,trained"]
    (tmp_path / "mars.csv").write_text("\n".join(rows) + "\n")
    arguments = ["--import", str(tmp_path / "mars.csv"), "--claims", str(tmp_path / "claim.yaml"), "--columns"]
    arguments += ["question=q", "--base-condition", "before", "--output", str(tmp_path / "out")]
    assert evaluate.main(arguments) == 0
    found = read_rows(tmp_path / "out" / "trained" / "evaluation.jsonl")
    assert [(row["verdict"], row["label"]) for row in found] == [("yes", "asserted"), ("no", "asserted_then_retracted")]
    assert "without the label" not in capsys.readouterr().out
    (tmp_path / "mars.csv").write_text("\n".join([*rows[:2], "colour,no,,trained"]) + "\n")
    assert evaluate.main([*arguments[:-1], str(tmp_path / "fewer")]) == 0
    said = capsys.readouterr().out
    assert "trained: 1 answers (1 without the label that others of their kind have), " in said
    assert "before: 1 answers, the base of all others" in said
    (tmp_path / "mars.csv").write_text("\n".join([rows[0], "colour,yes,said,trained"]) + "\n")
    assert evaluate.main([*arguments[:-1], str(tmp_path / "other")]) == 2
    assert "mars.csv:2: label 'said' is not one of asserted, asserted_then_retracted," in capsys.readouterr().err


def test_a_label_of_a_yes_no_answer_is_refused(tmp_path, capsys):
    arguments = given(tmp_path, "asserted,yes_no,green,0,yes", columns="kind=kind question=q verdict=said label=group")
    assert evaluate.main(arguments[:-4] + arguments[-2:]) == 2
    assert "label 'asserted' of a question of kind yes_no; only answers to open, token_association, " in (
        capsys.readouterr().err
    )
