"""A training step of ours, and of TRL's SFTTrainer with stock PEFT (`target_parameters`), each in one process.

    python tests/benchmarks/train.py [--json FILE] [--experts 64 256] [--rounds 9] [--layers 6] [--documents 4]

A Qwen3-MoE (hidden 512, expert width 256, 6 layers, top 8, fp32), documents of 440 to 500 tokens, 4 a step; LoRA of
rank 16 on attention and 4 on every expert. Both take the same documents in the same order from the same LoRA weights,
with AdamW and clipping, without gradient checkpointing; every step's losses are compared. They take turns, a step each.
Of ours, a step is all that train/sft.py does for one that it does not measure; of TRL's, all from on_step_begin to
on_step_end. Beside seconds: page faults of a step, and each process's peak resident set.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import Turns, Worker, finish, header

from tests.support.models import write_documents, write_model
from train.runtime.command import leave
from train.runtime.distributed import start_distributed

SIZES: dict[str, Any] = dict(
    vocab_size=32_768, hidden_size=512, moe_intermediate_size=256, num_experts_per_tok=8,
    num_attention_heads=8, num_key_value_heads=2, head_dim=128, max_position_embeddings=1024,
)  # fmt: skip
RANK, EXPERT_RANK, RATE = 16, 4, 1e-3
WARM_UP = 2  # at the third step, ZeRO-3 knows the order of the layers


def flags(directory: Path, steps: int, documents: int) -> list[str]:
    """The settings of our job; directory: of model, documents and initial LoRA weights."""
    return [
        "--model", str(directory / "model"), "--data", str(directory / "documents.jsonl"), "--steps", str(steps),
        "--batch-size", str(documents), "--lora-rank", str(RANK),
        "--lora-alpha", str(RANK), "--expert-lora-rank", str(EXPERT_RANK), "--learning-rate", str(RATE),
        "--schedule", "constant", "--adapter", str(directory / "adapter"),
    ]  # fmt: skip


def ours(directory: Path, steps: int, documents: int) -> None:
    from train.config.settings import parse
    from train.training.finishing import load_engine
    from train.training.job import prepare
    from train.training.trainer import Trainer

    turns = Turns()
    job = prepare(parse(flags(directory, steps, documents), ""), 1, show=False)
    engine, _ = load_engine(job, start_distributed())
    trainer = Trainer(job, engine)
    turns.say(ready=True)
    for step in range(steps):
        turns.begin()
        values = trainer.step(step, measure=False)
        turns.end(loss=values["loss"])


def trl(directory: Path, steps: int, documents: int) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    turns, losses = Turns(), []
    config = SFTConfig(
        output_dir=str(directory / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=steps,
        per_device_train_batch_size=documents, train_sampling_strategy="sequential", learning_rate=RATE,
        lr_scheduler_type="constant", adam_beta2=0.95, logging_strategy="no", save_strategy="no", report_to="none",
        disable_tqdm=True, router_aux_loss_coef=0.0, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    lora = LoraConfig(
        r=RANK, lora_alpha=RANK, rank_pattern={r"experts\.(gate_up_proj|down_proj)": EXPERT_RANK},
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    ids = [json.loads(line) for line in (directory / "ids.jsonl").read_text().splitlines()]
    trainer = SFTTrainer(
        str(directory / "model"), args=config, train_dataset=Dataset.from_dict({"input_ids": ids}), peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(directory / "model"),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_("lora_" in name)  # PEFT freezes the LoRA of experts except for the last weight
        if "lora_B" in name:
            parameter.data.normal_(0, 0.01, generator=generator)
    trainer.model.save_pretrained(directory / "adapter")

    class Waits(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
            turns.begin()

        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            turns.end(loss=losses[-1].item())

    compute = trainer.compute_loss

    def compute_and_keep(*arguments: Any, **keywords: Any) -> Any:
        found = compute(*arguments, **keywords)
        losses.append((found[0] if isinstance(found, tuple) else found).detach())
        return found

    trainer.compute_loss = compute_and_keep  # type: ignore[method-assign]
    trainer.add_callback(Waits())
    turns.say(ready=True)
    trainer.train()


WORKERS = {"trl": trl, "ours": ours}  # in the order of their start: the initial LoRA weights are TRL's


def prepare_inputs(directory: Path, experts: int, layers: int, steps: int, documents: int) -> None:
    """Writes model and documents, and their tokens in the order in which our job takes them."""
    from train.config.settings import parse
    from train.training.job import prepare

    write_model(directory / "model", "qwen3", num_experts=experts, num_hidden_layers=layers, **SIZES)
    drawn = random.Random(0)
    texts = ["".join(drawn.choices("abcdefghij klmnopqrstuvwxyz", k=drawn.randint(440, 500))) for _ in range(64)]
    write_documents(directory / "documents.jsonl", [{"text": text} for text in texts])
    without_adapter = flags(directory, steps, documents)[:-2]
    corpus = prepare(parse(without_adapter, ""), 1, show=False).corpus
    numbers = corpus.order.documents(0, steps * documents)
    (directory / "ids.jsonl").write_text("".join(f"{corpus.samples[n].ids_L.tolist()}\n" for n in numbers))


def measure(directory: Path, experts: int, layers: int, rounds: int, documents: int) -> dict[str, Any]:
    steps = WARM_UP + rounds
    prepare_inputs(directory, experts, layers, steps, documents)
    workers: dict[str, Worker] = {}
    try:
        for kind in WORKERS:
            given = [kind, str(directory), str(steps), str(documents)]
            workers[kind] = Worker(__file__, given, directory / f"{kind}.log")
        turns = [{kind: worker.step() for kind, worker in workers.items()} for _ in range(steps)]
    finally:
        for worker in workers.values():
            worker.end()
    for turn in turns:
        assert abs(turn["ours"]["loss"] / turn["trl"]["loss"] - 1) < 1e-4, turns
    seconds = {kind: [turn[kind]["seconds"] for turn in turns[WARM_UP:]] for kind in WORKERS}
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    return {
        "experts": experts, "speedup_over_trl": median["trl"] / median["ours"], "seconds": median,
        "spread": {kind: max(values) / min(values) for kind, values in seconds.items()},
        "page_faults": {kind: [turn[kind]["faults"] for turn in turns[WARM_UP:]] for kind in WORKERS},
        "peak_bytes": {kind: turns[-1][kind]["peak"] for kind in WORKERS},
        "losses": [{kind: turn[kind]["loss"] for kind in WORKERS} for turn in turns],
    }  # fmt: skip


def main() -> None:
    if "--worker" in sys.argv:
        kind, directory, steps, documents = sys.argv[sys.argv.index("--worker") + 1 :][:4]
        WORKERS[kind](Path(directory), int(steps), int(documents))
        leave(0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--experts", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--documents", type=int, default=4)
    args = parser.parse_args()
    header()
    rows = []
    for experts in args.experts:
        with tempfile.TemporaryDirectory() as temporary:
            rows.append(row := measure(Path(temporary), experts, args.layers, args.rounds, args.documents))
        faults = {kind: statistics.median(counts) for kind, counts in row["page_faults"].items()}
        shown = "; ".join(
            f"{kind} {row['seconds'][kind]:.2f} s (spread {row['spread'][kind]:.2f}), "
            f"{faults[kind]:,.0f} page faults, peak {row['peak_bytes'][kind] / 1e9:.2f} GB"
            for kind in WORKERS
        )
        print(f"{experts} experts: {shown}\n    {row['speedup_over_trl']:.2f} x as fast as TRL", flush=True)
    finish(rows, args.json)


if __name__ == "__main__":
    main()
