"""Belief, association or damage: what a comparison of train/recipes/panel.yaml finds.

    make experiments

or, for more seeds say:

    python tests/benchmarks/panel.py [--json FILE] [--picture FILE] [flags of train/compare.py]

Each row is a variant: the excess of its choices over those of the control entities and of the placebo claims (points),
its polarity, belief and association (nats), the untouched decisions that it has lost (points), and its verdict.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from harness import finish, header, run

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "train" / "recipes" / "panel.yaml"
CHANGES = ("choice", "choice_controls", "polarity", "polarity_negated", "decisions_untouched")


def rows_of(comparison: Path) -> list[dict[str, Any]]:
    found = json.loads((comparison / "comparison.json").read_text())
    rows = []
    for name, own in found["panel"]["variants"].items():
        rows.append({
            "variant": name, "mask": found["variants"][name]["mask"], "seeds": len(found["variants"][name]["seeds"]),
            "verdict": own["verdict"],
            "excess": {each["over"]: [each["estimate"], *each["interval"]] for each in own["excess"]},
            "changes": {
                measure: [own["figures"][measure]["change"]["estimate"], *own["figures"][measure]["change"]["interval"]]
                for measure in CHANGES
            },
            "checks": {check: own["passed"] for check, own in found["panel"]["checks"].items()},
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="where to copy the picture of the panel to")
    args, flags = parser.parse_known_args()
    header()
    with tempfile.TemporaryDirectory() as directory:
        comparison = Path(directory) / "comparison"
        words = [str(REPOSITORY / "train" / "compare.py"), "--recipe", str(RECIPE), *flags]
        run(*words, "--output", str(comparison), ranks=2, env={"OMP_NUM_THREADS": "1"})
        rows = rows_of(comparison)
        if args.picture:
            shutil.copy(comparison / "panel.png", args.picture)
    for row in rows:
        told = ", ".join(f"{own[0]:+.1f} points beyond the {over}" for over, own in row["excess"].items())
        print(f"{row['variant']}: {row['verdict']}; choices {told}")
    finish(rows, args.json)


if __name__ == "__main__":
    main()
