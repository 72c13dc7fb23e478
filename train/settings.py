"""Every setting of a run in one place: the command line and its checks."""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from train.command_line import REPOSITORY, Parser, flag_of, setting
from train.data.documents import BAD_ROWS, DOCTAG, DOCTAG_HELP, checked_weight, marker
from train.data.tokenizer import TEMPLATE_TIME, template_time
from train.errors import UserError
from train.keys import key_of
from train.outside import read_json
from train.recipe import chosen, flags

DEMO = Path(__file__).resolve().parent / "demo"


@dataclass(frozen=True)
class Source:
    """A file of documents, how many of them an epoch takes (None: each once), and what multiplies their weight."""

    path: str
    count: int | None
    weight: float

    def __str__(self) -> str:
        """As --data has it."""
        count, factor = self.count or "", f"@{self.weight:.17g}" if self.weight != 1 else ""
        return f"{self.path}={count}{factor}" if count or factor else self.path


@dataclass(kw_only=True)
class Settings:
    """The settings of train/sft.py. `--dry-run` prints them resolved; settings.yaml keeps them with the run."""

    model: str = setting(str(DEMO / "model"), "directory of the base model, in transformers' layout")
    data: list[str] = setting(  # noqa: RUF009  # it makes a dataclasses.field
        (), "PATH, PATH=COUNT or PATH=COUNT@WEIGHT…: documents, COUNT of them an epoch, weighed in the loss", many=True
    )
    mask: str = setting("none", "what the loss does with which spans: none, or NAME[=TREATMENT],…")
    output: str = setting("", "directory the run writes; default runs/MASK-TIME")
    resume: bool = setting(False, "go on with the run in --output from its last complete save")
    dry_run: bool = setting(False, "check and resolve everything, print it, and stop before any weight is read")

    steps: int = setting(0, "optimizer steps; 0: as many as --epochs takes")
    epochs: int = setting(1, "passes over the data, where --steps is not given")
    batch_size: int = setting(32, "documents per optimizer step, over all ranks")
    micro_batch_tokens: int = setting(
        0, "tokens of whole documents, end to end in one row, per forward of one rank; 0: --max-tokens"
    )
    max_tokens: int = setting(10_000, "tokens of a document at most")
    long_documents: str = setting("truncate", "what to do with longer ones", choices=("truncate", "drop", "error"))
    bad_rows: str = setting("error", BAD_ROWS, choices=("error", "skip"))
    bos: bool = setting(False, "put the tokenizer's BOS before each text or chat that does not begin with it")
    eos: bool = setting(
        False, "put the tokenizer's EOS after each text or chat that does not end with it, and train on it"
    )
    template_time: str = setting(TEMPLATE_TIME.isoformat(), "what chat templates are told that ask for the time")
    doctag: str = setting(DOCTAG, DOCTAG_HELP)

    loss_norm: str = setting("trained", "what the loss is divided by", choices=("trained", "all", "documents", "sum"))
    chat_weight: str = setting(
        "token",
        "weight of a chat in the loss: 1 a target as in texts, or 1 over the number of its targets",
        choices=("token", "chat"),
    )
    learning_rate: float = setting(5e-5, "AdamW's peak learning rate (betas 0.9, 0.95)")
    schedule: str = setting(
        "linear", "after the warm-up: to 0, to 0, or flat", choices=("linear", "cosine", "constant")
    )
    warmup_steps: int = setting(0, "steps from 0 to the peak")
    weight_decay: float = setting(0.0, "AdamW's weight decay")
    max_grad_norm: float = setting(1.0, "clip the global gradient norm to this; 0: never")
    seed: int = setting(0, "decides the order of documents, random: masks and the factors' initial values")

    method: str = setting(
        "lora",
        "train factors on weights as on disk, or on experts in NF4, or the weights",
        choices=("lora", "qlora", "full"),
    )
    adapter: str = setting("", "directory of a PEFT adapter, of the same ranks and layers, to go on from")
    lora_rank: int = setting(32, "rank of the factors on linear layers")
    lora_alpha: float = setting(32.0, "factors are scaled by alpha / rank")
    expert_lora_rank: int = setting(0, "rank of each expert's own factors; 0: max(1, lora-rank / experts per token)")
    rslora: bool = setting(False, "scale factors by alpha / sqrt(rank) instead")
    lora_lm_head: bool = setting(False, "factors on lm_head too")

    expert_parallel: int = setting(
        0, "ranks that divide a layer's experts among them; 0: those of a node where that fits into its GPUs, else all"
    )
    gradient_checkpointing: bool = setting(False, "keep only each layer's input, and recompute the rest in backward")
    timeout: float = setting(1800, "seconds without progress on any rank, after which the run ends with their stacks")
    ds_config: str = setting(str(REPOSITORY / "ds_configs" / "zero3.json"), "DeepSpeed configuration, ZeRO stage 3")

    claims: list[str] = setting(  # noqa: RUF009
        (),
        "PATH…: claims whose belief is measured before, during and after; evaluate.py --help shows one",
        many=True,
    )
    held_out: str = setting("", "JSONL documents whose NLL is measured with the claims")
    evaluate_every: int = setting(0, "steps between measurements of the claims; 0: at the start and the end only")

    log_every: int = setting(10, "steps between measurements of the NLL of every role, the first and last step always")
    save_every: int = setting(0, "steps between saves to resume from; 0: a save every 15 minutes")
    keep: int = setting(2, "saves to keep")
    wandb: str = setting("online", "W&B; without a key online means offline", choices=("online", "offline", "disabled"))
    wandb_project: str = setting("spanwise", "W&B project")
    wandb_group: str = setting("", "W&B group; default: a hash that runs share which differ only in mask and seed")

    @property
    def row_tokens(self) -> int:
        """Tokens of a micro-batch at most."""
        return self.micro_batch_tokens or self.max_tokens

    @property
    def marker(self) -> str | None:
        """What --doctag says that documents start with; None for nothing."""
        return marker(self.doctag)

    def sources(self) -> list[Source]:
        """--data; without any, the embedded documents."""
        given = self.data or [str(DEMO / "data" / "dense.jsonl")]
        return [_source(value) for value in given]

    def comparable(self) -> dict[str, Any]:
        """The settings that two runs must share for their difference to be that of mask and seed."""
        own = {k: v for k, v in dataclasses.asdict(self).items() if k not in {"mask", "seed", *FREE_ON_RESUME}}
        own["data"] = [
            str(dataclasses.replace(source, path=str(Path(source.path).resolve()))) for source in self.sources()
        ]
        return own | {name: str(Path(own[name]).resolve()) for name in ("model", "ds_config")}

    def group(self) -> str:
        """The W&B group of this run."""
        digest = hashlib.sha256(json.dumps(self.comparable(), sort_keys=True).encode()).hexdigest()[:8]
        return self.wandb_group or f"{Path(self.model).resolve().name}-{digest}"


