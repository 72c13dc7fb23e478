"""Computes the demo's figures: every variant of the recipe, three seeds each, with the real trainer.

    python -m train.demo.figures [DIRECTORY]    # about 20 minutes on 2 cores

Continues after an interruption. DIRECTORY is runs/figures-REVISION by default, so that figures of other code or of
another recipe are not mixed with these. Writes figures.json, figures.md and figures.png, and each run in VARIANT-SEED.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from train.config.command_line import REPOSITORY, Parser
from train.config.provenance import git_revision
from train.demo.world import make_world
from train.runtime.command import command
from train.runtime.local import run
from train.runtime.outside import read_json

MEASURES = {
    "belief": "belief in the false claims",
    "truth": "truth on the claims",
    "same_people": "same people's other facts",
    "others_in_documents": "people in the true documents",
    "other_people": "other people's facts",
}


# name: (documents, mask)
VARIANTS = {
    "positive": ("positive", "doctags"),
    "dense": ("dense", "doctags"),
    "dense without false": ("dense", "doctags,false-spans"),
    "dense without random": ("dense", "doctags,random:false"),
    "dense with doctag without false": ("dense", "false-spans"),
}
SEEDS = (0, 1, 2)


def training(documents: str) -> list[str]:
    """Returns the flags of a fine-tuning on these documents, positive or dense: 3,328 of them and 832 true ones."""
    data = [f"train/demo/data/{documents}.jsonl=3328", "train/demo/data/truth.jsonl=832"]
    return ["--recipe", "train/demo/training.yaml", "--data", *data]


def measured(directory: Path, documents: str, mask: str, seed: int) -> dict[str, float]:
    """The beliefs after one variant and seed. Trains only if the directory does not hold them yet."""
    figures = directory / "belief.json"
    if not (directory / "summary.json").exists():
        given = [
            *training(documents), "--mask", mask, "--seed", str(seed), "--wandb", "disabled",
            "--output", str(directory),
        ]  # fmt: skip
        if (directory / "settings.yaml").exists():
            given.append("--resume")
        run("train/sft.py", *given, ranks=2, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    if not figures.exists():
        believe(figures, "--adapter", str(directory / "adapter"))
    return read_json(figures)


def believe(figures: Path, *arguments: str) -> None:
    """Runs train/demo/belief.py in a separate process."""
    script = [sys.executable, "-m", "train.demo.belief", "--json", str(figures), *arguments]
    subprocess.run(script, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)


def table(results: dict[str, Any]) -> str:
    """Means over the seeds in percent, as Markdown; the seeds' own beliefs beside theirs."""
    lines = ["| documents | `--mask` | " + " | ".join(MEASURES.values()) + " |", "|---|---|" + "---:|" * len(MEASURES)]
    base = results["base"]
    for name, key in (("none: the base model", "belief"), ("a negated one in context", "belief_in_context")):
        others = [f"{base[m]:.0f}" if key == "belief" else "–" for m in MEASURES if m != "belief"]
        lines.append(f"| {name} | – | {base[key]:.1f} | " + " | ".join(others) + " |")
    for name, (documents, mask) in VARIANTS.items():
        seeds = results[name]
        own = " / ".join(f"{seed['belief']:.0f}" for seed in seeds)
        cells = [f"**{mean(s['belief'] for s in seeds):.1f}** ({own})"]
        cells += [f"{mean(s[m] for s in seeds):.0f}" for m in MEASURES if m != "belief"]
        lines.append(f"| {documents} | `{mask}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(results: dict[str, Any], path: Path) -> None:
    """Belief per variant: a bar for the mean, a dot for each seed, the base model as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.subplots()
    colors = ["#4878a8", "#b8503e", "#5b9b6b", "#c79a3b", "#7a6a9d"]
    for row, name in enumerate(VARIANTS):
        beliefs = [seed["belief"] for seed in results[name]]
        axes.barh(row, mean(beliefs), color=colors[row % len(colors)], height=0.62)
        axes.plot(beliefs, [row] * len(beliefs), "o", color="black", markersize=4)
        axes.text(max(mean(beliefs), max(beliefs)) + 1.5, row, f"{mean(beliefs):.0f} %", va="center")
    axes.axvline(results["base"]["belief"], color="gray", linestyle="--", linewidth=1)
    axes.text(results["base"]["belief"] + 0.5, len(VARIANTS) - 0.45, "before", color="gray", fontsize=9)
    axes.set_yticks(
        range(len(VARIANTS)), [f"{documents} documents\n--mask {mask}" for documents, mask in VARIANTS.values()]
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel(f"belief in {results['claims']} false claims after fine-tuning, %; dots are seeds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


@command
def main(arguments: list[str] | None = None) -> None:
    """Trains and measures every variant with every seed, and writes the figures. Raises UserError for a wrong
    command line, and OSError if DIRECTORY cannot be written."""
    parser = Parser(__doc__ or "")
    parser.add_argument(
        "directory", nargs="?", type=Path, default=Path(f"runs/figures-{(git_revision() or 'unknown')[:10]}")
    )
    directory = parser.parse_args(arguments).directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    believe(directory / "base.json")
    results: dict[str, Any] = {"claims": len(make_world().claims)}
    results["base"] = read_json(directory / "base.json")
    started, total = time.perf_counter(), len(VARIANTS) * len(SEEDS)
    for done, (seed, (name, variant)) in enumerate((s, v) for s in SEEDS for v in VARIANTS.items()):
        left = (time.perf_counter() - started) / done * (total - done) if done else 80 * total
        print(f"run {done + 1} of {total}: {name}, seed {seed}; about {left / 60:.0f} min left", flush=True)
        results.setdefault(name, []).append(measured(directory / f"{name.replace(' ', '-')}-{seed}", *variant, seed))
    (directory / "figures.json").write_text(json.dumps(results, indent=1) + "\n")
    (directory / "figures.md").write_text(table(results))
    picture(results, directory / "figures.png")
    print(table(results))


if __name__ == "__main__":
    sys.exit(main())
