"""Shows that a server answers with the adapter that was trained.

When an adapter is kept, the training engine measures log p of every token of eight prompts, by the base and by the
adapter, and keeps them with it in proof.json (proof_by_engine.py). A server is asked for the same. It is refused if
what answers is nearer to the base, or to the adapter of another variant, than to the adapter: with a wrong name or
prefix, servers load an adapter without an error and apply none of it.

The prompts are the beginnings of the first documents of the training data: there the adapter differs most from its
base, and one variant from another. The distance of two models is the mean over tokens of |log p − log p|, in nats.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoints.present import PROOF, SERVE
from train.runtime.errors import UserError
from train.runtime.outside import checked, read_json

LogP = list[list[float]]
"""For each prompt, log p of every token but the first, each given the tokens before it, in nats."""
Asked = Callable[[str, list[list[int]]], LogP | None]
"""Asks a server: the model's name and the prompts' token ids -> their log p, or None if it does not give them."""


@dataclass(frozen=True)
class Proof:
    """The content of proof.json."""

    tokens: list[list[int]]
    base: LogP
    adapter: LogP


def read_proof(adapter: Path) -> Proof | None:
    """Returns the proof of an adapter; None if it has none. Raises UserError if the file is damaged."""
    path = adapter / PROOF
    if not path.is_file():
        return None
    held = read_json(path)
    checked(held, {"tokens": list, "base": list, "adapter": list}, path, needed=True)
    proof = Proof(held["tokens"], held["base"], held["adapter"])
    whole = all(isinstance(row, list) for part in (proof.tokens, proof.base, proof.adapter) for row in part)
    if not whole or not all(
        [len(row) for row in part] == [len(row) - 1 for row in proof.tokens] for part in (proof.base, proof.adapter)
    ):
        raise UserError(f"{path}: is damaged: it must have log p of every token but the first. Restore the file.")
    return proof


def distance(one: LogP, other: LogP) -> float:
    """Returns the mean over all tokens of |log p − log p|, in nats."""
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def prove(name: str, adapter: Path, others: Mapping[str, Path], base_name: str, ask: Asked) -> dict[str, Any]:
    """Asks a server for the prompts of an adapter, and returns what evaluation.json keeps of it.

    name: under which the server has the adapter. adapter: its directory, or that of the adapter as it was written for
    the server, whose serve.json says what is not served. others: name -> adapter of the other variants. base_name:
    under which it has the base, "" if that is not known.

    The result has `proven`, or a `reason` why it is unproven, and the distances in nats: `to_adapter`, `to_base`,
    `to_nearest_other` and its name, `noise` (the server against itself) and `base_to_base` (the server's base against
    the engine's); also `not_served`, modules that were left out on purpose, and `other_base`, if there are any.

    Raises UserError if what answers is nearer to the base or to another variant than to the adapter.
    """
    proof = read_proof(adapter)
    serve = read_json(adapter / SERVE) if (adapter / SERVE).is_file() else {}
    if serve.get("other_base"):
        return {"proven": False, "reason": "it is served on another base than it was trained on", "other_base": True}
    if proof is None:
        return {"proven": False, "reason": f"{adapter} has no {PROOF}: it was not made by train/sft.py"}
    first, second = (ask(name, proof.tokens) for _ in range(2))
    if first is None or second is None:
        return {"proven": False, "reason": "the server gives no log-probabilities of prompts"}
    base = ask(base_name, proof.tokens) if base_name else None
    found: dict[str, Any] = {
        "proven": True, "to_adapter": distance(first, proof.adapter), "to_base": distance(first, proof.base),
        "noise": distance(first, second), "base_to_base": distance(base, proof.base) if base else None,
    }  # fmt: skip
    if serve.get("not_served"):
        found["not_served"] = serve["not_served"]
    rivals = {other: held for other, path in others.items() if (held := read_proof(path))}
    apart = {other: distance(first, held.adapter) for other, held in rivals.items() if held.tokens == proof.tokens}
    if apart:
        nearest = min(apart, key=lambda other: apart[other])
        found |= {"nearest_other": nearest, "to_nearest_other": apart[nearest]}
    noise = max(found["noise"], found["base_to_base"] or 0.0)
    if (effect := distance(proof.base, proof.adapter)) <= noise:
        reason = f"adapter and base are {effect:.3g} nats per token apart, no more than the noise of the server"
        return found | {"proven": False, "reason": reason}
    where = f"--endpoint-model {name}: the answering model is {found['to_adapter']:.3g} nats per token from {adapter}"
    if found["to_base"] <= found["to_adapter"]:
        raise UserError(
            f"{where}, and {found['to_base']:.3g} from its base: the server answers without the adapter. Check that it "
            "was loaded under this name, in the form that the server takes (train/export.py --adapter … --to …)."
        )
    if apart and (between := distance(proof.adapter, rivals[nearest].adapter)) <= noise:
        reason = f"the adapter is {between:.3g} nats per token from that of {nearest}, no more than the server's noise"
        return found | {"proven": False, "reason": reason}
    if apart and apart[nearest] < found["to_adapter"]:
        raise UserError(
            f"{where}, and {apart[nearest]:.3g} from that of {nearest}: the server has another variant under this "
            "name. Start it again with the right --lora-modules."
        )
    return found


def proof_line(proof: Mapping[str, Any]) -> str:
    """Returns a sentence that says what `prove` found."""
    if not proof["proven"]:
        return f"unproven that the server answers with the adapter: {proof['reason']}"
    noise = f"the server is {proof['noise']:.3g} from itself"
    return (
        f"the server answers with the adapter: {proof['to_adapter']:.3g} nats per token from it, "
        f"{proof['to_base']:.3g} from the base ({noise})"
    )
