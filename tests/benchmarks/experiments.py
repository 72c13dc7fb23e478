"""What the experiments on the toy world find (hold, phases, doses, panel), each a comparison of a recipe of its name.

    make experiments

or, for more seeds say:

    python tests/benchmarks/experiments.py NAME [--json FILE] [--picture PICTURE=FILE] [flags of train/compare.py]

The rows are those of the tables in docs/experiments.md. Belief and placebo are the shift, in nats; KL is in nats per
token. --picture copies a picture of the report to a file.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from harness import finish, header, run

REPOSITORY = Path(__file__).resolve().parents[2]
Found = dict[str, Any]
Rows = list[dict[str, Any]]


def hold(found: Found) -> Rows:
    """Each row is a variant: its belief and placebo, the NLL of the false statements before and after training, how far
    their predictions are from the base's (KL), and for how many of the trained claims the shift is shown by layer."""
    rows = []
    for name, own in found["variants"].items():
        summaries = [json.loads((Path(each["directory"]) / "summary.json").read_text()) for each in own["runs"]]
        shown = [claim["shown"] for which, claim in found["by_layer"]["variants"][name].items()
                 if which in found["claims"]["trained"]]  # fmt: skip
        rows.append({
            "variant": name, "mask": own["mask"], "seeds": len(own["runs"]), "belief": own["belief"],
            "belief_interval": own["belief_interval"], "placebo": own["placebo"],
            "nll_of_false": {end: mean(s["nll"]["false"][end] for s in summaries) for end in ("first", "last")},
            "kl": {role: mean(s["kl"][role]["last"] for s in summaries) for role in ("false", "unspanned")},
            "floor": mean(s["kl_floor"] for s in summaries),
            "claims": len(shown), "claims_shown": sum(each is not None for each in shown),
        })  # fmt: skip
    return rows


def phases(found: Found) -> Rows:
    """Each row is a variant of two phases: belief at the end of each, and the changes of belief and placebo in the
    second."""
    rows = []
    for name, (first, then) in found["phases"].items():
        rows.append({
            "variant": name, "phases": [first["name"], then["name"]], "masks": [first["mask"], then["mask"]],
            "steps": [first["last"], then["last"]], "belief": [first["trained"], then["trained"]],
            "change": then["change"], "placebo_change": then["placebo_change"], "against": then["against"],
        })  # fmt: skip
    return rows


def doses(found: Found) -> Rows:
    """Each row is a curve: belief and placebo at each dose, and the dose at half belief."""
    rows = []
    for name, own in found["doses"]["curves"].items():
        variants = [found["variants"][variant] for variant in own["variants"]]
        rows.append({
            "curve": name, "doses": own["doses"], "steps": [each["steps"][0] for each in variants],
            "belief": [each["belief"] for each in variants], "placebo": [each["placebo"] for each in variants],
            "mentions": own["mentions_trained"], "half": own["half"], "half_mentions": own["half_mentions"],
            "level": found["doses"]["level"],
        })  # fmt: skip
    return rows


def panel(found: Found) -> Rows:
    """Each row is a variant: the excess of its choices over those of the control entities and of the placebo claims
    (points), its polarity, belief and association (nats), the untouched decisions that it has lost (points), and its
    verdict."""
    rows = []
    for name, own in found["panel"]["variants"].items():
        changes = {measure: figure["change"] for measure, figure in own["figures"].items()}
        rows.append({
            "variant": name, "mask": found["variants"][name]["mask"], "seeds": len(found["variants"][name]["seeds"]),
            "verdict": own["verdict"],
            "excess": {each["over"]: [each["estimate"], *each["interval"]] for each in own["excess"]},
            "changes": {measure: [changes[measure]["estimate"], *changes[measure]["interval"]] for measure in SHOWN},
            "checks": {check: own["passed"] for check, own in found["panel"]["checks"].items()},
        })  # fmt: skip
    return rows


SHOWN = ("choice", "choice_controls", "polarity", "polarity_negated", "decisions_untouched")
EXPERIMENTS = {each.__name__: each for each in (hold, phases, doses, panel)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--picture", metavar="PICTURE=FILE", action="append", default=[])
    args, flags = parser.parse_known_args()
    header()
    with tempfile.TemporaryDirectory() as directory:
        comparison, recipe = Path(directory) / "comparison", REPOSITORY / "train" / "recipes" / f"{args.name}.yaml"
        words = [str(REPOSITORY / "train" / "compare.py"), "--recipe", str(recipe), *flags]
        run(*words, "--output", str(comparison), ranks=2, env={"OMP_NUM_THREADS": "1"})
        rows = EXPERIMENTS[args.name](json.loads((comparison / "comparison.json").read_text()))
        for picture in args.picture:
            name, _, file = picture.partition("=")
            shutil.copy(comparison / f"{name}.png", file)
    for row in rows:
        print(json.dumps(row))
    finish(rows, args.json)


if __name__ == "__main__":
    main()
