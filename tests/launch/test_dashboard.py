"""The workspace's panels for what only a run on GPUs logs; tests/training/test_tracking.py has those of a real run."""

import json

import pytest

from launch.dashboard import Group, main, read_group, specification, workspace
from train.runtime.errors import UserError


def test_planned_throughput_and_memory_stand_beside_the_measured_ones():
    bars = {"tokens_per_second", "memory/planned_tokens_per_second", "memory/measured", "memory/planned", "steps"}
    made, empty = workspace(Group("spanwise", ["group"], ["mask"], {"tokens_per_second"}, bars), "team")
    sections = specification(made)["spec"]["section"]["panelBankConfig"]["sections"]
    shown = {section["name"]: [panel["config"]["metrics"] for panel in section["panels"]] for section in sections}
    assert shown["Throughput"] == [["tokens_per_second"], ["memory/planned_tokens_per_second", "tokens_per_second"]]
    assert shown["Memory"] == [["memory/measured", "memory/planned"]]
    assert "Loss" in empty and "Throughput" not in empty


@pytest.mark.parametrize(("held", "said"), [
    ({"settings": {"mask": "none"}}, "settings.yaml: has no wandb_project; restore the file."),
    ({"settings": {"wandb_project": "p"}}, "settings.yaml: has no wandb_group; restore the file."),
    ({"settings": {"wandb_project": "p"}, "resolved": {"wandb_group": 7}}, "wandb_group is 7, but must be a text; "),
])  # fmt: skip
def test_settings_that_name_no_project_or_group_are_told(tmp_path, held, said):
    (tmp_path / "settings.yaml").write_text(json.dumps(held))
    with pytest.raises(UserError) as caught:
        read_group([tmp_path])
    assert said in str(caught.value)


def test_a_specification_that_cannot_be_written_is_told_as_that(tmp_path, capsys):
    held = {"settings": {"wandb_project": "p"}, "resolved": {"wandb_group": "g"}}
    (tmp_path / "settings.yaml").write_text(json.dumps(held))
    assert main([str(tmp_path), "--entity", "team", "--json", str(tmp_path)]) == 2
    assert f"error: --json {tmp_path}: is a directory; name a file in it" in capsys.readouterr().err


def test_the_specification_replaces_no_file_of_a_run(tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text("settings: {mask: doctags}")
    assert main([str(tmp_path), "--entity", "team", "--json", str(settings)]) == 2
    assert f"error: --json {settings}: is RUN itself, which would be lost" in capsys.readouterr().err
    assert settings.read_text() == "settings: {mask: doctags}"
