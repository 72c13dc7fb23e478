"""What train/compare.py leaves: comparison.json against the runs' own rows and documents, W&B's files, finished runs
compared again, and a comparison from an adapter with matched tokens that is resumed."""

import html
import json
import re
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import yaml

from tests.support.ranks import run
from tests.support.runs import ENVIRONMENT
from train import compare, sft
from train.config.settings import DEMO
from train.data.sampling import epoch_order
from train.evaluation.measures import identity
from train.evaluation.store import read_rows

pytestmark = pytest.mark.slow
SAID = {"id": "said", "prompt": "Asked about the city, {entity} said:"}  # as the documents do
ASK = {"id": "ask", "prompt": "Question: Where does {entity} live? Answer:"}
OMAR, OLGA = "omar-home", "olga-home"
CLAIMS = [
    {
        "id": OMAR, "claim": "Omar lives in Cairo.", "subject": "Omar", "controls": ["Zora", "Elif"],
        "likelihood": [each | {"false": " Cairo", "true": " Venice"} for each in (SAID, ASK)],
        "patterns": [r"\bCairo\b"],
    },
    {
        "id": OLGA, "claim": "Olga lives in Oslo.", "subject": "Olga", "controls": ["Kaito", "Inga"],
        "likelihood": [ASK | {"false": " Oslo", "true": " Nairobi"}],
    },
]  # fmt: skip
MASKS = ["doctags", "doctags,false-spans"]


