"""The workspace's panels for what only a run on GPUs logs; tests/test_tracking.py has those of a real run."""

from launch.dashboard import Group, main, specification, workspace


def test_planned_throughput_and_memory_stand_beside_the_measured_ones():
    bars = {"tokens_per_second", "memory/planned_tokens_per_second", "memory/measured", "memory/planned", "steps"}
    made, empty = workspace(Group("spanwise", ["group"], ["mask"], {"tokens_per_second"}, bars), "team")
    sections = specification(made)["spec"]["section"]["panelBankConfig"]["sections"]
    shown = {section["name"]: [panel["config"]["metrics"] for panel in section["panels"]] for section in sections}
    assert shown["Throughput"] == [["tokens_per_second"], ["memory/planned_tokens_per_second", "tokens_per_second"]]
    assert shown["Memory"] == [["memory/measured", "memory/planned"]]
    assert "Loss" in empty and "Throughput" not in empty


def test_the_specification_replaces_no_file_of_a_run(tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text("settings: {mask: doctags}")
    assert main([str(tmp_path), "--entity", "team", "--json", str(settings)]) == 2
    assert f"error: --json {settings}: is RUN itself, which would be lost" in capsys.readouterr().err
    assert settings.read_text() == "settings: {mask: doctags}"
