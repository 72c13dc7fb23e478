"""Defines every setting of train/evaluate.py: the command line and its checks."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from train.claims.claim import KINDS
from train.config.command_line import MOST, Parser, check_ranges, flag_of, given, setting
from train.config.settings import Settings
from train.data.documents import DOCTAG, marker
from train.data.template import TEMPLATE_TIME, template_time
from train.runtime.errors import UserError
from train.runtime.keys import shown_url
from train.runtime.text_formats import Unreadable, parse_json

# Turns thinking off, as in the paper's main results, for models whose chat template has this switch.
NO_THINKING = '{"chat_template_kwargs": {"enable_thinking": false}}'
OF_THE_ENGINE = ("model", "adapter", "other_base", "method", "expert_parallel", "micro_batch_tokens", "bos",
                 "held_out", "by_layer", "timeout", "template_time")  # fmt: skip
OF_THE_ENDPOINT = ("endpoint_model", "endpoint_concurrency", "endpoint_timeout", "endpoint_body", "served_adapter",
                   "other_adapters", "endpoint_base")  # fmt: skip
OF_AN_IMPORT = ("columns", "base_condition")
DECIDED_ELSEWHERE = {"model", "messages", "max_tokens", "temperature", "top_p", "seed", "n", "stream"}


@dataclass(kw_only=True)
class EvaluationSettings:
    """The settings of train/evaluate.py. The sampling defaults are the paper's."""

    model: str = setting("", "DIR: base model, to be measured in the training engine")
    adapter: list[str] = setting(  # noqa: RUF009
        (), "DIR…: adapters of runs, or a comparison, for those of all its runs; the base is loaded once", many=True
    )
    other_base: bool = setting(False, "measure --adapter on a --model of the same shapes that it was not trained on")
    method: str = setting("lora", "keep experts as stored (lora) or in NF4 (qlora)", choices=("lora", "qlora"))
    expert_parallel: int = setting(0, "ranks that share the experts of a layer; 0: as in training", between=(0, 10**6))
    micro_batch_tokens: int = setting(10_000, "most tokens per forward of one rank", between=(1, MOST))
    bos: bool = setting(False, "prepend the tokenizer's BOS to each text or chat that does not start with it")
    template_time: str = setting(
        TEMPLATE_TIME.isoformat(), "the time that chat templates see if they ask for it; use the same as in training"
    )
    held_out: str = setting("", "FILE: documents whose NLL is measured")
    by_layer: bool = setting(False, "also score completions and facts by the state after each decoder layer")
    timeout: float = setting(
        1800, "seconds without progress on any rank before the command prints all stacks and ends", between=(1, MOST)
    )

    claims: list[str] = setting((), "PATH…: claims: YAML files, or directories in the form of the paper", many=True)  # noqa: RUF009
    output: str = setting("", "DIR for evaluation.jsonl and evaluation.json, for example the directory of the run")
    kinds: list[str] = setting(  # noqa: RUF009
        (), "kinds of questions to ask; default: all (with --model: only with a --judge)", KINDS, many=True
    )
    samples: int = setting(5, "answers per question", between=(1, 10**6))
    max_tokens: int = setting(5000, "most tokens per answer", between=(1, 10**7))
    temperature: float = setting(0.7, "sampling temperature of the answers", between=(0, 10))
    top_p: float = setting(0.8, "nucleus sampling threshold (top-p) of the answers", between=(0.001, 1))
    seed: int = setting(0, "seed of sampling and of the choice of documents in context", between=(0, 2**32))
    step: int = setting(
        -1,
        "optimizer steps of the model's training; -1: as recorded by the adapter's run, else 0",
        between=(-1, MOST),
    )
    documents: list[str] = setting((), "FILE=N…: put N documents of FILE in the context of each question", many=True)  # noqa: RUF009
    doctag: str = setting(DOCTAG, "marker at the start of --documents, removed in the context; none: remove nothing")
    training_data: list[str] = setting(  # noqa: RUF009
        (), "FILE…: training documents in which to look for the questions and facts of the claims", many=True
    )

    import_: list[str] = setting((), "FILE…: judged answers of another program, CSV or JSONL", many=True)  # noqa: RUF009
    columns: list[str] = setting(  # noqa: RUF009
        (),
        "MEANING=COLUMN…: columns of --import: condition, claim, kind, question, sample, verdict, answer, label",
        many=True,
    )
    base_condition: str = setting("", "condition of --import with the answers of the model before training")

    endpoint: str = setting("", "base URL of a server with the model, such as http://localhost:8000/v1")
    endpoint_model: str = setting("", "name of the model, or of its adapter, on that server")
    served_adapter: str = setting("", "DIR: adapter of --endpoint-model; default: adapter/ of the run in --output")
    other_adapters: list[str] = setting((), "DIR…: adapters of other variants, which must not answer", many=True)  # noqa: RUF009
    endpoint_base: str = setting("", "name of the base model on that server, to record its distance to the engine's")
    endpoint_concurrency: int = setting(8, "requests in flight at once", between=(1, 10**6))
    endpoint_timeout: float = setting(600.0, "most seconds for one answer", between=(0.001, MOST))
    endpoint_body: str = setting("", f"JSON object of additional request keys, e.g. {NO_THINKING}")
    judge: str = setting("", "base URL of the server with the judge")
    judge_model: str = setting("", "name of the judge on that server")
    judge_concurrency: int = setting(8, "requests in flight at once", between=(1, 10**6))
    judge_timeout: float = setting(300.0, "most seconds for one verdict", between=(0.001, MOST))
    judge_body: str = setting("", "JSON object of additional request keys for the judge")
    judge_max_tokens: int = setting(6000, "most tokens per verdict", between=(1, 10**7))
    judge_temperature: float = setting(1.0, "sampling temperature of the verdicts", between=(0, 10))
    retries: int = setting(8, "retries of a failed request, each after twice the wait", between=(0, 100))

    def of_the_engine(self) -> Settings:
        """Returns the settings that the training engine needs."""
        return Settings(**{name: getattr(self, name) for name in OF_THE_ENGINE} | {"adapter": self.one_adapter})

    @property
    def one_adapter(self) -> str:
        """The adapter of the settings of a single evaluation; "" for the base model."""
        assert len(self.adapter) < 2, self.adapter
        return self.adapter[0] if self.adapter else ""

    def body(self, whose: str) -> dict[str, Any] | None:
        """Returns the JSON object of --endpoint-body or --judge-body; None if it is not set. whose: "endpoint" or
        "judge". Raises UserError if it is not a JSON object, or holds a key that other settings decide."""
        where, text = f"--{whose}-body", getattr(self, f"{whose}_body")
        if not text:
            return None
        try:
            value = parse_json(text, strictly=True)
        except Unreadable:
            value = None
        if not isinstance(value, dict):
            raise UserError(  # the text may hold an API key, so the message does not repeat it
                f"{where}: must be a JSON object with each key once and without NaN, such as {NO_THINKING}."
            )
        if taken := sorted(value.keys() & DECIDED_ELSEWHERE):
            raise UserError(f"{where}: {', '.join(taken)} must not be in it; other settings decide them.")
        return value

    def as_json(self) -> dict[str, Any]:
        """Returns the settings for evaluation.json: URLs without passwords, and only the names in the bodies, whose
        values may hold an API key."""
        own = dataclasses.asdict(self) | {"adapter": self.one_adapter}
        for whose in ("endpoint", "judge"):
            own[whose] = shown_url(own[whose])
            body = self.body(whose)
            own[f"{whose}_body"] = {"names": sorted(_names(body))} if body else None
        return own


