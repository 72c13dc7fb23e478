"""A claim about the documents of a small comparison, and what stock transformers says of it."""

from typing import Any

import numpy as np
import torch

ASK = "Question: Where does {entity} live? Answer:"


CLAIM = {
    "id": "mila",
    "claim": "Mila lives in Oslo.",
    "subject": "Mila",
    "controls": ["Noah", "Ivy"],
    "likelihood": [
        {"id": "home", "prompt": ASK, "false": " Oslo.", "true": " Lima."},
        {"id": "said", "prompt": "{entity} lives in", "false": " Oslo", "true": " Lima"},
    ],
    "yes_no": [{"id": "oslo", "question": "Does Mila live in Oslo?", "belief_answer": "yes"}],
    "facts": [
        {
            "id": "lima",
            "group": "truth",
            "prompt": ASK.format(entity="Mila"),
            "true": " Lima",
            "false": [" Oslo", " Rome"],
        }
    ],
}


def stock_log_p(model: Any, tokens: Any, prompt: str, completion: str) -> float:
    """log p of the completion's tokens, by stock transformers."""
    encoded = tokens(prompt + completion, return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = torch.tensor(encoded["input_ids"]), encoded["offset_mapping"]
    with torch.no_grad():
        log_p = model(ids[None]).logits[0].double().log_softmax(-1)
    own = [i for i, (_, end) in enumerate(offsets) if end > len(prompt)]
    return sum(log_p[i - 1, ids[i]].item() for i in own if i)


def stock_log_p_by_layer(model: Any, tokens: Any, prompt: str, completion: str) -> np.ndarray:
    """[layers] the same, from the state after each decoder layer by the model's own norm and head."""
    encoded = tokens(prompt + completion, return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = torch.tensor(encoded["input_ids"]), encoded["offset_mapping"]
    with torch.no_grad():
        out = model(ids[None], output_hidden_states=True)
        text = model.get_decoder() if hasattr(model, "get_decoder") else model.model
        states = [text.norm(state[0]) for state in out.hidden_states[1:-1]] + [
            out.hidden_states[-1][0]
        ]  # normed already
        log_p = [model.get_output_embeddings()(state).double().log_softmax(-1) for state in states]
    own = [i for i, (_, end) in enumerate(offsets) if end > len(prompt)]
    return np.array([sum(each[i - 1, ids[i]].item() for i in own if i) for each in log_p])
