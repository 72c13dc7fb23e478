"""Generates answers with the training engine: by transformers' own generate, on weights that stay partitioned by ZeRO-3
and divided by expert parallelism. Every token gathers every layer, so this is for small models and few questions. For
others, serve the adapter and give evaluate.py its --endpoint.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from train.claims.messages import Messages
from train.data.tokenizer import Tokenizer
from train.evaluation.likelihood import answer_prompt
from train.model.text_model import LanguageModel
from train.runtime.distributed import from_first_rank
from train.runtime.watchdog import progress

PROMPTS = 8  # prompts per forward on one rank


class EngineAnswerer:
    """Answers chats on all ranks. Rank 0 calls `answers` inside `leading`. Meanwhile the other ranks are in `follow`,
    until rank 0 leaves `leading`."""

    def __init__(self, engine: Any, tokenizer: Tokenizer, top_p: float = 1.0):
        """top_p: sample from the likeliest tokens that together have this probability."""
        self.engine, self.tokenizer, self.top_p = engine, tokenizer, top_p
        self.batch_size, self.concurrency = PROMPTS * dist.get_world_size(), 1  # as Answerer has them
        self.model: LanguageModel = engine.module
        self.ends = tokenizer.special_ids
        pad = tokenizer.pad_id or 0  # perhaps a token that the model lacks; padding is masked, so any token will do
        self.pad = pad if pad < self.model.causal.config.vocab_size else 0

    @contextmanager
    def leading(self) -> Iterator[None]:
        """The context in which rank 0 asks. Leaving it ends `follow` on the other ranks."""
        yield
        from_first_rank(None)  # not after an error: the others may be inside a forward, and the launcher ends them

    def follow(self) -> None:
        """Takes part in every generation that rank 0 starts, until rank 0 leaves `leading`. All other ranks call it."""
        while (work := from_first_rank(None)) is not None:
            self._generate(*work)

    def answers(self, chats: Sequence[Messages], max_tokens: int, temperature: float, seed: int) -> list[str]:
        """Returns an answer to each chat, of at most max_tokens tokens. temperature 0: greedy decoding. The samples
        depend on the seed, the chats and the number of ranks. Raises UserError for a chat template that answer_prompt
        refuses."""
        texts = [answer_prompt(messages, self.tokenizer)[0] for messages in chats]
        prompts = [self.tokenizer.encode(text).ids_L.tolist() for text in texts]
        work = (prompts, max_tokens, temperature, seed)
        from_first_rank(work)
        return self._generate(*work)

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], max_tokens: int, temperature: float, seed: int) -> list[str]:
        """Returns all answers, on every rank. All ranks run the same number of forwards: generate continues until the
        last rank has finished."""
        rank, ranks, device, training = dist.get_rank(), dist.get_world_size(), self.engine.device, self.model.training
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature:
            sampling |= {"temperature": temperature, "top_k": 0, "top_p": self.top_p}
        own: dict[int, str] = {}
        if device.type == "cuda":
            torch.cuda.set_device(device)  # rank 0 asks from a thread, whose device is at first GPU 0
        self.engine.eval()
        for layer in self.model.expert_layers:
            layer.keep_T = None
        each_token = self.model.causal.register_forward_pre_hook(lambda *_: progress("answering questions"))
        devices = [] if device.type == "cpu" else [device]
        with self._parameters_found(), torch.random.fork_rng(devices=devices), each_token:
            torch.manual_seed(seed * ranks + rank)
            for start in range(0, len(order), ranks * PROMPTS):
                mine = order[start : start + ranks * PROMPTS][rank::ranks]
                rows = [prompts[i] for i in mine] or [[self.pad]]
                width = max(map(len, rows))
                ids = torch.tensor([[self.pad] * (width - len(row)) + row for row in rows], device=device)
                seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
                made = self.model.causal.generate(
                    input_ids=ids, attention_mask=seen, max_new_tokens=max_tokens if mine else 1, use_cache=True,
                    synced_gpus=ranks > 1, pad_token_id=self.pad, eos_token_id=sorted(self.ends), **sampling,
                )  # fmt: skip
                for i, row in zip(mine, made[: len(mine), width:].tolist(), strict=True):
                    own[i] = self._text(row)
        self.engine.train(training)
        parts: list[dict[int, str]] = [{}] * ranks
        dist.all_gather_object(parts, own)
        everything = {i: text for part in parts for i, text in part.items()}
        return [everything[i] for i in range(len(prompts))]

    @contextmanager
    def _parameters_found(self) -> Iterator[None]:
        """Lets ZeRO-3 gather a parameter that a module reads from a submodule without calling it. The gated delta rule
        reads its convolution's weight in this way when it has a cache. The engine's forward sets the flag itself, but
        generate bypasses the engine's forward."""
        found = [module._parameters for module in self.model.modules()]
        for parameters in found:
            parameters._in_forward = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for parameters in found:
                parameters._in_forward = False  # type: ignore[attr-defined]

    def _text(self, ids: list[int]) -> str:
        """Returns the text before the first control token, without surrounding white space."""
        ends = [at for at, token in enumerate(ids) if token in self.ends]
        return self.tokenizer.decode(ids[: min(ends, default=len(ids))]).strip()
