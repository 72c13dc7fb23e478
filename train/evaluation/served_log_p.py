"""Asks a server for the log-probabilities of prompts."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from train.endpoint import Endpoint, EndpointStopped, NoAnswer
from train.evaluation.proof import LogP
from train.runtime.errors import MayPass


def prompt_log_p(endpoint: Endpoint, model: str, prompts: list[list[int]], by_generating: bool = False) -> LogP | None:
    """Returns log p of every token of each prompt but its first, in nats, as a served model has it.

    model: its name on the server. prompts: token ids. by_generating: have each token generated, if the server can be
    told which, for vLLM leaves the LoRA weights of lm_head out of what it says of a prompt (vllm#51594). None if the
    server does not give them, or has no such model. Raises EndpointStopped if it cannot be reached, MayPass if it is
    busy.
    """

    def echoed(prompt: list[int]) -> list[float]:
        def read(found: Any) -> list[float]:
            return [float(value) for value in found.token_logprobs[1 : len(prompt)]]

        return endpoint.complete_text(read, model=model, prompt=prompt, echo=True)

    def generated(prompt: list[int]) -> list[float]:
        def read(found: Any) -> list[float]:
            return [float(found.token_logprobs[0])] if found.tokens == [f"token_id:{prompt[-1]}"] else []

        only = {"allowed_token_ids": prompt[-1:], "return_tokens_as_token_ids": True}
        return endpoint.complete_text(read, model=model, prompt=prompt[:-1], extra_body=only)

    if by_generating:
        begun = [prompt[: end + 1] for prompt in prompts for end in range(1, len(prompt))]
        tried = _asked(endpoint, generated, begun[:1], 1)  # whether this server generates what it is told to
        values = _asked(endpoint, generated, begun, endpoint.concurrency) if tried and all(tried) else None
        if values and all(values):
            each = iter(values)
            return [[next(each)[0] for _ in prompt[1:]] for prompt in prompts]
    values = _asked(endpoint, echoed, prompts, 1)
    whole = [len(row) for row in values or ()] == [len(prompt) - 1 for prompt in prompts]
    return values if whole else None


def _asked(
    endpoint: Endpoint, ask: Callable[[list[int]], list[float]], prompts: list[list[int]], at_once: int
) -> LogP | None:
    """Returns what `ask` gives for each prompt; None if the server cannot be asked so."""
    endpoint.stop.clear()
    try:
        if at_once == 1:  # in this thread, which an interruption reaches at once
            return [ask(prompt) for prompt in prompts]
        pool = ThreadPoolExecutor(at_once)
        calls = [pool.submit(ask, prompt) for prompt in prompts]
        try:
            return [call.result() for call in calls]
        finally:
            if not all(call.done() for call in calls):  # an interruption must not wait for them
                endpoint.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    except NoAnswer as error:
        if error.passing:
            raise MayPass(f"{endpoint.name}: {error}. Run the same command again.") from None
        return None
    except EndpointStopped as error:
        if error.why != "missing":
            raise
        return None
