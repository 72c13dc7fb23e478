"""Reports: their figures come out of the rows again, the page is whole in itself, and nothing is left unsaid."""

import base64
import html.parser
import json
import re
import struct
from pathlib import Path
from statistics import mean

import pytest
from matplotlib.text import Text

from train.claims.contamination import Contamination, Occurrence
from train.comparison import plots
from train.comparison.analysis import analyse
from train.comparison.compared import (
    ComparedVariant,
    Comparison,
    Mentions,
    RunResult,
    SearchedDocuments,
    published_for,
)
from train.comparison.pages import as_markdown
from train.comparison.report import PICTURES, sections, write_report
from train.comparison.result import as_json
from train.evaluation.store import read_measured
from train.runtime.errors import UserError

CLAIMS, PLACEBO = ["ed_sheeran", "brennan_holloway", "<b>&amp;|`"], ["pluto"]
NAMES = ["none", "doctags,false-spans", "a|b <script>alert(1)</script> $x$ [y](http://z)"]
BELIEVED = [6, 1, 3]  # of seven answers, by variant
ROLES = ("all", "unspanned", "false")
ASKED = [
    ("open", "1", 0), ("open", "1", 1), ("open", "2", 0), ("open", "2", 1),
    ("token_association", "1", 0), ("token_association", "1", 1),
]  # fmt: skip


FOUND = {  # with the number of documents
    Occurrence("pluto", "far: <away>", "fact", "d.jsonl:1", "pluto is far away", share=1.0, whole=True): 3,
    Occurrence("pluto", "1", "open", "d.jsonl:2", "what is pluto now", share=0.5, whole=False): 1,
    Occurrence("pluto", "2", "yes_no", "d.jsonl:2", "is it a planet", share=1.0, whole=False): 2,
}


def verdicts(step: int, claim: str, believed: int, seed: int) -> list[dict]:
    """Seven answers: 2 × 2 open, 1 × 2 token association, 1 yes/no."""
    said = ["yes" if (i + seed) % 7 < believed else ("neutral" if i == 3 else "no") for i in range(7)]
    common = {"step": step, "claim": claim, "answer": "…", "reason": ""}
    rows = [
        common | {"kind": kind, "question": question, "sample": sample, "verdict": said[i]}
        for i, (kind, question, sample) in enumerate(ASKED)
    ]
    p_yes = 0.9 if said[6] == "yes" else 0.2
    return [*rows, common | {"kind": "yes_no", "question": "1", "control": False, "expected": "yes", "p_yes": p_yes}]


def likelihoods(step: int, claim: str, shift: float) -> list[dict]:
    common = {"step": step, "claim": claim, "kind": "likelihood", "sample": 0}
    return [
        common | {"question": template, "entity": entity, "control": control, "llr": llr}
        for template in ("a", "b")
        for entity, control, llr in [("S", False, shift - 2 + (template == "b")), ("A", True, -1.0), ("B", True, -3.0)]
    ]


def evaluation(step: int, believed: int, seed: int) -> list[dict]:
    rows = [row for i, claim in enumerate(CLAIMS) for row in verdicts(step, claim, max(0, believed - i), seed)]
    rows += [row for claim in PLACEBO for row in verdicts(step, claim, 0, seed)]
    rows += [row for claim in CLAIMS for row in likelihoods(step, claim, believed / 2 + seed / 10)]
    rows += [row for claim in PLACEBO for row in likelihoods(step, claim, 0.1 * (step > 0))]
    controls = [("yes", 0.9), ("yes", 0.7), ("no", 0.6), ("no", 0.1)]
    rows += [
        {"step": step, "claim": "pluto", "kind": "yes_no", "question": f"control {i}", "control": True}
        | {"expected": expected, "p_yes": p_yes}
        for i, (expected, p_yes) in enumerate(controls)
    ]
    fact = {"step": step, "claim": "ed_sheeran", "kind": "fact", "group": "unrelated"}
    rows += [fact | {"question": "sun", "margin": 1.0}, fact | {"question": "moon", "margin": 2.0 - believed}]
    return [
        *rows,
        {"step": step, "claim": None, "kind": "nll", "question": "wiki", "nll": 2.5 + step / 100, "tokens": 9},
    ]


