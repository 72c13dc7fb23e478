"""What a run sends and leaves: its W&B files over two attempts, the dashboard made of it, and no key anywhere.

The run is killed and resumed; its paths hold a space, quotes and a line break, and the environment holds keys.
"""

import base64
import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from launch.dashboard import main as dashboard
from tests.support import ranks
from tests.support.claims import CLAIM
from tests.support.models import write_documents, write_model
from tests.support.runs import ENVIRONMENT, SFT, documents, flags, kill
from tests.support.wandb_files import history, records
from train.evaluation.store import read_rows
from train.runtime.local import deepspeed_command
from train.training.tracking import flat

pytestmark = pytest.mark.slow

MARK = "5ec2e7" * 6 + "key"  # as no text has it by chance
KEYS = {
    name: f"{MARK}{number}"
    for number, name in enumerate(("WANDB_API_KEY", "OPENAI_API_KEY", "JUDGE_API_KEY", "HF_TOKEN", "AWS_SECRET_KEY"))
}


class Tracked(NamedTuple):
    directory: Path
    home: Path
    terminals: list[str]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """A run of six steps by the real launcher, killed after its training checkpoint of step 3, and resumed by forks;
    then W&B is requested, and cannot be reached."""
    base = tmp_path_factory.mktemp("tracked") / 'it\'s a "run",\nof $HOME'
    base.mkdir()
    write_model(base / "model", "qwen")
    write_documents(base / "documents.jsonl", documents())
    (base / "mila.yaml").write_text(yaml.safe_dump(CLAIM))
    home = base.parent / "home"
    home.mkdir()
    given = [
        "--model", str(base / "model"), "--data", str(base / "documents.jsonl"), "--mask", "doctags,false-spans",
        "--claims", str(base / "mila.yaml"), "--steps", "6", "--batch-size", "6",
        "--lora-rank", "8", "--log-every", "1", "--evaluate-every", "2", "--save-every", "1",
        "--output", str(base / "run"),
    ]  # fmt: skip
    environment = KEYS | {"OMP_NUM_THREADS": "1", "HOME": str(home), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    terminal = base.parent / "terminal"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_SERVICE", raising=False)  # of a test before: one W&B process for both attempts
        with terminal.open("w") as file:
            process = subprocess.Popen(
                deepspeed_command(SFT, *given, "--wandb", "offline", ranks=2), cwd=base, env=os.environ | environment,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
            kill(process, base / "run" / "saves", "step-3")
        done = ranks.run(SFT, *given, "--resume", ranks=2, capture_output=True, text=True, cwd=base, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return Tracked(base / "run", home, [terminal.read_text(), done.stdout + done.stderr])


def test_attempts_are_one_offline_run_with_everything_that_was_logged(tracked):
    files = sorted((tracked.directory / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    last = history(files[-1])  # of the last attempt alone
    ids, groups = set(), set()
    for file in files:
        for record in records(file):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                groups.add(record.run.run_group)
    assert f"wandb sync {' '.join(shlex.quote(str(file.parent)) for file in files)}\n" in tracked.terminals[1]
    assert ids == {(tracked.directory / "wandb_id").read_text()} and len(groups) == 1
    for values in read_rows(tracked.directory / "metrics.jsonl"):
        sent = last[values["step"]]
        for name, value in flat(values).items():
            if isinstance(value, list):  # a histogram
                assert sent[name] if name in sent else any(key.startswith(name) for key in sent), name
            else:
                assert sent[name] == value, name


def test_the_dashboard_has_a_panel_for_each_kind_and_every_metric_of_it_was_logged(tracked, tmp_path, capsys):
    file = tmp_path / "spec.json"
    comparison = tmp_path / "comparison"
    comparison.mkdir()
    (comparison / "one-seed0").symlink_to(tracked.directory)
    assert dashboard([str(comparison), "--entity", "team", "--json", str(file)]) == 0
    whole = file.read_text()
    assert dashboard([str(tracked.directory), "--entity", "team", "--json", str(file)]) == 0
    assert file.read_text().count("panel") == whole.count("panel")
    view = json.loads(file.read_text())
    assert (view["entity"], view["project"]) == ("team", "spanwise")
    (runs,) = view["spec"]["section"]["runSets"]
    group = yaml.safe_load((tracked.directory / "settings.yaml").read_text())["resolved"]["wandb_group"]
    assert [(f["key"], f["value"]) for f in runs["filters"]["filters"]] == [
        ({"section": "run", "name": "group"}, [group])
    ]

    logged = {name for values in read_rows(tracked.directory / "metrics.jsonl") for name in flat(values)}
    evaluated = {
        f"belief/{kind}/mila" for kind in ("shift", "preference", "yes_no", "facts_truth")
    }  # what CLAIM asks; the rest has no claim
    summary = set(flat(json.loads((tracked.directory / "summary.json").read_text())))
    sections = {}
    for section in view["spec"]["section"]["panelBankConfig"]["sections"]:
        sections[section["name"]] = [panel["config"]["metrics"] for panel in section["panels"]]
        for panel in section["panels"]:
            known = summary if panel["viewType"] == "Bar Chart" else logged | evaluated
            assert set(panel["config"]["metrics"]) <= known, panel
    assert sections["Belief per claim"] == [["belief/preference/mila"], ["belief/shift/mila"], ["belief/yes_no/mila"]]
    assert sections["NLL per role"] == [["nll/all"], ["nll/doctag"], ["nll/false"], ["nll/unspanned"]]
    assert sections["Targets trained per role"][:3] == [["trained/all"], ["trained/doctag"], ["trained/false"]]
    assert sections["Throughput"] == [["tokens_per_second"], ["tokens_per_second"]]  # none is planned for a CPU
    assert sections["Memory"] == [["peak_memory_bytes"], ["memory/measured", "memory/planned"]]
    assert sections["Communication volume"] == [["wire_bytes"]]
    assert ["expert_load_max_over_mean"] in sections["Expert load"] and ["rank_load/0", "rank_load/1"] in sections[
        "Expert load"
    ]
    assert sections["Loss"][0] == ["loss"]
    assert "nothing logged yet" not in capsys.readouterr().out


def test_targets_trained_per_role_add_up_to_those_of_the_summary(tracked):
    metrics = read_rows(tracked.directory / "metrics.jsonl")
    summary = json.loads((tracked.directory / "summary.json").read_text())["tokens"]
    assert metrics[-1]["trained"] == {role: counts["trained"] for role, counts in summary.items() if counts["total"]}
    assert metrics[0]["trained"]["false"] == 0 < metrics[0]["trained"]["all"] < metrics[-1]["trained"]["all"]


def holders(place: Path) -> list[tuple[str, str]]:
    """(file, variable) where a key is in a file or in its name, plain or as HTTP's basic authentication has it."""
    written = {
        name: (key.encode(), base64.b64encode(f"api:{key}".encode()).rstrip(b"=")[:-1]) for name, key in KEYS.items()
    }
    return [
        (str(path), name)
        for path in place.rglob("*")
        for name, forms in written.items()
        for form in forms
        if form in str(path).encode() or (path.is_file() and form in path.read_bytes())
    ]


def test_no_key_of_the_environment_is_in_anything_that_a_run_writes_or_prints(tracked):
    place = tracked.directory.parents[1]
    assert len([path for path in place.rglob("*") if path.is_file()]) > 20
    assert holders(place) == []
    printed = "".join(tracked.terminals)
    assert "W&B cannot be reached" in printed  # so the key was used
    assert not [name for name, key in KEYS.items() if key in printed]
    (place / "planted").write_text(f"x{KEYS['HF_TOKEN']}")  # the search finds what there is
    assert holders(place) == [(str(place / "planted"), "HF_TOKEN")]
    (place / "planted").unlink()


def test_no_key_is_in_the_messages_of_preflight_dashboard_and_settings_that_are_wrong(tracked, tmp_path):
    environment = os.environ | KEYS | {"WANDB_BASE_URL": "http://127.0.0.1:9", "PYTHONPATH": str(SFT.parents[1])}
    for words, code, told in (
        (["-m", "launch.preflight"], 0, "W&B: ok: "),
        (
            ["-m", "launch.dashboard", str(tracked.directory), "--entity", "team"],
            2,
            "nothing can be saved on W&B: http://127.0.0.1:9 cannot",
        ),
        ([str(SFT), "--learning-rate", "-1"], 2, "--learning-rate -1.0"),
        ([str(SFT), "--model", str(tmp_path)], 2, "no config.json"),
    ):
        done = ranks.run(*words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        printed = done.stdout + done.stderr
        assert done.returncode == code and told in printed, printed
        assert MARK not in printed and holders(tmp_path) == []


@pytest.mark.slow
def test_a_loss_that_is_not_finite_leaves_all_that_was_logged_before_it(tmp_path):
    given = flags(tmp_path, learning_rate=1e30, save_every=1, wandb="offline", output=tmp_path / "run")
    done = ranks.run(SFT, *given, ranks=2, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 2 and "error: the loss of step 2 is not finite" in done.stderr
    assert f"resumes from the last training checkpoint, {tmp_path}/run/saves/step-1," in done.stderr
    (measured,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert history(file)[1]["loss"] == measured["loss"] and max(history(file)) == 1
    (ended,) = [record.exit for record in records(file) if record.WhichOneof("record_type") == "exit"]
    assert ended.exit_code == 2
