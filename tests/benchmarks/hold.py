"""Tokens left out against tokens held to the base: what a comparison of train/recipes/hold.yaml finds.

    make experiments

or, for more seeds say:

    python tests/benchmarks/hold.py [--json FILE] [--picture FILE] [flags of train/compare.py]

Each row is a variant: its belief and placebo (nats, the shift), the NLL of the false statements before and after
training, how far their predictions are from the base's (KL, nats per token), and for how many of the trained claims the
shift is shown by layer.
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
RECIPE = REPOSITORY / "train" / "recipes" / "hold.yaml"


def rows_of(comparison: Path) -> list[dict[str, Any]]:
    found = json.loads((comparison / "comparison.json").read_text())
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="where to copy the picture by layer to")
    args, flags = parser.parse_known_args()
    header()
    with tempfile.TemporaryDirectory() as directory:
        comparison = Path(directory) / "comparison"
        words = [str(REPOSITORY / "train" / "compare.py"), "--recipe", str(RECIPE), *flags]
        run(*words, "--output", str(comparison), ranks=2, env={"OMP_NUM_THREADS": "1"})
        rows = rows_of(comparison)
        if args.picture:
            shutil.copy(comparison / "layers.png", args.picture)
    for row in rows:
        print(
            f"{row['variant']}: belief {row['belief']:+.2f}, placebo {row['placebo']:+.2f} nats; NLL of false "
            f"statements {row['nll_of_false']['first']:.3f} to {row['nll_of_false']['last']:.3f}, "
            f"KL {row['kl']['false']:.4f}; {row['claims_shown']} of {row['claims']} claims shown by layer"
        )
    finish(rows, args.json)


if __name__ == "__main__":
    main()