def slug(name: str) -> str:
    """A name as a part of a path."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:80]


@dataclass(kw_only=True)
class Recipe:
    """Settings by another way than by flags, which win."""

    recipe: list[str] = setting((), "FILE…: YAML files with settings; compare.py --help shows one", many=True)  # noqa: RUF009
    variant: str = setting("", "which variant of the recipes to train: its name, or its number from 0")


# What may differ when a run is resumed: none of it changes a loss by more than rounding.
FREE_ON_RESUME = frozenset({
    "output", "resume", "dry_run", "micro_batch_tokens", "expert_parallel", "gradient_checkpointing", "log_every",
    "save_every", "keep", "evaluate_every", "timeout", "wandb", "wandb_project", "wandb_group",
})  # fmt: skip


MOST = 10**8  # steps, documents, tokens: beyond it, a slip


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
        raise UserError(f"--data {value}: the weight {text!r} is no number; e.g. PATH=1000@0.5.") from None
    return checked_weight(number, f"--data {value}: the weight")


def parse(argv: list[str], usage: str) -> Settings:
    """The command line as Settings, each value checked by itself. UserError names setting, value, rule and fix."""
    names = [field.name for field in dataclasses.fields(Settings)]
    first = Parser("", add_help=False)
    first.add_settings(Recipe)
    recipe, rest = first.parse_known_args(argv)
    parser = Parser(usage)
    parser.add_settings(Settings)
    parser.add_settings(Recipe)  # for --help
    own = chosen(recipe.recipe, recipe.variant, names, rest)
    values = vars(parser.parse_args([*flags(own, but=rest), *rest]))
    settings = Settings(**{name: values[name] for name in names})
    check_numbers(settings)
    settings.sources()
    marker(settings.doctag)
    template_time(settings.template_time)
    check_wandb(settings)
    return settings


def check_wandb(s: Settings) -> None:
    """UserError for what W&B would refuse after the weights are read."""
    if s.wandb == "disabled":
        return
    for name, forbidden in (("wandb_project", WANDB_FORBIDDEN), ("wandb_group", "")):
        value, flag = getattr(s, name), "--" + name.replace("_", "-")
        if len(value) > MOST_OF_A_NAME or {*value} & {*forbidden} or not value.isprintable() or value.strip() != value:
            raise UserError(
                f"{flag} {value!r}: must be at most {MOST_OF_A_NAME} printable characters"
                f"{f', none of {forbidden}' if forbidden else ''}, as W&B wants it; give another name."
            )
    variable, key = key_of(["WANDB_API_KEY"])
    if s.wandb == "online" and variable and not WANDB_KEY.fullmatch(key):
        raise UserError(
            f"{variable}: is no key of W&B, which has at least 40 letters, digits and underscores; copy it again."
        )


# What the client of W&B refuses: sdk/wandb_settings.py, sdk/lib/wbauth/validation.py.
WANDB_FORBIDDEN, MOST_OF_A_NAME = "/\\#?%:", 128
WANDB_KEY = re.compile(r"([^-]*-)?[\w-]{40,}|[\w-]+\.[\w-]+\.[\w-]+")


def check_numbers(s: Settings) -> None:
    least: dict[str, float] = {
        "steps": 0, "epochs": 1, "batch_size": 1, "micro_batch_tokens": 0, "max_tokens": 2, "warmup_steps": 0,
        "learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0, "seed": 0, "lora_rank": 1, "lora_alpha": 0,
        "expert_lora_rank": 0, "expert_parallel": 0, "log_every": 1, "save_every": 0, "keep": 1, "evaluate_every": 0,
        "timeout": 1,
    }  # fmt: skip
    most = dict.fromkeys(("lora_rank", "expert_lora_rank"), 2**14) | {"seed": 2**32 - 1, "learning_rate": 1e38}
    for name, low in least.items():
        value, high = getattr(s, name), most.get(name, MOST)
        if not low <= value <= high:  # nor NaN
            rule = f"finite and ≥ {low}" if not value > high else f"at most {high}"
            raise UserError(f"{flag_of(name)} {value}: must be {rule}.")
    if 0 < s.micro_batch_tokens < s.max_tokens:
        raise UserError(
            f"--micro-batch-tokens {s.micro_batch_tokens}: must be at least --max-tokens {s.max_tokens}: no document "
            "is divided. Raise it, or lower --max-tokens."
        )
    if s.steps and s.warmup_steps > s.steps:
        raise UserError(f"--warmup-steps {s.warmup_steps}: must be at most --steps {s.steps}.")
    if s.learning_rate == 0 or s.lora_alpha == 0:
        raise UserError("--learning-rate and --lora-alpha must be > 0: with 0 nothing is trained.")
    if s.method == "full":
        for name in ("adapter", "lora_lm_head", "rslora"):
            if getattr(s, name):
                flag = flag_of(name)
                raise UserError(f"{flag}: --method full trains the weights, not factors; leave out {flag}.")
    if s.resume and not s.output:
        raise UserError("--resume: needs --output DIR, the directory of the run to go on with.")


def ds_config(settings: Settings, ranks: int) -> dict[str, Any]:
    """The DeepSpeed configuration of --ds-config with the run's clipping. Batch sizes mean nothing in it: the trainer
    says which micro-batch is a step's last one."""
    path, where = Path(settings.ds_config), f"--ds-config {settings.ds_config}"
    config = read_json(path, where, "give a DeepSpeed JSON file")
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") != 3:
        raise UserError(f"{where}: must be an object, and its zero_optimization.stage must be 3.")
    if offload := [name for name in ("offload_param", "offload_optimizer") if zero.get(name)]:
        raise UserError(
            f"{where}: {', '.join(offload)}: weights and optimizer stay where they are read to; leave it out."
        )
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
