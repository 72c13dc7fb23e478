"""Parses command lines. Each field of a dataclass of settings becomes a flag, and errors suggest the nearest flag."""

import argparse
import dataclasses
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from train.runtime.errors import UserError
from train.runtime.similar import similar
from train.runtime.terminal import NobodyReads
from train.runtime.text_formats import SURROGATE

REPOSITORY = Path(__file__).resolve().parents[2]

# Names that other trainers use for a setting. Only flags of the current command are suggested.
SYNONYMS = {
    "lr": "learning_rate", "bs": "batch_size", "max_length": "max_tokens", "max_len": "max_tokens",
    "max_seq_length": "max_tokens", "max_seq_len": "max_tokens", "seq_len": "max_tokens", "cutoff_len": "max_tokens",
    "block_size": "max_tokens", "max_new_tokens": "max_tokens", "model_name_or_path": "model", "model_name": "model",
    "base_model": "model", "dataset": "data", "train_file": "data", "output_dir": "output", "out": "output",
    "num_train_epochs": "epochs", "num_epochs": "epochs", "max_steps": "steps", "iters": "steps",
    "global_batch_size": "batch_size", "train_batch_size": "batch_size", "mbs": "micro_batch_tokens",
    "per_device_train_batch_size": "micro_batch_tokens", "micro_batch_size": "micro_batch_tokens",
    "lora_r": "lora_rank", "rank": "lora_rank", "r": "lora_rank",
    "alpha": "lora_alpha", "lr_scheduler_type": "schedule", "scheduler": "schedule", "warmup": "warmup_steps",
    "wd": "weight_decay", "clip_grad": "max_grad_norm", "ep": "expert_parallel", "ep_size": "expert_parallel",
    "grad_checkpointing": "gradient_checkpointing", "activation_checkpointing": "gradient_checkpointing",
    "save_steps": "save_every", "logging_steps": "log_every", "eval_steps": "evaluate_every",
    "save_total_limit": "keep", "resume_from_checkpoint": "resume", "report_to": "wandb", "deepspeed": "ds_config",
    "config": "recipe", "force": "overwrite", "url": "endpoint", "base_url": "endpoint", "judge_url": "judge",
    "n": "samples", "concurrency": "judge_concurrency",
}  # fmt: skip


MOST = 10**8  # upper limit of steps, documents and tokens; a larger number is a typo


def setting(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    many: bool = False,
    between: tuple[float, float] | None = None,
) -> Any:
    """Returns a dataclass field for a setting. help: the help text of its flag. choices: the allowed values. many:
    whether the flag takes several values. between: the smallest and the largest allowed number, both inclusive."""
    metadata = {"help": help, "choices": choices, "many": many, "between": between}
    if many:
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_ranges(settings: Any) -> None:
    """Raises UserError for the first number in a dataclass of settings that is NaN or out of its range."""
    for field in dataclasses.fields(settings):
        if field.metadata["between"]:
            value, (low, high) = getattr(settings, field.name), field.metadata["between"]
            if not low <= value <= high:
                raise UserError(f"{flag_of(field.name)} {value}: must be between {low} and {high}.")