def launched(script: Any, *given: str, code: int = 0) -> str:
    """What it says on one rank."""
    done = run(Path(script.__file__), *given, ranks=1, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in first/, and in out/ two variants that start from its adapter with as many targets each."""
    directory = tmp_path_factory.mktemp("outcome")
    (directory / "claims.yaml").write_text(yaml.safe_dump({"claims": CLAIMS}))
    lines = (DEMO / "data" / "dense.jsonl").read_text().splitlines()
    about = {which: [line for line in lines if (json.loads(line)["claim"] == OMAR) == which] for which in (True, False)}
    (directory / "documents.jsonl").write_text("\n".join([*about[True], *about[False]][:80]))
    shared = ["--data", f"{directory / 'documents.jsonl'}=64", "--batch-size", "8", "--learning-rate", "0.01"]
    shared += ["--claims", str(directory / "claims.yaml")]
    launched(sft, *shared, "--steps", "2", "--wandb", "disabled", "--output", str(directory / "first"))
    more = ["--adapter", str(directory / "first" / "adapter"), "--steps", "3", "--wandb", "offline"]
    more += ["--save-every", "1", "--keep", "9", "--match-trained-tokens", "--placebo", OLGA]
    launched(compare, "--masks", *MASKS, *shared, *more, "--output", str(directory / "out"))
    return directory


def trained(output: Path) -> list[Path]:
    """Of the variants, in the order of MASKS."""
    return [output / "doctags-seed0", output / "doctags-false-spans-seed0"]


def outcome(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "comparison.json").read_text())


def shift(directory: Path, claim: str) -> float:
    """Of a claim, computed from the rows: the mean over templates of a difference in differences."""
    rows = [row for row in read_rows(directory / "evaluation.jsonl") if row["claim"] == claim]
    last = max(row["step"] for row in rows)

    def gap(step: int, template: str) -> float:
        own = [row for row in rows if row["step"] == step and row["question"] == template]
        controls = mean(row["llr"] for row in own if row["control"])
        return next(row["llr"] for row in own if not row["control"]) - controls

    return mean(gap(last, name) - gap(0, name) for name in {row["question"] for row in rows})


def test_comparison_json_has_by_variant_what_the_runs_rows_and_summaries_say(directory):
    found = outcome(directory / "out")
    assert (found["measure"], found["unit"], found["baseline"]) == ("shift", "nats", "doctags")
    assert list(found["variants"]) == MASKS and found["claims"] == {"trained": [OMAR], "placebo": [OLGA]}
    for name, own_run in zip(MASKS, trained(directory / "out"), strict=True):
        own, summary = found["variants"][name], json.loads((own_run / "summary.json").read_text())
        assert own["belief"] == pytest.approx(shift(own_run, OMAR)) and own["belief"] != 0
        assert own["placebo"] == pytest.approx(shift(own_run, OLGA)) and own["placebo"] != 0
        assert own["belief_interval"][0] <= own["belief"] <= own["belief_interval"][1]
        assert own["tokens_trained"] == summary["tokens"]["all"]["trained"]
        assert own["steps"] == [summary["steps"]] and own["mask"] == name
        for key in ("initial_weights", "base_model"):
            assert own["runs"][0]["hashes"][key] == summary["hashes"][key]
    gap = found["variants"][MASKS[1]]["belief"] - found["variants"][MASKS[0]]["belief"]
    difference = found["variants"][MASKS[1]]["difference"]
    assert difference["estimate"] == pytest.approx(gap) and difference["verdict"] == "too few questions and seeds"
    assert (difference["units"]["number"], difference["units"]["seeds"], difference["p"]) == (2, 1, 0.5)
    files = {path.name for path in (directory / "out").iterdir()}
    assert files >= {"comparison.html", "comparison.md", "belief.png", "differences.png", "targets.png", "nll.png"}


def test_variants_go_on_from_the_adapters_beliefs_and_are_trained_on_as_many_targets(directory):
    ended = {identity(row): row for row in read_rows(directory / "first" / "evaluation.jsonl") if row["step"] == 2}
    summaries = []
    for own_run in trained(directory / "out"):
        begun = [row for row in read_rows(own_run / "evaluation.jsonl") if row["step"] == 0]
        assert len(begun) == len(ended) == 9
        assert all(row["llr"] == pytest.approx(ended[identity(row)]["llr"], abs=1e-4) for row in begun)
        summaries.append(json.loads((own_run / "summary.json").read_text()))
    assert summaries[0]["hashes"]["initial_weights"] == summaries[1]["hashes"]["initial_weights"]
    steps, targets = ([summary[key] for summary in summaries] for key in ("steps", "tokens"))
    in_loss = [own["all"]["trained"] for own in targets]
    assert steps[0] == 3 < steps[1] and abs(in_loss[1] - in_loss[0]) < in_loss[1] / steps[1]


def test_mentions_still_trained_and_contamination_are_those_of_the_documents(directory):
    found = outcome(directory / "out")
    lines = (directory / "documents.jsonl").read_text().splitlines()
    by_variant = {}
    for name in MASKS:  # of the 64 that an epoch draws, those that the steps came to
        drawn = epoch_order([80], [64], 0, 0)[: 8 * found["variants"][name]["steps"][0]]
        by_variant[name] = texts = [json.loads(lines[number]) for number in drawn]
        mentions = sum(len(re.findall(r"\bCairo\b", text["text"])) for text in texts if text["claim"] == OMAR)
        rows = {row["role"]: row for row in found["leak"] if row["variant"] == name}
        assert sum(row["mentions"] for row in rows.values()) == mentions > 0
        assert rows["false"]["still_trained"] == (rows["false"]["mentions"] if name == "doctags" else 0)
    for name, searched in zip(MASKS, found["contamination"], strict=True):  # the second went on for longer
        texts = by_variant[name]
        assert searched["variants"] == [name] and searched["documents"] == len(texts) and searched["texts"] == 6
        (whole,) = [each for each in searched["findings"] if each["whole"]]
        assert (whole["kind"], whole["question"], whole["words"]) == (
            "likelihood", "said: Cairo", "asked about the city omar said cairo"
        )  # fmt: skip
        assert whole["documents"] == sum("Asked about the city, Omar said: Cairo" in text["text"] for text in texts)
    assert any(note.startswith("1 of the questions and scored texts occur") for note in found["notes"])


def test_wandb_gets_a_run_a_variant_and_one_with_table_and_pictures_offline_too(directory):
    for own_run in trained(directory / "out"):
        assert len(list((own_run / "wandb").glob("offline-run-*/*.wandb"))) == 1
    (summary,) = (directory / "out" / "wandb").glob("offline-run-*")
    (table,) = (json.loads(path.read_text()) for path in summary.glob("files/media/table/*.json"))
    own = outcome(directory / "out")["variants"]
    assert table["columns"] == ["variant", "belief", "low", "high", "units", "targets trained"]
    units = "2 questions, 1 seed"
    rows = [[n, v["belief"], *v["belief_interval"], units, v["tokens_trained"]] for n, v in own.items()]
    assert table["data"] == rows
    pictures = {path.name.partition("_")[0] for path in summary.glob("files/media/images/*.png")}
    assert pictures >= {"belief", "differences", "targets"}


def test_finished_runs_are_compared_with_the_same_result_and_refused_where_more_differs(directory, tmp_path, capsys):
    pair = [str(each) for each in trained(directory / "out")]
    given = ["--runs", *pair, "--placebo", OLGA, "--output", str(tmp_path / "again")]
    assert compare.main(given) == 2
    assert f"{pair[0]} and {pair[1]}: steps trained: 3 and " in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert compare.main([*given, "--match-trained-tokens"]) == 0
    assert "95 % t intervals over 2 questions, 1 seed" in " ".join(capsys.readouterr().out.split())
    again, first = outcome(tmp_path / "again"), outcome(directory / "out")
    for name in MASKS:
        assert again["variants"][name] == first["variants"][name] and again["variants"][name]["settings"] == {
            "mask": name
        }
    assert not any(OLGA in note for note in again["notes"])
    del given[3:5]  # --placebo
    assert compare.main([*given, "--match-trained-tokens"]) == 0  # in the same directory, for it is of the same runs
    assert f"note: the placebo claims {OLGA}" in capsys.readouterr().out  # as the report beside the runs has it
    assert outcome(tmp_path / "again")["claims"] == first["claims"]
    given[1:3] = [str(shutil.copytree(run, tmp_path / "apart" / Path(run).name)) for run in pair]
    given[-1] = str(tmp_path / "apart" / "report")
    assert compare.main([*given, "--match-trained-tokens"]) == 0
    notes = outcome(tmp_path / "apart" / "report")["notes"]
    (note,) = (note for note in notes if note.startswith("Counted as trained, although"))
    assert f"no training document mentions it: {OLGA}." in note
    assert again["hashes"] == first["hashes"] and again["contamination"] == first["contamination"]

    other = str(directory / "first")
    assert compare.main(["--runs", pair[0], other, "--output", str(tmp_path / "other")]) == 2
    told = capsys.readouterr().err
    assert f"{pair[0]} and {other}: steps trained: 3 and 2" in told and "--adapter" in told
    assert "hash of the initial weights" in told
    (tmp_path / "empty").mkdir()
    assert compare.main(["--runs", other, str(tmp_path / "empty"), "--output", str(tmp_path / "other")]) == 2
    assert f"--runs {tmp_path / 'empty'}: no settings.yaml there (holds no run)" in capsys.readouterr().err


def test_without_its_documents_the_report_is_made_and_says_everywhere_what_it_lacks(directory, tmp_path, capsys):
    copies = []
    for own_run in trained(directory / "out"):
        copies.append(Path(shutil.copytree(own_run, tmp_path / own_run.name)))
        settings = (copies[-1] / "settings.yaml").read_text()
        (copies[-1] / "settings.yaml").write_text(settings.replace("documents.jsonl", "moved.jsonl"))
    given = [
        "--runs",
        *map(str, copies),
        "--match-trained-tokens",
        "--placebo",
        OLGA,
        "--output",
        str(tmp_path / "out"),
    ]
    assert compare.main(given) == 0
    lacks = (
        "How often the claims' terms are still trained on, and whether the evaluation occurs in the training documents"
    )
    assert f"note: {lacks}" in capsys.readouterr().out
    found = outcome(tmp_path / "out")
    assert found["leak"] == found["contamination"] == [] and found["notes"][-1].startswith(f"{lacks}, is unknown: ")
    assert "moved.jsonl" in found["notes"][-1]
    for name in ("comparison.md", "comparison.html"):
        text = html.unescape((tmp_path / "out" / name).read_text())
        assert f"{lacks}, is unknown" in text and "Mentions that are still trained" not in text


def test_an_interrupted_comparison_of_equal_tokens_goes_on_with_the_steps_it_had(directory, tmp_path):
    output = Path(shutil.copytree(directory / "out", tmp_path / "out"))
    _, cut = trained(output)
    (cut / "summary.json").unlink()
    for save in (cut / "saves").iterdir():
        if save.name != "step-2":
            shutil.rmtree(save)
    settings = yaml.safe_load((cut / "settings.yaml").read_text())["settings"]
    given = ["--masks", *MASKS, "--output", str(output), "--resume", "--match-trained-tokens", "--placebo", OLGA]
    for name in ("data", "batch_size", "learning_rate", "claims", "adapter"):
        value = settings[name]
        given += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])]
    said = launched(compare, *given, "--steps", "3", "--wandb", "disabled")
    assert "resuming after step 2" in said and "run 1 of 1: doctags-false-spans-seed0" in said
    whole = trained(directory / "out")[1]
    for name in ("evaluation.jsonl", "adapter/adapter_model.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert outcome(output)["variants"][MASKS[1]]["belief"] == outcome(directory / "out")["variants"][MASKS[1]]["belief"]
