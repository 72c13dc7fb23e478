"""The evaluation of one model in the training engine, for train/evaluate.py --model."""

import dataclasses
import sys
from pathlib import Path

from train.claims.claim import KINDS, Claim
from train.claims.contamination import Contamination
from train.evaluation.asking import context_documents, judge_of
from train.evaluation.in_engine import Measured, check_scored, identify, keep, prepare_measuring, steps_of
from train.evaluation.judging import Asking, check_same, evaluate, plan
from train.evaluation.options import EvaluationSettings
from train.evaluation.results import leave_summary
from train.evaluation.store import Records
from train.model.engine import DefaultExpertParallel
from train.runtime.command import launched_as


class Evaluation:
    """The evaluation of one model in the training engine. Every rank has one; that of rank 0 holds the records."""

    def __init__(self, s: EvaluationSettings, claims: list[Claim], expert_parallel: DefaultExpertParallel):
        """Checks all but the directory and the judge, before a weight is read. expert_parallel: decides where the
        settings do not. Raises UserError if a setting, a document, the model or the adapter is wrong."""
        _, ranks = launched_as()
        documents, settings = context_documents(s), s.of_the_engine()
        self.measuring = prepare_measuring(settings, claims, documents, ranks, expert_parallel)
        self.base, self.model = identify(settings, self.measuring.checkpoint)
        self.step, self.context = steps_of(s.one_adapter, s.step), len(documents)
        self.s = dataclasses.replace(s, step=self.step)
        self.asking = Asking(
            samples=s.samples, max_tokens=s.max_tokens, temperature=s.temperature, top_p=s.top_p, seed=s.seed,
            step=self.step, judge_max_tokens=s.judge_max_tokens, judge_temperature=s.judge_temperature,
            model=self.model, judge=s.judge_model, judge_body=s.body("judge"), documents=documents,
        )  # fmt: skip
        self.items = plan(claims, s.kinds or (KINDS if s.judge else ()), self.asking)
        self.judge = judge_of(self.s, self.items)
        self.records: Records | None = None  # rank 0's, given later

    def check(self) -> None:
        """Raises UserError if the directory holds answers or scores of another model, or if the judge cannot be
        asked."""
        if not self.records:
            return
        print(*(f"{note}\n" for note in self.measuring.probes.notes()), sep="", end="", file=sys.stderr)
        check_same(self.items, self.records)
        adapter = self.s.one_adapter
        own = bool(adapter) and self.records.directory.resolve() in Path(adapter).resolve().parents
        check_scored(self.records, self.step, self.context, self.model, own)
        if self.step:
            check_scored(self.records, 0, self.context, self.base, own)
        if self.judge:
            self.judge.check()

    def measure(self, model: Measured) -> None:
        """Does all that needs the model: scores it and has it answer questions. model: loaded for this evaluation."""
        scored = {0: (model.likelihoods_of_base(), self.base)} if self.step else {}
        scored[self.step] = model.likelihoods(), self.model
        for at, (found, scored_model) in scored.items():
            if self.records:
                keep(self.records, found, at, self.context, scored_model)
        if self.items:
            model.answer(self.items, self.records, self.asking)

    def finish(self, contamination: Contamination | None) -> bool:
        """Has the answers judged and writes the summary. Returns whether some answers have no verdict. Only for rank
        0."""
        assert self.records
        try:
            if self.items:
                evaluate(self.items, None, self.judge, self.records, self.asking)
        finally:
            incomplete = bool(leave_summary(self.s, self.items, self.records, contamination))
        return incomplete