def given(values: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Returns those settings of a dataclass that a command line gives, by name. The others keep their defaults."""
    return {name: value for name, value in vars(values).items() if name in cls.__dataclass_fields__}  # type: ignore[attr-defined]


def typed(field: Any, value: Any, where: str) -> Any:
    """Returns the value that a recipe has for a setting, in the setting's type. Raises UserError, which begins with
    `where`, if it is empty, of another type or none of the choices."""
    choices, name = field.metadata["choices"], field.name
    if value in (None, []):
        raise UserError(f"{where}: {name} is empty; give a value, none as a word in quotes.")
    if field.metadata["many"]:
        return [
            _word(str, each, f"{where}: {name}", choices) for each in (value if isinstance(value, list) else [value])
        ]
    if field.type is bool:
        if not isinstance(value, bool):
            raise UserError(f"{where}: {name} must be true or false, not {value!r}.")
        return value
    return _word(field.type, value, f"{where}: {name}", choices)


def _word(kind: type, value: Any, where: str, choices: tuple[str, ...] | None) -> Any:
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        word = kind(str(value))
    except ValueError:
        what = {int: "a whole number", float: "a number"}.get(kind, "a text")
        fix = "; put a word such as no or off in quotes" if isinstance(value, bool) else ""
        raise UserError(f"{where} must be {what}, not {value!r}{fix}.") from None
    if choices and word not in choices:
        raise UserError(f"{where} must be one of {', '.join(choices)}, not {word!r}.")
    return word


def flag_of(name: str) -> str:
    """Returns the flag of a setting, such as --learning-rate for learning_rate."""
    return "--" + name.rstrip("_").replace("_", "-")  # import_, as Python has a word of that name


def nearest(word: str, known: Collection[str]) -> str | None:
    """Returns the known name that `word` means as a synonym, else the one with the most similar spelling; None if there
    is none. Hyphens, underscores and upper case make no difference."""
    plain = {name.lstrip("-").replace("-", "_"): name for name in known}
    asked = word.lstrip("-").replace("-", "_").lower()
    if (meant := SYNONYMS.get(asked)) in plain:
        return plain[str(meant)]
    near = similar(asked, plain)
    return plain[near] if near else None


class Parser(argparse.ArgumentParser):
    """A command-line parser that raises UserError for mistakes, and suggests the nearest flag for an unknown one."""

    def __init__(self, usage: str, add_help: bool = True, beside: tuple[type, ...] = ()):
        """beside: dataclasses of settings that the command also accepts, through another parser; --help lists them."""
        super().__init__(
            description=usage, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
            add_help=add_help,
        )  # fmt: skip
        self.beside = beside
        self.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # passed by the launcher

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses as argparse does; parse_args calls this too. Raises UserError for a word that is not valid UTF-8."""
        given = sys.argv[1:] if args is None else list(args)
        if broken := next((word for word in given if SURROGATE.search(word)), None):
            raise UserError(
                f"{broken}: is not valid UTF-8, as all flags and paths must be. Rename the file, or correct the path."
            )
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises UserError with argparse's message, and suggests the nearest flag for an unknown one."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.split() if message.startswith("unrecognized") else ():
            name = word.split("=")[0]
            if name.startswith("--") and name not in known:
                near = nearest(name, known)
                message += f". Did you mean {near}?" if near else f". See {self.prog} --help."
                break
        raise UserError(message)

    def print_help(self, file: Any = None) -> None:
        """Prints the help. Ignores a pipe whose reader is gone."""
        with suppress(NobodyReads):  # `--help | head`
            super().print_help(file)
            sys.stdout.flush()

    def format_help(self) -> str:
        """Returns the help text, followed by the flags of the dataclasses in `beside`."""
        own = {option for action in self._actions for option in action.option_strings}
        more = Parser("", add_help=False)
        for cls in self.beside:
            more.add_settings(cls, frozenset(f.name for f in dataclasses.fields(cls) if flag_of(f.name) in own))
        text = super().format_help()
        if self.beside:
            text += "\noptions of train/sft.py, also accepted:\n" + more.format_help().partition("options:\n")[2]
        return text

    def add_settings(self, cls: type, without: frozenset[str] = frozenset()) -> None:
        """Adds a flag for each field of a dataclass whose fields are `setting`s. `given` finds those that are given.
        without: names of fields to skip."""
        for field in dataclasses.fields(cls):
            if field.name not in without:
                self._add_setting(field)

    def _add_setting(self, field: Any) -> None:
        flag, help = flag_of(field.name), field.metadata["help"].replace("%", "%%")
        choices = field.metadata["choices"]
        if field.metadata["many"]:
            self.add_argument(
                flag, dest=field.name, action="extend", nargs="+", default=argparse.SUPPRESS, choices=choices,
                metavar="VALUE", help=help,
            )  # fmt: skip
        elif field.type is bool:
            self.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=help)
        else:
            untold = field.default == "" or str(field.default).startswith(str(REPOSITORY))
            shown = help if untold else f"{help} (default: {field.default})"
            self.add_argument(flag, type=field.type, default=argparse.SUPPRESS, choices=choices, help=shown)
