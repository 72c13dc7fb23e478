"""Every setting of train/evaluate.py: the command line and its checks."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from train.belief.claims import KINDS
from train.command_line import Parser, setting
from train.data.documents import DOCTAG, marker
from train.data.tokenizer import TEMPLATE_TIME, template_time
from train.errors import UserError
from train.formats import Unreadable, parse_json
from train.keys import shown_url
from train.settings import Settings

# As in the paper's main results, for models whose chat template has the switch.
NO_THINKING = '{"chat_template_kwargs": {"enable_thinking": false}}'
OF_THE_ENGINE = ("model", "adapter", "method", "expert_parallel", "micro_batch_tokens", "bos", "held_out", "timeout",
                 "template_time")  # fmt: skip
OF_THE_ENDPOINT = ("endpoint_model", "endpoint_concurrency", "endpoint_timeout", "endpoint_body")
DECIDED_ELSEWHERE = {"model", "messages", "max_tokens", "temperature", "top_p", "seed", "n", "stream"}


@dataclass(kw_only=True)
class EvaluationSettings:
    """The defaults of sampling are the paper's."""

    model: str = setting("", "DIR: base model to measure in the training engine")
    adapter: str = setting("", "DIR: a run's adapter on it, or a comparison's directory: those of its runs")
    method: str = setting("lora", "experts as on disk, or in NF4", choices=("lora", "qlora"))
    expert_parallel: int = setting(0, "ranks that divide a layer's experts; 0: as in training")
    micro_batch_tokens: int = setting(10_000, "tokens of texts per forward of one rank")
    bos: bool = setting(False, "put the tokenizer's BOS before each text or chat that does not begin with it")
    template_time: str = setting(
        TEMPLATE_TIME.isoformat(), "what chat templates are told that ask for the time, as in training"
    )
    held_out: str = setting("", "FILE: documents whose NLL is measured")
    timeout: float = setting(1800, "seconds without progress on any rank, after which all end with their stacks")

    claims: list[str] = setting((), "PATH…: YAML files, directories of claims", many=True)  # noqa: RUF009
    output: str = setting("", "DIR for evaluation.jsonl and evaluation.json; a run's directory, say")
    kinds: list[str] = setting(  # noqa: RUF009
        (), "questions to be answered; default: all (with --model: where there is a --judge)", KINDS, many=True
    )
    samples: int = setting(5, "answers to each question")
    max_tokens: int = setting(5000, "tokens of an answer at most")
    temperature: float = setting(0.7, "of the answers")
    top_p: float = setting(0.8, "of the answers")
    seed: int = setting(0, "of sampling, and of which documents are in context")
    step: int = setting(-1, "optimizer steps that the model was trained for; -1: what the adapter's run says, or 0")
    documents: list[str] = setting((), "FILE=N…: put N documents in context", many=True)  # noqa: RUF009
    doctag: str = setting(DOCTAG, "marker that --documents start with, left out of the context; none: nothing is")
    training_data: list[str] = setting(  # noqa: RUF009
        (), "FILE…: look in these documents for what is asked", many=True
    )

    endpoint: str = setting("", "base URL of the model's server, such as http://localhost:8000/v1")
    endpoint_model: str = setting("", "the model's name there, or its adapter's")
    endpoint_concurrency: int = setting(8, "requests at once")
    endpoint_timeout: float = setting(600.0, "seconds for one answer")
    endpoint_body: str = setting("", f"JSON: more keys of each request, e.g. {NO_THINKING}")
    judge: str = setting("", "base URL of the judge's server")
    judge_model: str = setting("", "the judge's name there")
    judge_concurrency: int = setting(8, "requests at once")
    judge_timeout: float = setting(300.0, "seconds for one verdict")
    judge_body: str = setting("", "JSON: more keys of each request")
    judge_max_tokens: int = setting(6000, "tokens of a verdict at most")
    judge_temperature: float = setting(1.0, "of the verdicts")
    retries: int = setting(8, "of a request, each after twice the pause")

    def of_the_engine(self) -> Settings:
        """What the training engine needs of them."""
        return Settings(**{name: getattr(self, name) for name in OF_THE_ENGINE})

    def body(self, whose: str) -> dict[str, Any] | None:
        """--endpoint-body or --judge-body. UserError for what is no JSON object, or not free to be chosen."""
        where, text = f"--{whose}-body", getattr(self, f"{whose}_body")
        if not text:
            return None
        try:
            value = parse_json(text, strictly=True)
        except Unreadable:
            value = None
        if not isinstance(value, dict):
            raise UserError(  # it may hold a key: not repeated
                f"{where}: is no JSON object with each key once and without NaN, such as {NO_THINKING}."
            )
        if taken := sorted(value.keys() & DECIDED_ELSEWHERE):
            raise UserError(f"{where}: {', '.join(taken)} must not be in it; other settings decide them.")
        return value

    def as_json(self) -> dict[str, Any]:
        """For evaluation.json: URLs without passwords, and of the bodies, which may hold a key, the names alone."""
        own = dataclasses.asdict(self)
        for whose in ("endpoint", "judge"):
            own[whose] = shown_url(own[whose])
            body = self.body(whose)
            own[f"{whose}_body"] = {"names": sorted(_names(body))} if body else None
        return own


def _names(body: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """a.b for {"a": {"b": 1}}."""
    for name, value in body.items():
        yield from _names(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [prefix + name]


LIMITS: dict[str, tuple[float, float]] = {
    "samples": (1, 10**6), "max_tokens": (1, 10**7), "temperature": (0, 10), "top_p": (0.001, 1), "seed": (0, 2**32),
    "step": (-1, 10**8), "micro_batch_tokens": (1, 10**8), "expert_parallel": (0, 10**6), "retries": (0, 100),
    "timeout": (1, 1e8),
    "judge_max_tokens": (1, 10**7), "judge_temperature": (0, 10),
}  # fmt: skip


def parse_evaluation(argv: list[str] | None, usage: str) -> EvaluationSettings:
    """The command line, each value checked by itself. UserError names setting, value, rule and fix."""
    parser = Parser(usage)
    parser.add_settings(EvaluationSettings)
    values = vars(parser.parse_args(argv))
    del values["local_rank"]
    settings = EvaluationSettings(**values)
    for name, (low, high) in LIMITS.items():
        value = getattr(settings, name)
        if not low <= value <= high:  # nor NaN
            raise UserError(f"--{name.replace('_', '-')} {value}: must be between {low} and {high}.")
    template_time(settings.template_time)
    marker(settings.doctag)
    for whose in ("endpoint", "judge"):
        settings.body(whose)
    if not settings.output:
        raise UserError("--output is missing; give a directory for what is measured, the run's own, say.")
    if bool(settings.endpoint) == bool(settings.model):
        raise UserError(
            "give --model DIR, to measure in the training engine, or --endpoint URL, a server that has the model."
        )
    other, needed = (OF_THE_ENDPOINT, "--endpoint") if settings.model else (OF_THE_ENGINE, "--model")
    for name in other:
        if (value := getattr(settings, name)) != getattr(EvaluationSettings, name):
            shown = "" if value is True or name.endswith("_body") else f" {value}"  # a body may hold a key
            raise UserError(f"--{name.replace('_', '-')}{shown}: needs {needed}, and counts for nothing without it.")
    return settings
