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


NO_LOG_P = "the server gives no log-probabilities of prompts"
APPLIED = 4  # one distance is clearly less than another if it is less than this part of it
LEAST_EFFECT = 0.05  # nats per token that an adapter must be from its base to be told from others on its own prompts


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
    `to_nearest_other` and its name, `noise` (the server against itself), `base_to_base` (the server's base against
    the engine's) and `to_served_base`; also `not_served`, modules that were left out on purpose, and `other_base`, if
    there are any.

    Raises UserError if what answers is nearer to the base or to another variant than to the adapter, or is the server's
    own base.
    """
    serve, proof = read_serve(adapter), read_proof(adapter)
    left_out = {"not_served": serve["not_served"]} if serve.get("not_served") else {}
    if serve.get("other_base"):
        reason = "it is served on another base than it was trained on"
        return {"proven": False, "reason": reason, "other_base": True, **left_out}
    if proof is None:
        return {"proven": False, "reason": f"{adapter} has no {PROOF}: it was not made by train/sft.py", **left_out}
    first, second = (ask(name, proof.tokens) for _ in range(2))
    if first is None or second is None:
        return {"proven": False, "reason": NO_LOG_P, **left_out}
    base = ask(base_name, proof.tokens) if base_name else None
    if base_name and base is None:
        raise UserError(f"--endpoint-base {base_name}: the server has no such model; give its name of the base.")
    found: dict[str, Any] = {
        "proven": True, "to_adapter": distance(first, proof.adapter), "to_base": distance(first, proof.base),
        "noise": distance(first, second), "base_to_base": distance(base, proof.base) if base else None, **left_out,
    }  # fmt: skip
    if base:
        found["to_served_base"] = distance(first, base)
    rivals = {other: held for other, path in others.items() if (held := read_proof(path))}
    same = {other: held for other, held in rivals.items() if held.tokens == proof.tokens}
    elsewhere = _elsewhere(name, {other: held for other, held in rivals.items() if other not in same}, ask)
    apart = {other: distance(first, held.adapter) for other, held in same.items()} or elsewhere
    if apart:
        nearest = min(apart, key=lambda other: apart[other])
        found |= {"nearest_other": nearest, "to_nearest_other": apart[nearest]}
    where = f"--endpoint-model {name}: the answering model is {found['to_adapter']:.3g} nats per token from {adapter}"
    reason = _without_adapter(found, proof, where) or _another_variant(found, proof, same, elsewhere, where)
    return found | ({"proven": False, "reason": reason} if reason else {})


def _without_adapter(found: dict[str, Any], proof: Proof, where: str) -> str:
    """Returns why the distances do not tell whether the adapter is applied; "" if they tell that it is. Raises
    UserError if it is not."""
    own, effect = found["noise"], distance(proof.base, proof.adapter)
    noise = max(own, found["base_to_base"] or 0.0)
    check = "Check that it was loaded under this name, in the form that the server takes (train/export.py --adapter …)."
    moved = found.get("to_served_base")
    left_out = bool(found.get("not_served"))  # on purpose: little may be left
    if moved is not None and moved < effect / APPLIED and effect > APPLIED * own and (moved <= own or not left_out):
        raise UserError(
            f"{where}, and {moved:.3g} from the server's own base, from which the adapter is {effect:.3g} away: the "
            f"server answers without the adapter. {check}"
        )
    if effect <= noise:
        reason = f"adapter and base are {effect:.3g} nats per token apart, no more than the noise of the server"
        return reason + (f", whose base is {noise:.3g} from the one that was trained on" if noise > own else "")
    if found["to_base"] <= found["to_adapter"]:
        if left_out:
            return f"it is nearer to the base than to the adapter, without {', '.join(found['not_served'])}"
        raise UserError(
            f"{where}, and {found['to_base']:.3g} from its base: the server answers without the adapter. {check}"
        )
    return ""


def _another_variant(
    found: dict[str, Any], proof: Proof, same: Mapping[str, Proof], elsewhere: Mapping[str, float], where: str
) -> str:
    """Returns why the distances do not tell the adapter from the nearest other variant, or why not all of it seems to
    be applied; "" if they tell that it is. same: variants with the same prompts. elsewhere: the distance of each other
    one that the answering model seems to be, on its own prompts. Raises UserError if another variant answers."""
    noise, to_adapter = max(found["noise"], found["base_to_base"] or 0.0), found["to_adapter"]
    another = "the server has another variant under this name. Start it again with the right --lora-modules."
    if same:
        nearest, apart = found["nearest_other"], found["to_nearest_other"]
        between = distance(proof.adapter, same[nearest].adapter)
        # Without the server's base, how far its precision alone takes it from the engine is not known.
        known = found["base_to_base"] is not None
        if between > noise and apart < (to_adapter if known else to_adapter / APPLIED):
            raise UserError(f"{where}, and {apart:.3g} from that of {nearest}: {another}")
        if between <= (noise if known else max(noise, to_adapter)):
            return f"the adapter is {between:.3g} nats per token from that of {nearest}, within the server's noise"
    for other, apart in elsewhere.items():
        if apart + noise < to_adapter:
            raise UserError(f"{where}, and on the prompts of {other} {apart:.3g} from that: {another}")
    if to_adapter > max(2 * noise, (effect := distance(proof.base, proof.adapter)) / 2):
        return (
            f"it is {to_adapter:.3g} nats per token from the adapter, which is only {effect:.3g} from its base: the "
            "server does not apply all of it"
        )
    return ""


def prove_base(name: str, adapters: Mapping[str, Path], ask: Asked) -> dict[str, Any]:
    """Asks a server for the prompts of the first of some adapters, and returns what evaluation.json keeps of the base.

    name: under which the server has the base. adapters: name -> adapter of the variants, as for `prove`. The result has
    `proven` or a `reason`, `to_base`, `noise`, and `to_nearest_other` and its name. Raises UserError if what answers is
    clearly nearer to an adapter than to the base.
    """
    if any(read_serve(path).get("other_base") for path in adapters.values()):
        return {"proven": False, "reason": "it is another base than the adapters were trained on", "other_base": True}
    proofs = {other: held for other, path in adapters.items() if (held := read_proof(path))}
    if not proofs:
        return {"proven": False, "reason": f"no adapter has a {PROOF}"}
    proof = next(iter(proofs.values()))
    first, second = (ask(name, proof.tokens) for _ in range(2))
    if first is None or second is None:
        return {"proven": False, "reason": NO_LOG_P}
    same = {other: held for other, held in proofs.items() if held.tokens == proof.tokens}
    apart = {other: distance(first, held.adapter) for other, held in same.items()}
    effects = {other: distance(proof.base, held.adapter) for other, held in same.items()}
    to_base, noise = distance(first, proof.base), distance(first, second)
    nearest = min(apart, key=lambda other: apart[other])
    if APPLIED * apart[nearest] < to_base and effects[nearest] > APPLIED * noise:
        raise UserError(
            f"--endpoint-model {name}: the answering model is {to_base:.3g} nats per token from the base, and "
            f"{apart[nearest]:.3g} from the adapter of {nearest}: the server does not answer with the base. Start it "
            "again with the right model."
        )
    found: dict[str, Any] = {
        "proven": True, "to_base": to_base, "noise": noise, "nearest_other": nearest,
        "to_nearest_other": apart[nearest],
    }  # fmt: skip
    if max(effects.values()) <= 2 * max(to_base, noise):
        reason = (
            f"the server's base is {to_base:.3g} nats per token from the one that was trained on, and no adapter is "
            f"more than {max(effects.values()):.3g} from it"
        )
        return found | {"proven": False, "reason": reason}
    return found


def _elsewhere(name: str, rivals: Mapping[str, Proof], ask: Asked) -> dict[str, float]:
    """Returns, of the variants with other prompts, those that the answering model seems to be, with its distance from
    them on these prompts: those that it is much nearer to than their base is. Variants that were trained on the same
    documents have the same prompts, which are asked once."""
    answers: list[tuple[list[list[int]], LogP]] = []
    found = {}
    for other, held in rivals.items():
        given = next((given for tokens, given in answers if tokens == held.tokens), None)
        if given is None:
            given = ask(name, held.tokens) or []
            answers.append((held.tokens, given))
        effect = distance(held.base, held.adapter)
        if given and effect > LEAST_EFFECT and (apart := distance(given, held.adapter)) < effect / APPLIED:
            found[other] = apart
    return found


def read_serve(adapter: Path) -> dict[str, Any]:
    """Returns the serve.json of an adapter as it was written for a server; {} for another adapter."""
    return read_json(adapter / SERVE) if (adapter / SERVE).is_file() else {}


def proof_line(proof: Mapping[str, Any]) -> str:
    """Returns a sentence that says what `prove` or `prove_base` found."""
    if not proof["proven"]:
        return f"unproven that the server answers with the right model: {proof['reason']}"
    noise = f"the server is {proof['noise']:.3g} from itself"
    if "to_adapter" not in proof:
        return (
            f"the server answers with the base: {proof['to_base']:.3g} nats per token from it, "
            f"{proof['to_nearest_other']:.3g} from {proof['nearest_other']} ({noise})"
        )
    return (
        f"the server answers with the adapter: {proof['to_adapter']:.3g} nats per token from it, "
        f"{proof['to_base']:.3g} from the base ({noise})"
    )
