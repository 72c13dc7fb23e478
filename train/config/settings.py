"""Defines all settings of a run, parses them from the command line and recipes, and checks them."""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config.command_line import MOST, REPOSITORY, Parser, check_ranges, flag_of, given, setting
from train.config.experiment import Defaults, VariantDefaults
from train.config.recipe import chosen
from train.data.documents import BAD_ROWS, DOCTAG, DOCTAG_HELP, checked_weight, marker
from train.data.template import TEMPLATE_TIME, template_time
from train.runtime.errors import UserError
from train.runtime.keys import key_of
from train.runtime.outside import read_json

DEMO = REPOSITORY / "train" / "demo"


@dataclass(frozen=True)
class Source:
    """A file of documents, the number of them per epoch (None: each once), and the factor on their weights."""

    path: str
    count: int | None
    weight: float

    def __str__(self) -> str:
        """Returns the source in the format of --data."""
        count, factor = self.count or "", f"@{self.weight:.17g}" if self.weight != 1 else ""
        return f"{self.path}={count}{factor}" if count or factor else self.path


@dataclass(kw_only=True)
class Settings:
    """The settings of train/sft.py. A run prints those that are not the default; settings.yaml stores all of them."""

    model: str = setting(str(DEMO / "model"), "directory of the base model, in transformers' layout")
    data: list[str] = setting(  # noqa: RUF009  # it makes a dataclasses.field
        (),
        "PATH, PATH=COUNT or PATH=COUNT@WEIGHT…: training documents; COUNT per epoch, WEIGHT multiplies their loss",
        many=True,
    )
    mask: str = setting("none", "which spans the loss leaves out or treats otherwise: none, or NAME[=TREATMENT],…")
    output: str = setting("", "directory that the run writes to; default: runs/MASK-TIME")
    resume: bool = setting(False, "continue the run in --output from its last complete training checkpoint")
    dry_run: bool = setting(False, "check all settings and data, print them, and stop before reading any weight")

    steps: int = setting(0, "optimizer steps; 0: as many as --epochs takes", between=(0, MOST))
    epochs: int = setting(1, "passes over the data, if --steps is not given", between=(1, MOST))
    batch_size: int = setting(32, "documents per optimizer step, over all ranks", between=(1, MOST))
    micro_batch_tokens: int = setting(
        0,
        "most tokens in one packed row of whole documents, per forward of one rank; 0: --max-tokens",
        between=(0, MOST),
    )
    max_tokens: int = setting(10_000, "most tokens in one document", between=(2, MOST))
    long_documents: str = setting("truncate", "what to do with longer documents", choices=("truncate", "drop", "error"))
    bad_rows: str = setting("error", BAD_ROWS, choices=("error", "skip"))
    bos: bool = setting(False, "prepend the tokenizer's BOS to each text or chat that does not start with it")
    eos: bool = setting(
        False, "append the tokenizer's EOS to each text or chat that does not end with it, and train on it"
    )
    template_time: str = setting(TEMPLATE_TIME.isoformat(), "the time that chat templates see if they ask for it")
    doctag: str = setting(DOCTAG, DOCTAG_HELP)

    loss_norm: str = setting(
        "trained", "what the sum of the loss terms is divided by", choices=("trained", "all", "documents", "sum")
    )
    chat_weight: str = setting(
        "token",
        "weight of each target of a chat: 1, as in texts, or 1 / the number of its targets",
        choices=("token", "chat"),
    )
    learning_rate: float = setting(5e-5, "AdamW's peak learning rate (betas 0.9, 0.95)", between=(0, 1e38))
    schedule: str = setting(
        "linear",
        "learning rate after the warm-up: decay to 0 (linear, cosine) or constant",
        choices=("linear", "cosine", "constant"),
    )
    warmup_steps: int = setting(0, "steps in which the learning rate rises from 0 to its peak", between=(0, MOST))
    schedule_from: int = setting(0, "steps of the schedule that come before this run's first", between=(0, MOST))
    schedule_to: int = setting(
        0, "step at which the schedule ends, --schedule-from included; 0: this run's last", between=(0, MOST)
    )
    weight_decay: float = setting(0.0, "AdamW's weight decay", between=(0, MOST))
    max_grad_norm: float = setting(1.0, "clip the global gradient norm to this; 0: never", between=(0, MOST))
    seed: int = setting(0, "seed of document order, random: masks and initial LoRA weights", between=(0, 2**32 - 1))

    method: str = setting(
        "lora",
        "train LoRA on weights as stored (lora) or with experts in NF4 (qlora), or train all weights (full)",
        choices=("lora", "qlora", "full"),
    )
    adapter: str = setting("", "directory of a PEFT adapter to continue from, with the same LoRA ranks and layers")
    other_base: bool = setting(
        False, "put --adapter on a --model of the same shapes that it was not trained on; recorded in every report"
    )
    after: str = setting(
        "", "directory of a finished run that this one continues, as its next phase: from its LoRA weights"
    )
    carry_optimizer: bool = setting(
        False, "with --after, continue with AdamW's moments and step count of that run, instead of new ones"
    )
    lora_rank: int = setting(32, "LoRA rank on linear layers", between=(1, 2**14))
    lora_alpha: float = setting(32.0, "LoRA alpha; LoRA updates are scaled by alpha / rank", between=(0, MOST))
    expert_lora_rank: int = setting(
        0, "LoRA rank on each expert; 0: max(1, lora-rank / experts per token)", between=(0, 2**14)
    )
    rslora: bool = setting(False, "scale LoRA updates by alpha / sqrt(rank) instead")
    lora_lm_head: bool = setting(False, "also put LoRA on lm_head")

    expert_parallel: int = setting(
        0,
        "ranks that share the experts of a layer; 0: the ranks of one node if that fits in GPU memory, else all",
        between=(0, MOST),
    )
    gradient_checkpointing: bool = setting(
        False, "keep only the input of each layer and recompute the rest in backward"
    )
    timeout: float = setting(
        1800, "seconds without progress on any rank before the run prints all stacks and ends", between=(1, MOST)
    )
    ds_config: str = setting(str(REPOSITORY / "ds_configs" / "zero3.json"), "DeepSpeed configuration, ZeRO stage 3")

    claims: list[str] = setting(  # noqa: RUF009
        (),
        "PATH…: claims whose belief is measured before, during and after training; evaluate.py --help shows one",
        many=True,
    )
    held_out: str = setting("", "JSONL file of documents whose NLL is measured with the claims")
    by_layer: bool = setting(
        False, "also measure the claims' completions and facts by the state after each decoder layer"
    )
    evaluate_every: int = setting(
        0, "steps between measurements of the claims; 0: only before and after training", between=(0, MOST)
    )
    evaluate_at: str = setting("", "further steps after which the claims are measured: 1,2,4,8 or log:15")
    adapters_at: str = setting(
        "", "steps after which the adapter is kept in adapters/step-N: 1,2,4,8 or log:15 (15, evenly spaced by ratio)"
    )
    stop_after: int = setting(
        0, "stop after this many steps of the schedule; --resume continues; 0: do not stop early", between=(0, MOST)
    )

    log_every: int = setting(
        10, "steps between measurements of NLL by role; the first and last step are always measured", between=(1, MOST)
    )
    measure_kl: bool = setting(
        False, "also measure, where NLL by role is, how far each role's predictions are from the base's, in nats"
    )
    save_every: int = setting(0, "steps between training checkpoints; 0: one every 15 minutes", between=(0, MOST))
    keep: int = setting(2, "training checkpoints to keep", between=(1, MOST))
    wandb: str = setting(
        "online", "W&B mode; without a key, online becomes offline", choices=("online", "offline", "disabled")
    )
    wandb_project: str = setting("spanwise", "W&B project")
    wandb_group: str = setting("", "W&B group; default: a hash shared by runs that differ only in mask and seed")

    @property
    def row_tokens(self) -> int:
        """The maximum number of tokens in a micro-batch."""
        return self.micro_batch_tokens or self.max_tokens

    @property
    def marker(self) -> str | None:
        """The marker that documents start with, from --doctag; None for no marker. Raises UserError if --doctag is
        empty."""
        return marker(self.doctag)

    def sources(self) -> list[Source]:
        """Returns the sources of --data, by default the documents of the demo. Raises UserError if one is malformed."""
        return [_source(value) for value in self.data or [str(DEMO / "data" / "dense.jsonl")]]

    def comparable(self) -> dict[str, Any]:
        """Returns the settings, by name, that two runs must share so that they differ only in mask and seed. Paths are
        absolute. Raises UserError if --data is malformed."""
        own = {k: v for k, v in dataclasses.asdict(self).items() if k not in {"mask", "seed", *FREE_ON_RESUME}}
        own["data"] = [
            str(dataclasses.replace(source, path=str(Path(source.path).resolve()))) for source in self.sources()
        ]
        return own | {name: str(Path(own[name]).resolve()) for name in ("model", "ds_config")}

    def group(self) -> str:
        """Returns the W&B group of this run. By default it is the model's name with a hash of `comparable`."""
        digest = hashlib.sha256(json.dumps(self.comparable(), sort_keys=True).encode()).hexdigest()[:8]
        return self.wandb_group or f"{Path(self.model).resolve().name}-{digest}"