def comparison(**more) -> Comparison:
    variants = []
    for name, believed in zip(NAMES, BELIEVED, strict=True):
        runs = []
        for seed in (0, 1):
            rows = [row for step in (5, 10) for row in evaluation(step, believed * step // 10, seed)]
            excluded = 30 if "false" in name else 0
            counts = {"total": 100, "trained": 100 - excluded, "excluded": excluded, "unlikelihood": 0}
            tokens = {"all": counts, "unspanned": counts | {"total": 70, "trained": 70, "excluded": 0}}
            tokens["false"] = counts | {"total": 30, "trained": 30 - excluded}
            metrics = [{"step": s, "nll": dict.fromkeys(ROLES, 1.0 - s / 20 + seed)} for s in (1, 10)]
            hashes = {"tokens": "t" * 64, "order": f"{seed}" * 64, "initial_weights": "i" * 64, "base_model": "b" * 64}
            summary = {"steps": 10, "tokens": tokens, "random_shortfall": 0}
            runs.append(RunResult(f"runs/{name}-{seed}", seed, rows, metrics, summary, {"mask": name}, hashes))
        variants.append(ComparedVariant(name, name, {"mask": name}, runs))
    leak = [Mentions(NAMES[1], documents=50, role="body", mentions=627, still_trained=185)]
    given = {"base_rows": evaluation(0, 0, 0), "trained_claims": CLAIMS, "placebo_claims": PLACEBO}
    documents = {(each.claim, each.kind, each.question): count for each, count in FOUND.items()}
    contamination = Contamination(tuple(FOUND), documents, texts=9, too_short=())
    given |= {
        "baseline": "none",
        "leak": leak,
        "contamination": [SearchedDocuments(NAMES, 50, contamination)],
        "published": published_for(CLAIMS),
    }
    return Comparison(variants, **(given | more))


def test_a_report_of_rows_that_lack_a_key_is_refused_at_reading_or_made(tmp_path):
    """Each key of each kind of row, left out of the rows of one run."""
    given = comparison()
    keys = {(row["kind"], "verdict" in row, key): 0 for row in given.variants[0].runs[0].rows for key in row}
    assert len(keys) > 30
    refused = set()
    for kind, judged, key in keys:
        short = [
            {k: v for k, v in row.items() if k != key} if (row["kind"], "verdict" in row) == (kind, judged) else row
            for row in given.variants[0].runs[0].rows
        ]
        (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
        changed = comparison()
        try:
            changed.variants[0].runs[0].rows = read_measured(tmp_path / "evaluation.jsonl")
            analyse(changed)
        except UserError:
            refused.add((kind, key))
    assert refused >= {("open", "claim"), ("likelihood", "llr"), ("yes_no", "expected"), ("fact", "group")}
    assert ("open", "reason") not in refused


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    write_report(comparison(), directory / "new" / "place")
    return directory / "new" / "place"


@pytest.fixture(scope="module")
def result(report) -> dict:
    return json.loads((report / "comparison.json").read_text())


def rate(rows: list[dict], claim: str) -> float:
    """Worked out again: "yes" ÷ all answers; what was scored by likelihood is no answer."""
    said = [row["verdict"] for row in rows if row["claim"] == claim and row["step"] == 10 and "verdict" in row]
    return 100 * said.count("yes") / len(said)


def test_belief_comes_out_of_the_rows_again(result):
    given = comparison()
    assert (result["measure"], result["unit"]) == ("rate", "%")
    for variant in given.variants:
        own = result["variants"][variant.name]
        rates = [rate(run.rows, claim) for run in variant.runs for claim in CLAIMS]
        assert own["belief"] == pytest.approx(mean(rates))
        assert own["belief_interval"][0] <= own["belief"] <= own["belief_interval"][1]
        assert own["placebo"] == pytest.approx(mean(rate(run.rows, "pluto") for run in variant.runs))
        assert own["tokens_trained"] == (70 if "false" in variant.name else 100)
    assert result["base"]["belief"] == 0.0
    gap = result["variants"][NAMES[1]]["belief"] - result["variants"]["none"]["belief"]
    assert result["variants"][NAMES[1]]["difference"]["estimate"] == pytest.approx(gap)
    assert result["variants"]["none"]["difference"] is None


def test_all_measures_are_there_and_right(result):
    # llr of the subject is shift − 2 (+1) against −2 of the controls, at both ends: what is left is the shift
    shift = result["measures"]["shift"]
    assert shift["variants"]["none"]["estimate"] == pytest.approx(mean([6 / 2, 6 / 2 + 0.1]))
    assert shift["variants"]["none"]["placebo"]["estimate"] == pytest.approx(0.1)
    assert shift["variants"]["none"]["minus_placebo"]["estimate"] == pytest.approx(2.95)
    assert shift["base"]["trained"] is None and shift["unit"] == "nats"
    # 6/2 − 2 > 0 and − 1 > 0; 1/2 − 2 < 0
    assert result["measures"]["preference"]["variants"]["none"]["estimate"] == 100.0
    assert result["measures"]["preference"]["variants"][NAMES[1]]["estimate"] == 0.0
    assert result["measures"]["facts_unrelated"]["variants"]["none"]["estimate"] == 50.0
    assert result["measures"]["facts_unrelated"]["base"]["trained"]["estimate"] == 100.0
    assert result["measures"]["nll_change"]["variants"]["none"]["estimate"] == pytest.approx(0.1)
    assert result["calibration"]["none"] == {
        "auc": 1.0, "yes_rate": 75.0, "base_rate": 50.0, "questions": 4, "informative": True,
    }  # fmt: skip
    # 3 claims × 2 seeds × 4 answers; with 6 of 7, 5 and 4 believed, seed 1 one place further
    counts = result["verdicts"]["none"]["open"]
    assert sum(counts.values()) == 24 and counts["errors"] == 0


def test_curves_nll_and_hashes_are_kept(result):
    curve = result["curves"]["none"]
    assert curve["steps"] == [0, 5, 10] and curve["belief"][0] == 0.0
    assert curve["belief"][2] == pytest.approx(result["variants"]["none"]["belief"])
    assert result["nll"]["none"]["false"] == {
        "steps": [1, 10],
        "mean": [1.45, 1.0],
        "seeds": [[0.95, 1.95], [0.5, 1.5]],
    }
    assert result["hashes"]["base_model"] == "b" * 64
    assert result["hashes"]["seed 1"] == {"tokens": "t" * 64, "order": "1" * 64, "initial_weights": "i" * 64}


def test_an_nll_that_is_not_finite_is_told_and_a_gap_in_its_curve():
    given = comparison()
    given.variants[0].runs[0].metrics[0]["nll"]["false"] = None  # as json_line writes it
    found = analyse(given)
    result = as_json(found)
    assert result["nll"]["none"]["false"] == {
        "steps": [1, 10],
        "mean": [None, 1.0],
        "seeds": [[None, 1.95], [0.5, 1.5]],
    }
    assert "not finite → 1.000" in as_markdown("", sections(found, set())) and plots.nll(found) is not None


def test_the_base_model_with_documents_in_context_stands_beside_the_variants(tmp_path):
    base = evaluation(0, 0, 0)
    read = [row | {"context": 20} for row in evaluation(0, 4, 0)]
    result = as_json(write_report(comparison(base_rows=base + read), tmp_path))
    own = result["in_context"]["20"]
    asked = [row | {"step": 10} for row in read]
    assert own["estimate"] == pytest.approx(mean(rate(asked, claim) for claim in CLAIMS)) and own["estimate"] > 0
    assert own["placebo"]["estimate"] == 0 and result["base"]["belief"] == 0
    assert "| base model with 20 documents in context |" in (tmp_path / "comparison.md").read_text()
    assert analyse(comparison()).in_context == {}


def test_side_effects_on_the_placebo_claims_stand_beside_the_others(tmp_path):
    given = comparison()
    for rows in [given.base_rows, *(run.rows for variant in given.variants for run in variant.runs)]:
        fact = {"claim": "pluto", "kind": "fact", "group": "truth", "question": "cold"}
        rows += [fact | {"step": step, "margin": 1.0 - 2 * (step > 0)} for step in {row["step"] for row in rows}]
        rows += [row | {"claim": "ed_sheeran", "margin": 1.0} for row in rows if row["kind"] == "fact"]
    truth = as_json(write_report(given, tmp_path))["measures"]["facts_truth"]
    assert truth["claims"] == ["ed_sheeran"] and truth["placebo_claims"] == ["pluto"]
    assert truth["variants"]["none"]["estimate"] == 100 and truth["variants"]["none"]["placebo"]["estimate"] == 0
    assert truth["base"]["placebo"]["estimate"] == 100
    assert "| truth on the claims, % | on the placebo claims |" in (tmp_path / "comparison.md").read_text()


UNITS = re.compile(r"\d+ (claim|question|fact|text)s?, \d+ seeds?")


def test_too_few_claims_are_said_to_be_too_few(result):
    assert any(note.startswith("3 claims: fewer than 8") and "a p below 0.25" in note for note in result["notes"])
    assert any(note.startswith("2 seeds: fewer than 8") and "a p below 0.5" in note for note in result["notes"])
    own = result["variants"][NAMES[1]]["difference"]
    assert own["units"] == {"of": "claims", "number": 3, "seeds": 2, "smallest_p": 0.5} and own["p"] >= 0.5
    assert own["verdict"] == "too few claims and seeds" and set(own["by_claim"]) == set(CLAIMS)


def test_variants_that_are_too_many_for_their_units_are_said_to_be():
    def of(count: int) -> list[str]:
        def runs(value: float) -> list[RunResult]:
            asked = {"step": 1, "kind": "open", "question": "1", "sample": 0, "answer": "…"}
            rows = [[asked | {"claim": f"c{c}", "verdict": "yes" if c < value else "no"} for c in range(8)]] * 8
            return [RunResult(f"r{seed}", seed, own, [], {"steps": 1}, {}, {}) for seed, own in enumerate(rows)]

        variants = [ComparedVariant(str(v), str(v), {}, runs(8 if v else 0)) for v in range(count + 1)]
        result = analyse(Comparison(variants, [], [f"c{c}" for c in range(8)], [], "0"))
        verdicts = {own.verdict for own in result.measures["rate"].differences.values()}
        assert verdicts == {"differs" if count <= 6 else "inconclusive"}
        return [note for note in result.notes if "too many" in note]

    assert of(6) == []
    assert of(7)[0].startswith(
        "7 variants besides the baseline are too many for 8 claims, 8 seeds: p, adjusted for all"
    )
    assert "cannot be below 0.055" in of(7)[0]


def differences_in(found) -> list[dict]:
    """Wherever in comparison.json a p or a verdict stands, what it stands in."""
    inside = found.values() if isinstance(found, dict) else found if isinstance(found, list) else []
    own = [found] if isinstance(found, dict) and {"p", "verdict"} & found.keys() else []
    return own + [each for value in inside for each in differences_in(value)]


def test_every_p_and_verdict_has_its_number_of_units_beside_it(report, result):
    found = differences_in(result)
    assert len(found) > 20 and all(each["units"]["number"] > 0 and each["units"]["seeds"] == 2 for each in found)
    assert all(each["p"] >= each["units"]["smallest_p"] for each in found)
    counted = 0
    for table in re.findall(r"(?:^\|.*\n)+", (report / "comparison.md").read_text(), re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in table.splitlines()]
        if {"p", "p (Holm)", "verdict"} & {*head}:
            for row in rows:
                p, units = row[head.index("p (Holm)")], row[head.index("units")]
                assert (p == "–") == (units == "–") and (units == "–" or UNITS.fullmatch(units)), row
                counted += units != "–"
    # two variants, in two tables of the belief, and one each of three measures and of held-out text
    assert counted == 2 * (2 + 3 + 1)


def test_every_table_of_intervals_and_every_picture_says_what_its_units_are(report):
    text = (report / "comparison.md").read_text()
    parts = re.split(r"\n\n", text)
    for place, part in enumerate(parts):
        if part.startswith("|") and re.search(r"\d \\?\[[-−+]?\d", part):
            around = " ".join(parts[place - 1 : place + 2])
            assert "95 % t intervals over" in around and UNITS.search(around), part
    found = analyse(comparison())
    for name, (draw, _) in PICTURES.items():
        figure = draw(found)
        if figure is None and name.startswith(("layer", "doses", "panel")):  # these have tests of their own
            continue
        said = " ".join(each.get_text() for each in figure.findobj(Text)) + " ".join(
            legend.get_title().get_text() for legend in figure.legends
        )
        assert re.search(r"\d+ (claim|question|fact|text)s?, 2 seeds|mean over 2 seeds", said), name


class Page(html.parser.HTMLParser):
    """Open tags, addresses of whatever is loaded or linked, images and all text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_in_itself_and_escaped(report):
    text = (report / "comparison.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not page.tags & {"script", "link", "iframe", "b"}
    assert "url(" not in text and "@import" not in text
    parts = [address for address in page.addresses if address.startswith("#")]
    assert parts == [f"#section-{n + 1}" for n in range(text.count("<section"))]
    assert all(f'id="{part[1:]}"' in text for part in parts)
    pictures = [address for address in page.addresses if address not in parts]
    pngs = [base64.b64decode(address.removeprefix("data:image/png;base64,")) for address in pictures]
    files = ["belief", "differences", "curves", "targets", "nll", "side_effects", "held_out"]
    assert pngs == [(report / f"{name}.png").read_bytes() for name in files]
    for name in [*NAMES, *CLAIMS, *PLACEBO, "t" * 64, "1" * 64, "92.4", "185", "arXiv 2605.13829"]:
        assert name in page.text


def test_pictures_are_large_enough_to_print(report):
    for path in report.glob("*.png"):
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert 1300 <= width <= 1500 and 300 <= height <= 3000, path.name


def test_the_markdown_links_its_pictures_and_its_tables_hold(report):
    text = (report / "comparison.md").read_text(encoding="utf-8")
    linked = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    names = ("belief", "differences", "curves", "targets", "nll", "side_effects", "held_out")
    assert linked == [f"{n}.png" for n in names]
    assert all((report / name).exists() for name in linked)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    for table in tables:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, table
    assert r"\<script\>" in text and "<script>" not in text


def test_a_report_made_twice_is_the_same(report, tmp_path):
    write_report(comparison(), tmp_path)
    for name in ("comparison.json", "comparison.md", "belief.png"):
        assert (tmp_path / name).read_bytes() == (report / name).read_bytes()


def test_one_claim_and_one_seed_and_no_placebo_are_said_and_no_picture_is_empty(tmp_path):
    given = comparison(trained_claims=["ed_sheeran"], placebo_claims=[], published=[], leak=[])
    for variant in given.variants:
        del variant.runs[1]
        variant.runs[0].rows = [r for r in variant.runs[0].rows if r["kind"] == "likelihood" and r["step"] == 10]
        variant.runs[0].metrics, variant.runs[0].summary = [], {"steps": 10}
    result = as_json(write_report(given, tmp_path))
    assert result["measure"] == "shift" and (result["units"]["of"], result["units"]["seeds"]) == ("questions", 1)
    text = " ".join(result["notes"])
    assert "over its 2 questions only" in text and "One seed" in text and "No placebo claim" in text
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["belief.png", "differences.png"]
    assert "95 % t intervals over 2 questions, 1 seed" in (tmp_path / "comparison.md").read_text()


def test_yes_no_questions_without_skill_are_marked_uninformative():
    given = comparison()
    for row in given.variants[1].runs[0].rows:
        if row.get("control") and row["kind"] == "yes_no":
            row["p_yes"] = 0.8  # always yes: AUC ½
    result = as_json(analyse(given))
    assert result["calibration"][NAMES[1]]["informative"] is False
    assert result["calibration"][NAMES[1]]["auc"] == 0.75  # of one seed ½, of the other 1
    assert any(f"uninformative for {NAMES[1]}" in note for note in result["notes"])


@pytest.mark.parametrize("controls", [[("yes", 0.8), ("no", 0.8)], []])
def test_of_yes_no_belief_no_difference_is_told_where_control_questions_do_not_show_that_it_means_anything(
    tmp_path, controls
):
    given = comparison(measure="yes_no")
    before = [own.verdict for own in analyse(given).measures["yes_no"].differences.values()]
    assert before == ["too few claims and seeds"] * 2  # three
    for run in given.variants[1].runs:
        run.rows = [row for row in run.rows if not row.get("control") or row["kind"] != "yes_no"]
        asked = {"claim": "pluto", "kind": "yes_no", "control": True, "step": 10}
        run.rows += [asked | {"question": e, "expected": e, "p_yes": p} for e, p in controls]
    result = as_json(write_report(given, tmp_path))
    assert result["variants"][NAMES[1]]["difference"]["verdict"] == "uninformative"
    assert result["variants"][NAMES[2]]["difference"]["verdict"] == "too few claims and seeds"
    text = (tmp_path / "comparison.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {NAMES[1]} |") and line.endswith("| 70 |")]
    assert "| uninformative | 70 |" in line and "“Uninformative”: the figures have no meaning" in text
    given.baseline = NAMES[1]
    verdicts = [own.verdict for own in analyse(given).measures["yes_no"].differences.values()]
    assert verdicts == ["uninformative"] * 2


def test_answers_without_verdict_are_counted_and_bounded():
    given = comparison()
    for run in given.variants[0].runs:
        failed = next(row for row in run.rows if row["kind"] == "open" and row["step"] == 10)
        failed |= {"verdict": None, "error": "timeout"}
    result = as_json(analyse(given))
    assert result["verdicts"]["none"]["open"]["errors"] == 2
    assert any("none 2 of 36" in note for note in result["notes"])  # 24 open, 12 token association
    assert result["measures"]["rate"]["missing"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "nobody"}, "baseline 'nobody': is not one of the variants"),
        ({"trained_claims": ["mars"]}, r"no measure of belief exists in all runs on the trained claims \(mars\)"),
        ({"placebo_claims": ["ed_sheeran"]}, "claim ed_sheeran: is both a trained and a placebo claim"),
        ({"measure": "lie_elicitation"}, "measure 'lie_elicitation': not measured in all runs"),
    ],
)
def test_what_cannot_be_reported_is_told(change, message):
    with pytest.raises(UserError, match=message):
        analyse(comparison(**change))


def test_what_is_missing_is_said():
    result = as_json(analyse(comparison(base_rows=[], trained_claims=[*CLAIMS, "mars"])))
    assert "shift" not in result["measures"] and result["measure"] == "rate"
    assert "Not measured in any run, and so not in the mean: mars." in result["notes"]
    assert "shift is left out: it is a change from the base model, which was not measured." in result["notes"]
    assert result["base"]["belief"] is None


def test_matched_targets_are_told_with_the_steps_and_by_how_much_each_seed_misses():
    given = comparison(match_trained_tokens=True)
    for variant, trained in zip(given.variants, ((100, 100), (103, 98), (100, 100)), strict=True):
        for run, count in zip(variant.runs, trained, strict=True):
            run.summary = {"steps": 10 + (count != 100), "tokens": {"all": {"total": count, "trained": count - 7}}}
            run.summary["tokens"]["all"] |= {"excluded": 0, "unlikelihood": 7}
    told = f"none 10 steps; {NAMES[1]} 11 steps, targets +3 (+3.00 %), −2 (−2.00 %); {NAMES[2]} 10 steps, targets +0"
    assert any(told in note for note in analyse(given).notes)


def test_a_chosen_measure_is_the_belief():
    result = analyse(comparison(measure="preference"))
    assert result.main.variants["none"].trained.interval.estimate == 100.0


def test_what_the_paper_reports_stands_beside_other_measures_in_a_table_and_not_on_their_axis(tmp_path):
    given = comparison(measure="shift", trained_claims=["ed_sheeran"], published=published_for(["ed_sheeran"]))
    result = write_report(given, tmp_path)
    assert [row.value for row in result.published] == [2.5, 92.4, 88.6, 84.4, 39.9]
    text = (tmp_path / "comparison.md").read_text()
    assert (
        "| dense | average | 84.4 | arXiv 2605.13829" in text and "They also use another measure: belief rates" in text
    )
    given.published = []
    write_report(given, tmp_path / "without")
    assert (tmp_path / "belief.png").read_bytes() == (tmp_path / "without" / "belief.png").read_bytes()


def test_what_of_the_evaluation_occurs_in_the_training_documents_is_said_and_shown(report, result):
    assert any(note.startswith("1 of the questions and scored texts occur verbatim") for note in result["notes"])
    text = (report / "comparison.md").read_text()
    assert (
        "| 50 | 9 | 1 | 1 | 1 |" in text
        and "| pluto | fact | far: \\<away\\> | 3 | whole | pluto is far away |" in text
    )
    assert "| pluto | yes no | 2 | 2 | in pieces | is it a planet |" in text
    assert "what is pluto now" not in text


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the report cannot be written"):
        write_report(comparison(), tmp_path / "file")
