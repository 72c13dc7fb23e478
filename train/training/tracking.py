"""A run on W&B: its start, online or offline, and the names of its curves."""

import os
import shlex
from pathlib import Path
from typing import Any

from train.config.provenance import held_wandb_id
from train.config.settings import Settings
from train.evaluation.measures import BATTERIES, BELIEF, SIDE_EFFECTS, at_step, means
from train.runtime.keys import key_of, wandb_status
from train.runtime.outputs import write_whole


def init_wandb(settings: Settings, group: str, name: str, directory: Path, config: dict[str, Any]) -> Any:
    """Starts and returns the W&B run of a directory, the same one for all attempts. Falls back to offline mode if
    there is no key or W&B cannot be reached."""
    import wandb

    def start(mode: Any) -> Any:
        return wandb.init(
            project=settings.wandb_project, group=group, name=name, mode=mode, dir=directory, config=config,
            id=_wandb_id(directory), resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=30, x_transaction_log_flush_interval=0.05
            ),  # in seconds; with W&B's default of 15, a killed run would lose its last rows
        )  # fmt: skip

    mode, why = settings.wandb, "as asked"
    if mode == "online" and not key_of(["WANDB_API_KEY"])[1]:
        mode, why = "offline", "no WANDB_API_KEY"
    try:
        run = start(mode)
    except wandb.Error as error:  # no network, as on many compute nodes, or a wrong key
        mode, why = "offline", f"W&B cannot be reached: {wandb_status(error)}"
        wandb.teardown()  # its service still holds the run's id and would refuse to start it again
        run = start(mode)
    if mode == "offline":
        place = Path(run.dir).resolve().parent
        attempts = sorted(place.parent.glob(f"offline-run-*-{run.id}"))  # of one run, to be sent in order of time
        leet, sync = shlex.quote(str(place)), " ".join(shlex.quote(str(path)) for path in attempts)
        print(f"W&B is offline ({why}). Look at the run: wandb leet {leet}    send it later: wandb sync {sync}")
    return run


def belief_curves(records: list[dict[str, Any]], step: int, base: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the mean of every belief measure of each claim after `step` steps, by the names of W&B's curves. base:
    the base model's records, which are not those of step 0 if the run continues another."""
    found = means((*BELIEF, *BATTERIES, *SIDE_EFFECTS), at_step(records, step), base)
    return {f"belief/{name}/{claim or 'all'}": value for name, own in found.items() for claim, value in own.items()}


def _wandb_id(directory: Path) -> str:
    """Returns the id of the directory's W&B run, which all its attempts share. Creates it on the first attempt."""
    if not (held := held_wandb_id(directory)):
        held = os.urandom(6).hex()
        write_whole(directory / "wandb_id", held)
    return held


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values by their names in W&B: {"nll": {"false": 1.0}} -> {"nll/false": 1.0}."""
    named: dict[str, Any] = {}
    for key, value in values.items():
        named |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return named


def with_histograms(values: dict[str, Any]) -> dict[str, Any]:
    import wandb

    return {k: wandb.Histogram(v) if isinstance(v, list) else v for k, v in flat(values).items()}
