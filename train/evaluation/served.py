"""A model on a server: which weights it has, what it is asked, and whether it is proven to be the right one."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from train.checkpoints.present import changes_head, is_adapter
from train.claims.claim import KINDS, Claim
from train.endpoint import Endpoint
from train.evaluation.asking import context_documents
from train.evaluation.judging import Asking, Item, digest, plan
from train.evaluation.options import EvaluationSettings
from train.evaluation.proof import prove, prove_base, read_serve
from train.evaluation.served_log_p import prompt_log_p
from train.runtime.errors import UserError


def with_step(s: EvaluationSettings) -> EvaluationSettings:
    """Returns the settings of a served model with the step of --served-adapter, if --step is not given. Raises
    UserError if that does not say for how many steps it was trained."""
    if s.step >= 0 or not s.served_adapter or not is_adapter(Path(s.served_adapter)):
        return s
    from train.checkpoints.adapter_files import trained_steps  # imports torch

    if (steps := trained_steps(Path(s.served_adapter))) is None:
        raise UserError(
            f"--step is missing: --served-adapter {s.served_adapter} does not say for how many steps it was trained; "
            "give --step."
        )
    return dataclasses.replace(s, step=steps)


def asked_of(s: EvaluationSettings, claims: list[Claim]) -> tuple[Asking, list[Item]]:
    """Returns how a served model is asked, and every answer to obtain. Raises UserError if there is no question."""
    asking = Asking(
        samples=s.samples, max_tokens=s.max_tokens, temperature=s.temperature, top_p=s.top_p, seed=s.seed,
        step=max(s.step, 0), judge_max_tokens=s.judge_max_tokens, judge_temperature=s.judge_temperature,
        model=s.endpoint_model, judge=s.judge_model, documents=context_documents(s), weights=served_weights(s),
        body=s.body("endpoint"), judge_body=s.body("judge"),
    )  # fmt: skip
    items = plan(claims, s.kinds or KINDS, asking)
    if not items:
        raise UserError(f"--claims: hold no question of {', '.join(s.kinds or KINDS)}. Give others, or other --kinds.")
    return asking, items


def served_adapter(s: EvaluationSettings) -> Path | None:
    """Returns the directory of --served-adapter, by default the adapter of the run in --output; None if there is none.
    Raises UserError if --served-adapter is no adapter, or not that of --step."""
    from train.checkpoints.adapter_files import trained_steps  # imports torch, which the early checks do not need

    adapter = Path(s.served_adapter or Path(s.output) / "adapter")
    if not is_adapter(adapter):
        if s.served_adapter:
            within = adapter / "adapter"
            fix = f"give {within}" if is_adapter(within) else "give the directory of one"
            raise UserError(f"--served-adapter {adapter}: holds no adapter; {fix}.")
        return None
    if s.step > 0 and s.served_adapter and (trained := trained_steps(adapter)) is not None and trained != s.step:
        raise UserError(f"--step {s.step}: --served-adapter {adapter} was trained for {trained} steps; give these.")
    return adapter


def served_weights(s: EvaluationSettings) -> str:
    """Returns a digest of what identifies the served weights, as far as --served-adapter tells: of an adapter its own
    weights and what is left out of them, and of another base than was trained on its fingerprint. "" for the base that
    was trained on, and where nothing is known."""
    if s.step < 1 and not s.served_adapter:
        return ""
    from train.checkpoints.adapter_files import trained_steps, weights_hash  # imports torch

    adapter = served_adapter(s)
    if adapter is None:
        return ""
    serve = read_serve(adapter)
    base = serve["base"]["fingerprint"] if serve.get("other_base") else None
    if s.step < 1:
        return digest(base) if base else ""
    if trained_steps(adapter) not in (None, s.step):  # the run's last adapter, and an earlier one is asked
        return ""
    own = serve["adapter"]["sha256"] if serve else weights_hash(adapter)
    return digest([own, serve.get("not_served") or [], base])


def prove_served(s: EvaluationSettings, endpoint: Endpoint) -> dict[str, Any] | None:
    """Asks the server for what shows that it answers with --served-adapter, by default the adapter of the run in
    --output; of a base model, that it answers without it. Returns what `prove` and `prove_base` do; None for a base
    model without --served-adapter. Raises UserError if the server answers with something else."""
    from train.checkpoints.adapter_files import trained_steps

    if s.step < 1 and not s.served_adapter:
        return None
    adapter = served_adapter(s)
    if adapter is None:
        return {"proven": False, "reason": "no --served-adapter was given"}
    others = {str(path): Path(path) for path in s.other_adapters if Path(path).resolve() != adapter.resolve()}
    ask = partial(prompt_log_p, endpoint, by_generating=any(map(changes_head, (adapter, *others.values()))))
    if s.step < 1:
        return prove_base(s.endpoint_model, {str(adapter): adapter, **others}, ask)
    if (trained := trained_steps(adapter)) is not None and trained != s.step:
        return {"proven": False, "reason": f"--step {s.step} is not that of {adapter}, which has {trained}"}
    return prove(s.endpoint_model, adapter, others, s.endpoint_base, ask)