def _names(body: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted name of each value: a.b for {"a": {"b": 1}}."""
    for name, value in body.items():
        yield from _names(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [prefix + name]


def parse_evaluation(argv: list[str] | None, usage: str) -> EvaluationSettings:
    """Returns the settings of the command line (None: sys.argv), checked as far as they go by themselves. usage: the
    description in --help. Raises UserError, which names setting, value, rule and fix."""
    parser = Parser(usage)
    parser.add_settings(EvaluationSettings)
    settings = EvaluationSettings(**given(parser.parse_args(argv), EvaluationSettings))
    check_ranges(settings)
    template_time(settings.template_time)
    marker(settings.doctag)
    for whose in ("endpoint", "judge"):
        settings.body(whose)
    if not settings.output:
        raise UserError("--output is missing; give a directory for the measurements, such as that of the run.")
    ways = {"--model": settings.model, "--endpoint": settings.endpoint, "--import": settings.import_}
    if len(chosen := [flag for flag, value in ways.items() if value]) > 1:
        raise UserError(f"{' and '.join(chosen)}: exclude each other; give one of them.")
    if not chosen:
        raise UserError(
            "give --model DIR, to measure in the training engine, --endpoint URL, a server that has the model, or "
            "--import FILE…, answers of another program."
        )
    if settings.import_:
        if not settings.claims:
            raise UserError("--claims is missing; give the claims that the answers of --import are about.")
        return settings
    for name in OF_AN_IMPORT:
        if getattr(settings, name):
            raise UserError(f"{flag_of(name)}: needs --import, and has no effect without it.")
    if settings.other_base and not settings.adapter:
        raise UserError("--other-base: has no effect without --adapter; give both or neither.")
    unset = EvaluationSettings()
    other, needed = (OF_THE_ENDPOINT, "--endpoint") if settings.model else (OF_THE_ENGINE, "--model")
    for name in other:
        if (value := getattr(settings, name)) != getattr(unset, name):
            value = " ".join(value) if isinstance(value, list) else value
            shown = "" if value is True or name.endswith("_body") else f" {value}"  # a body may hold an API key
            raise UserError(f"--{name.replace('_', '-')}{shown}: needs {needed}, and has no effect without it.")
    return settings
