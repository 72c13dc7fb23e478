"""Creates the W&B workspace for a group of runs: sections with what they have logged, one curve per variant.

    python -m launch.dashboard RUN… --entity ENTITY [--json FILE]

RUN is the directory of a run of train/sft.py, or of a comparison, which stands for its runs. The curves have the names
that the runs have logged, so no panel is empty. Sections without any logged values are listed and left out. With
--json, the whole specification is written to a file, which needs neither a key nor a server. Otherwise the workspace is
saved on W&B, with the key from WANDB_API_KEY.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from train.runtime.interruption import interruption

    interruption.listen("interrupted")

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.comparison.variants import runs_of
from train.config.command_line import Parser
from train.config.provenance import held_settings
from train.config.settings import FREE_ON_RESUME
from train.evaluation.measures import BATTERIES, BELIEF, SIDE_EFFECTS
from train.evaluation.store import read_measured, read_rows
from train.runtime.command import command
from train.runtime.errors import UserError
from train.runtime.keys import wandb_status
from train.runtime.outputs import check_apart, write
from train.runtime.outside import checked, read_json
from train.training.lineage import base_rows_of
from train.training.tracking import belief_curves, flat

if TYPE_CHECKING:  # imported once the runs are read, as that takes seconds
    from wandb_workspaces import workspaces

OF_A_RUN = ("settings.yaml", "metrics.jsonl", "evaluation.jsonl", "summary.json", "comparison.json")


@dataclass(frozen=True)
class Curves:
    """A panel for each name that `pattern` matches, or with `together` one panel for all of them. bars: shows values of
    the summaries of finished runs side by side, instead of curves over steps."""

    pattern: str
    title: str = ""
    together: bool = False
    bars: bool = False


SECTIONS: dict[str, tuple[Curves, ...]] = {
    "Belief per claim": (Curves(rf"belief/({'|'.join((*BELIEF, *BATTERIES))})/.+"),),
    "Side effects": (Curves(rf"belief/({'|'.join(SIDE_EFFECTS)})/.+"), Curves("belief/(held_out|controls)/.+")),
    "Loss": (Curves("loss"), Curves("cross_entropy"), Curves("unlikelihood"), Curves("held"), Curves("grad_norm"),
             Curves("learning_rate")),
    "NLL per role": (Curves(r"nll/.+"), Curves(r"kl/.+")),
    "Targets trained per role": (Curves(r"trained/.+"),
                                 Curves(r"tokens/.+/trained", "targets trained, whole run", together=True, bars=True)),
    "Throughput": (Curves("tokens_per_second"),
                   Curves(r"(memory/planned_)?tokens_per_second", "tokens/s, planned and measured", together=True,
                          bars=True)),
    "Memory": (Curves("peak_memory_bytes"),
               Curves(r"memory/(planned|measured)", "bytes of a rank, planned and measured", together=True, bars=True)),
    "Expert load": (Curves("expert_load_max_over_mean"), Curves("rank_load_max_over_mean"),
                    Curves("experts_without_tokens"), Curves(r"rank_load/\d+", "tokens of each rank", together=True)),
    "Communication volume": (Curves("wire_bytes"),),
}  # fmt: skip


@dataclass
class Group:
    """Runs that share a workspace. curves, bars: names of the numbers that W&B has of the runs over steps, and in their
    summaries. varied: the settings in which the runs differ, except for the seed and for settings that change no
    result. Runs with the same values of these are one variant."""

    project: str
    groups: list[str]
    varied: list[str]
    curves: set[str]
    bars: set[str]


def read_group(directories: Sequence[Path]) -> Group:
    """Reads what the runs have written. Raises UserError if there is no run, if a directory holds none or a damaged
    one, or if the runs belong to several W&B projects."""
    if not directories:
        raise UserError("RUN: none given; give the directories of the runs that the workspace is for.")
    settings, groups = [], set()
    curves: set[str] = set()
    bars: set[str] = set()
    for directory in directories:
        if not os.path.isfile(directory / "settings.yaml"):
            raise UserError(
                f"RUN {directory}: holds no run (no settings.yaml). Give a run's own directory, or a comparison's."
            )
        held = held_settings(directory / "settings.yaml")
        resolved = held.get("resolved") or {}
        checked(held["settings"], {"wandb_project": str}, directory / "settings.yaml", "restore the file", needed=True)
        checked(resolved, {"wandb_group": str}, directory / "settings.yaml", "restore the file", needed=True)
        settings.append(held["settings"])
        groups.add(resolved["wandb_group"])
        curves |= names_of_curves(directory)
        if os.path.lexists(directory / "summary.json"):
            bars |= numbers(read_json(directory / "summary.json"))
    if len(projects := sorted({str(own["wandb_project"]) for own in settings})) > 1:
        raise UserError(f"RUN: the runs belong to several W&B projects ({', '.join(projects)}); give those of one.")
    varied = [
        name
        for name in settings[0].keys() - FREE_ON_RESUME - {"seed"}
        if any(own.get(name) != settings[0][name] for own in settings)
    ]
    return Group(projects[0], sorted(groups), sorted(varied), curves, bars)


def names_of_curves(directory: Path) -> set[str]:
    """Returns the names of the numbers that a run has logged over steps, including those of beliefs. Raises UserError
    for a damaged file."""
    found = {name for values in read_rows(directory / "metrics.jsonl") for name in numbers(values)}
    records, base = read_measured(directory / "evaluation.jsonl"), base_rows_of(directory)
    return found.union(*(belief_curves(records, step, base) for step in {record["step"] for record in records}))


def numbers(values: dict[str, Any]) -> set[str]:
    """Returns the names in W&B of those values that are numbers."""
    return {name for name, value in flat(values).items() if isinstance(value, int | float)}


def panels_of(kind: Curves, group: Group) -> list[Any]:
    """Returns the panels for the names of this kind that the runs have."""
    import wandb_workspaces.reports.v2 as panels

    found = sorted(name for name in (group.bars if kind.bars else group.curves) if re.fullmatch(kind.pattern, name))
    made = []
    for chosen in [found] if kind.together and found else [[name] for name in found]:
        title = kind.title or chosen[0]
        made.append(
            panels.BarPlot(title=title, metrics=list(chosen))
            if kind.bars
            else panels.LinePlot(title=title, y=list(chosen))
        )
    return made


def workspace(group: Group, entity: str) -> "tuple[workspaces.Workspace, list[str]]":
    """Returns the workspace, and the names of the sections for which nothing was logged."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.expr import Config, Metric

    sections, empty = [], []
    for name, kinds in SECTIONS.items():
        if found := [panel for kind in kinds for panel in panels_of(kind, group)]:
            sections.append(workspaces.Section(name=name, panels=found, is_open=True))
        else:
            empty.append(name)
    made = workspaces.Workspace(
        entity=entity, project=group.project, name=f"Spanwise: {', '.join(group.groups)}", sections=sections,
        auto_generate_panels=False,
        settings=workspaces.WorkspaceSettings(max_runs=100),
        runset_settings=workspaces.RunsetSettings(
            filters=[Metric("Group").isin(group.groups)],
            groupby=[Config(name) for name in group.varied],
        ),
    )  # fmt: skip
    return made, empty


