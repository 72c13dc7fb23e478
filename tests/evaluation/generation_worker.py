"""Started by the launcher: answers in the training engine. OUTPUT MODEL"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from train.config.settings import Settings
from train.evaluation import generation
from train.evaluation.generation import EngineAnswerer
from train.evaluation.in_engine import Measured, prepare_measuring

CHATS = [
    [{"role": "user", "content": text}]
    for text in ("Where does Mila live?", "Which job does Noah have?", "Who is the one that keeps a goat, if not Ivy?")
]

if __name__ == "__main__":
    generation.PROMPTS = 1
    output, model = (value for value in sys.argv[1:] if not value.startswith("--local_rank"))
    measured = Measured(prepare_measuring(Settings(model=model), [], [], ranks=int(os.environ["WORLD_SIZE"])))
    answerer = EngineAnswerer(measured.engine, measured.measuring.tokenizer)
    if dist.get_rank():
        answerer.follow()
    else:
        with answerer.leading():
            found = {
                "greedy": answerer.answers(CHATS, 12, 0.0, seed=0),
                "alone": [answerer.answers([chat], 12, 0.0, seed=0)[0] for chat in CHATS],
                "drawn": [answerer.answers(CHATS, 12, 1.5, seed=seed) for seed in (3, 3, 4)],
            }
        Path(output).write_text(json.dumps(found))
    assert measured.engine.module.training
    dist.barrier()