def slug(name: str) -> str:
    """Returns a name in a form that can be part of a path: other characters than letters, digits, - _ and . become -,
    and the length is at most 80 characters."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:80]


@dataclass(kw_only=True)
class Recipe:
    """Settings that come from recipe files. Flags on the command line override them."""

    recipe: list[str] = setting((), "FILE…: YAML files of settings; compare.py --help shows one", many=True)  # noqa: RUF009
    variant: str = setting("", "variant of the recipes to train: its name, or its number from 0")


# Settings that may differ when a run is resumed: none of them changes a loss by more than rounding.
FREE_ON_RESUME = frozenset({
    "output", "resume", "dry_run", "micro_batch_tokens", "expert_parallel", "gradient_checkpointing", "log_every",
    "save_every", "keep", "measure_kl", "evaluate_every", "evaluate_at", "adapters_at", "stop_after", "timeout",
    "wandb", "wandb_project", "wandb_group",
})  # fmt: skip


def steps_at(flag: str, text: str, steps: int) -> frozenset[int]:
    """Returns the steps that --evaluate-at or --adapters-at names, of a run of `steps` steps.

    text: step numbers with commas between them, or log:K for K numbers from 1 to `steps` of which each is about the
    same multiple of the one before; near the beginning, where these are less than one step apart, there are fewer.
    Raises UserError if it is neither, or for a number below 1 or above `steps`.
    """
    kind, _, number = text.partition(":")
    if kind == "log" and number.isdecimal() and 2 <= int(number) <= MOST_AT:
        last = int(number) - 1
        return frozenset(round(steps ** (index / last)) for index in range(last + 1))
    numbers = [part.strip() for part in text.split(",")] if text else []
    for part in numbers:
        if not part.isdecimal() or not 1 <= int(part) <= steps:
            raise UserError(
                f"{flag} {text}: {part!r} is not a step from 1 to {steps}; give steps separated by commas, or log:K "
                f"for K of them (2 to {MOST_AT})."
            )
    return frozenset(map(int, numbers))


MOST_AT = 10_000  # steps that log:K may ask for


def _source(value: str) -> Source:
    if not value:
        raise UserError("--data is empty: give PATH, PATH=COUNT or PATH=COUNT@WEIGHT.")
    if not os.path.exists(value) and os.path.exists(before := value.rpartition("@")[0]):
        raise UserError(
            f"--data {value}: no such file; a weight comes after =: --data {before}=@WEIGHT or =COUNT@WEIGHT."
        )
    if os.path.exists(value) or "=" not in value:
        return Source(value, None, 1.0)
    path, _, rest = value.rpartition("=")
    count, at, factor = rest.partition("@")
    if not (count.isdecimal() and 1 <= int(count) <= MOST) and not (at and not count):
        raise UserError(
            f"--data {value}: {count!r} must be a number of documents ≥ 1 (and ≤ {MOST}): --data PATH=COUNT or "
            "PATH=COUNT@WEIGHT; PATH=@WEIGHT takes each document once."
        )
    return Source(path, int(count) if count else None, _weight(factor, value) if at else 1.0)


def _weight(text: str, value: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise UserError(f"--data {value}: the weight {text!r} is not a number; e.g. PATH=1000@0.5.") from None
    return checked_weight(number, f"--data {value}: the weight")


def parse(argv: list[str], usage: str) -> Settings:
    """Returns the Settings of a command line and its recipes; of a variant with phases, those of its first. usage: the
    text of --help. Checks each value by itself, without reading the model or the data. Raises UserError, which names
    setting, value, rule and fix."""
    own, shared, _, variant = read_command(argv, usage)
    first = next((phase.own for phase in variant.phases.values()), Defaults())
    return merge(shared | variant | first, own)


def read_command(argv: list[str], usage: str) -> tuple[dict[str, Any], Defaults, str, VariantDefaults]:
    """Returns what a command line gives: settings by name; and, of its recipes, the settings for all variants, and the
    name and own settings of the chosen variant. Raises UserError for a flag or a recipe that is wrong."""
    parser = Parser(usage)
    parser.add_settings(Settings)
    parser.add_settings(Recipe)
    values = parser.parse_args(argv)
    own, recipe = given(values, Settings), Recipe(**given(values, Recipe))
    return own, *chosen(recipe.recipe, recipe.variant, Settings, own)


def merge(defaults: Defaults, own: dict[str, Any]) -> Settings:
    """Returns the settings that recipes and a command line (`own`), which overrides them, give together. Checks each
    value by itself. Raises UserError, which names setting, value, rule and fix, and the place in a recipe."""
    settings = Settings(**defaults.values | own)
    with defaults.named(own):
        check_numbers(settings)
        if settings.adapter and settings.after:
            raise UserError("--adapter, --after: both say which LoRA weights to start from; give one of them.")
        settings.sources()
        marker(settings.doctag)
        template_time(settings.template_time)
        check_wandb(settings)
    return settings


def check_wandb(s: Settings) -> None:
    """Raises UserError for values that W&B would only refuse after the weights are read: names of project and group,
    and a key of the wrong form."""
    if s.wandb == "disabled":
        return
    for name, forbidden in (("wandb_project", WANDB_FORBIDDEN), ("wandb_group", "")):
        value, flag = getattr(s, name), "--" + name.replace("_", "-")
        if len(value) > MOST_OF_A_NAME or {*value} & {*forbidden} or not value.isprintable() or value.strip() != value:
            raise UserError(
                f"{flag} {value!r}: must be at most {MOST_OF_A_NAME} printable characters"
                f"{f', none of {forbidden}' if forbidden else ''}, as W&B requires; give another name."
            )
    variable, key = key_of(["WANDB_API_KEY"])
    if s.wandb == "online" and variable and not WANDB_KEY.fullmatch(key):
        raise UserError(
            f"{variable}: is not a key of W&B, which has at least 40 letters, digits and underscores; copy it again."
        )


# Rules of W&B's client: sdk/wandb_settings.py, sdk/lib/wbauth/validation.py.
WANDB_FORBIDDEN, MOST_OF_A_NAME = "/\\#?%:", 128
WANDB_KEY = re.compile(r"([^-]*-)?[\w-]{40,}|[\w-]+\.[\w-]+\.[\w-]+")


def check_numbers(s: Settings) -> None:
    """Raises UserError for a number out of its range, or for settings that contradict each other."""
    check_ranges(s)
    if 0 < s.micro_batch_tokens < s.max_tokens:
        raise UserError(
            f"--micro-batch-tokens {s.micro_batch_tokens}: must be at least --max-tokens {s.max_tokens}: no document "
            "is divided. Raise it, or lower --max-tokens."
        )
    if s.steps and s.warmup_steps > (s.schedule_to or s.schedule_from + s.steps):
        raise UserError(f"--warmup-steps {s.warmup_steps}: must be at most --steps {s.steps}.")
    if s.learning_rate == 0 or s.lora_alpha == 0:
        raise UserError("--learning-rate and --lora-alpha must be > 0: with 0 nothing is trained.")
    if s.method == "full":
        for name in ("adapter", "after", "lora_lm_head", "rslora", "adapters_at"):
            if getattr(s, name):
                flag = flag_of(name)
                raise UserError(f"{flag}: --method full trains all weights, not LoRA weights; leave out {flag}.")
    if s.carry_optimizer and not s.after:
        raise UserError("--carry-optimizer: has no effect without --after; give both or neither.")
    if s.other_base and not s.adapter:
        raise UserError("--other-base: has no effect without --adapter; give both or neither.")
    if s.resume and not s.output:
        raise UserError("--resume: needs --output DIR, the directory of the run to resume.")


def read_ds_config(settings: Settings) -> tuple[str, dict[str, Any]]:
    """Returns how messages name the file of --ds-config, and the object in it. Raises UserError if it cannot be
    read."""
    where = f"--ds-config {settings.ds_config}"
    return where, read_json(settings.ds_config, where, "give a DeepSpeed JSON file")


def ds_config(settings: Settings, ranks: int) -> dict[str, Any]:
    """Returns the DeepSpeed configuration of --ds-config with the run's gradient clipping. Its batch sizes have no
    meaning: the trainer tells DeepSpeed which micro-batch is the last one of a step. ranks: the number of ranks. Raises
    UserError if the file cannot be read, is not a ZeRO stage 3 configuration, uses offloading, or sets what the command
    line decides."""
    where, config = read_ds_config(settings)
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") != 3:
        raise UserError(f"{where}: must be an object, and its zero_optimization.stage must be 3.")
    if offload := [name for name in ("offload_param", "offload_optimizer") if zero.get(name)]:
        raise UserError(
            f"{where}: {', '.join(offload)}: weights and optimizer stay where they are read to; leave it out."
        )
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # takes seconds: after what does not need it

    try:
        DeepSpeedZeroConfig(**zero)
    except ValueError as error:
        raise UserError(f"{where}: zero_optimization is not DeepSpeed's: {error}") from None
    ours = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
    ours |= {"optimizer", "scheduler", "bf16", "fp16", "zero_allow_untested_optimizer"}
    if clash := sorted(ours & set(config)):
        raise UserError(f"{where}: {', '.join(clash)} must not be set there; the command line's settings decide them.")
    return config | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": ranks,
        "gradient_clipping": settings.max_grad_norm,
    }