def specification(made: "workspaces.Workspace") -> dict[str, Any]:
    """Returns the workspace as it is sent to W&B."""
    return made._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


@command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an error that the user can fix."""
    parser = Parser(__doc__ or "")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory, or a comparison's")
    parser.add_argument("--entity", required=True, help="the W&B user or team of the project")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the specification to FILE and save nothing")
    args = parser.parse_args(arguments)
    runs = [run for each in args.runs for run in runs_of(each)]
    check_apart({"--json": args.json}, {"RUN": [each / name for each in [*args.runs, *runs] for name in OF_A_RUN]})
    made, empty = workspace(read_group(runs), args.entity)
    for name in empty:
        print(f"nothing logged yet for: {name}")
    if args.json:
        write("--json", args.json, [json.dumps(specification(made), indent=2)])
    else:
        save(made)
    return 0


def save(made: "workspaces.Workspace") -> None:
    """Saves the workspace on W&B. W&B's client prints its address. Raises UserError if W&B cannot be reached or does
    not save it."""
    from launch.wandb_access import wandb_hindrance

    if hindrance := wandb_hindrance():  # checked first, as the client would retry for a long time
        raise UserError(f"nothing can be saved on W&B: {hindrance}. Fix that, or give --json FILE.")
    try:
        made.save()
    except Exception as error:  # the client raises errors of several families
        raise UserError(
            f"--entity {made.entity}: W&B did not save the workspace in {made.project} ({wandb_status(error)}). "
            "Have the runs been uploaded?"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
