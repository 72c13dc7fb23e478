"""How often a difference that is 0 in truth is said to differ, and how often 95 % intervals hold it, by simulation.

    python -m tests.comparison.coverage [--units 1 2 3 …] [--seeds 1 2 3 …] [--simulations N] [--json FILE]

Each number of units (claims, of 3 questions; with --one-claim questions of a single claim) and of seeds is simulated in
20 shapes: 5 kinds of tails × 4 mixtures of what differs; "most" and "least" are those of the worst. Claims have unequal
variances, and the questions about one share its luck. Beside ours stands a percentile bootstrap over the same units.
What cannot be known is not simulated: with one seed the truth is that of the models trained, with one claim that of the
claim, with one question that of the question.

Shapes: N simulations, S seeds, C claims, Q questions, U units, B draws.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from train.comparison.significance import LEVEL, Sampled, crossed
from train.comparison.units import Units

QUESTIONS = 3
TAILS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy": lambda rng, shape: rng.standard_t(2, size=shape),
    "light": lambda rng, shape: rng.uniform(-1, 1, size=shape),
    "two values": lambda rng, shape: rng.choice([-1.0, 1.0], size=shape),
    "mostly 0": lambda rng, shape: rng.choice([-1.0, 0.0, 0.0, 0.0, 1.0], size=shape),  # as preferences are
}
MIXTURES = {
    "claims": (1.0, 0.5, 0.0, 0.5),
    "claims and seeds": (1.0, 0.5, 0.7, 0.5),
    "seeds": (0.1, 0.1, 1.0, 0.1),
    "answers": (0.0, 0.0, 0.0, 1.0),
}
"""What differs: the scale of claims, of questions within a claim, of seeds, of single answers."""


def gaps(
    rng: np.random.Generator, tails: str, mixture: str, simulations: int, seeds: int, claims: int, questions: int
) -> np.ndarray:
    """[N, S, U]: differences of two variants that do not differ, for each seed and claim, or question of one claim."""
    of_claims, of_questions, of_seeds, of_answers = MIXTURES[mixture]
    draw, N = TAILS[tails], simulations
    spread = np.exp(rng.normal(size=(N, 1, claims, 1)))  # unequal variances
    gap = of_answers * draw(rng, (N, seeds, claims, questions))
    if claims * questions > 1:
        gap = gap + of_questions * spread * draw(rng, (N, 1, claims, questions))
    if claims > 1:
        gap += of_claims * spread * draw(rng, (N, 1, claims, 1))
    if seeds > 1:
        gap += of_seeds * draw(rng, (N, seeds, 1, 1))
    return gap.mean(3) if claims > 1 else gap[:, :, 0]


def bootstrapped(rng: np.random.Generator, table_NSU: np.ndarray, draws: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Low and high of each simulation: percentiles of draws of units and seeds with replacement."""
    share_BS, share_BU = (rng.multinomial(n, np.full(n, 1 / n), size=draws) / n for n in table_NSU.shape[1:])
    draw_NB = np.einsum("bs,nsu,bu->nb", share_BS, table_NSU, share_BU, optimize=True)
    low, high = np.quantile(draw_NB, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    return low, high


def measure(sampled: Sampled) -> dict[str, float]:
    """Shares of simulations: p below 1 − LEVEL; and, of those whose units differ, the interval holds 0."""
    reach = sampled.reach()
    held = abs(sampled.estimate)[reach > 0] <= reach[reach > 0]
    return {"p": float((sampled.p() < 1 - LEVEL).mean()), "held": float(held.mean()) if held.size else np.nan}


def cell(seeds: int, claims: int, questions: int, simulations: int, bootstrap: bool = True) -> list[dict[str, Any]]:
    """A row for each shape. differs: the share of verdicts "differs"."""
    units = Units("claims", claims, seeds) if claims > 1 else Units("questions", questions, seeds)
    rows = []
    for tails, mixture in itertools.product(TAILS, MIXTURES):
        rng = np.random.default_rng([seeds, claims, questions])
        table_NSU = gaps(rng, tails, mixture, simulations, seeds, claims, questions)
        own = measure(crossed(table_NSU))
        row = {"of": units.of, "units": units.number, "seeds": seeds, "tails": tails, "mixture": mixture} | own
        row["differs"] = 0.0 if units.too_few else own["p"]
        if bootstrap:
            low, high = bootstrapped(rng, table_NSU)
            held = ((low <= 0) & (high >= 0))[low < high]
            row["bootstrap_held"] = float(held.mean()) if held.size else np.nan
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="+", default=range(1, 13), metavar="N")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(1, 13), metavar="N")
    parser.add_argument("--one-claim", action="store_true", help="units are the questions of one claim")
    parser.add_argument("--simulations", type=int, default=4000, metavar="N")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows = []
    of = "questions" if args.one_claim else "claims"
    print(f"| {of} | seeds | “differs”, most | p < .05, most | intervals that hold 0 | a percentile bootstrap's |")
    print("|---:|---:|---:|---:|---:|---:|")
    for seeds, units in tqdm([*itertools.product(args.seeds, args.units)], disable=None, leave=False):
        claims, questions = (1, units) if args.one_claim or units == 1 else (units, QUESTIONS)
        own = cell(seeds, claims, questions, args.simulations)
        rows += own
        differs, p = (max(row[name] for row in own) for name in ("differs", "p"))
        cells = [f"{100 * differs:.1f} %" if differs else "–", f"{100 * p:.1f} %"]
        cells += [_shares([row[name] for row in own]) for name in ("held", "bootstrap_held")]
        tqdm.write(f"| {units} | {seeds} | {' | '.join(cells)} |")
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def _shares(shares: list[float]) -> str:
    """The mean of all shapes and the least; of those in which there is an interval."""
    there = [share for share in shares if not np.isnan(share)]
    return f"{100 * np.mean(there):.1f} % (least {100 * min(there):.1f} %)" if there else "–"


if __name__ == "__main__":
    main()
