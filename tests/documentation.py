"""Writes what the code and the measurements say into docs/:

    python -m tests.documentation

docs/settings.md lists every setting, from the settings themselves. The tables between markers in the other pages are
those of tests/benchmarks/tables.py.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.evaluate_runs import EvaluateRunsOptions
from launch.plan import PlanOptions
from launch.preflight import PreflightOptions
from launch.serve import ServeOptions
from tests.benchmarks.tables import written
from train.comparison.variants import ComparisonOptions
from train.config.command_line import MOST, REPOSITORY, flag_of
from train.config.settings import Recipe, Settings
from train.evaluation.options import EvaluationSettings

COMMANDS: dict[str, tuple[type, ...]] = {
    "train/sft.py": (Settings, Recipe),
    "train/compare.py": (ComparisonOptions,),
    "train/evaluate.py": (EvaluationSettings,),
    "python -m launch.plan": (PlanOptions,),
    "python -m launch.preflight": (PreflightOptions,),
    "python -m launch.serve": (ServeOptions,),
    "python -m launch.evaluate_runs": (EvaluateRunsOptions,),
}
BEGINNING = """# Settings

Every setting of the commands that train, measure and plan: its default, the values that it may have, and what it does.
No number may be more than 10⁸ unless its range says otherwise, and `--learning-rate` and `--lora-alpha` must be more
than 0. `train/compare.py`, `launch.plan` and `launch.preflight` take the settings of `train/sft.py` too. A recipe names
a setting without the dashes and with underscores: `learning_rate` for `--learning-rate`.
"""


def shown(value: Any) -> str:
    """A default or a limit as the command line takes it."""
    if value in ("", [], ()):
        return ""
    text = (
        f"{value:,}".replace(",", "") if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    )
    return f"`{text.replace(f'{REPOSITORY}/', '')}`"


def rows(settings: type) -> Iterator[str]:
    for field in dataclasses.fields(settings):
        help, choices, between = (field.metadata[key] for key in ("help", "choices", "between"))
        default = [] if field.metadata["many"] else field.default
        if field.type is bool:
            allowed = "a switch"
        elif choices:
            allowed = ", ".join(f"`{choice}`" for choice in choices)
        else:
            low, high = between or ("", "")
            allowed = f"≥ {low}" if between and high == MOST else f"{low} to {high}" if between else ""
        default = "" if default is False else shown(default)
        yield f"| `{flag_of(field.name)}` | {default} | {allowed} | {help.replace('|', chr(92) + '|')} |"


def settings_page() -> str:
    parts = [BEGINNING]
    for command, given in COMMANDS.items():
        head = ["| setting | default | values | what it does |", "|---|---|---|---|"]
        table = [*head, *(row for settings in given for row in rows(settings))]
        parts.append(f"## `{command}`\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


def main() -> None:
    docs = Path(REPOSITORY) / "docs"
    (docs / "settings.md").write_text(settings_page())
    for path in docs.glob("*.md"):
        path.write_text(written(path.read_text()))


if __name__ == "__main__":
    main()
