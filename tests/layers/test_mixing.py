"""Documents of one row: none sees another, and each has the logits, loss and gradients that it has alone."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.models import FAMILIES, VOCABULARY, write_model
from train.data.row import Row
from train.layers.mixing import install, states_of_row

LENGTHS = [129, 65, 64, 63, 5, 4, 3, 2, 1]
OTHERS = [1, 64, 2, 129, 3, 63, 200, 4, 65, 5, 130, 1]  # in no order


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model as stock transformers has it, and one that takes rows."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    write_model(directory, request.param)
    stock, packed = (AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32) for _ in range(2))
    install(packed)
    return stock, packed


def drawn(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def in_a_row(model: Any, documents: list[Tensor]) -> list[Tensor]:
    """The logits of each document [L, V]."""
    row = Row([len(document) for document in documents])
    logits = model.lm_head(states_of_row(model, torch.cat(documents), row))
    assert row.mixed == len(model.model.layers)
    return list(logits.split(row.lengths))


def loss(logits: Tensor, document: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:-1], document[1:], reduction="sum")


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("lengths", [LENGTHS, OTHERS])
def test_each_document_has_the_logits_and_gradients_that_it_has_alone(models, lengths):
    stock, packed = models
    documents = drawn(lengths)
    alone = [stock(input_ids=document[None]).logits[0] for document in documents]
    together = in_a_row(packed, documents)
    for own, one in zip(together, alone, strict=True):
        torch.testing.assert_close(own, one, rtol=1e-5, atol=1e-5)
    for number in (0, 1, 3, 5):  # the gradient of one document's loss, with the others beside it
        if len(documents[number]) == 1:
            continue
        loss(in_a_row(packed, documents)[number], documents[number]).backward()
        ours = gradients(packed)
        loss(stock(input_ids=documents[number][None]).logits[0], documents[number]).backward()
        theirs = gradients(stock)
        norm = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
        assert theirs.keys() <= ours.keys()
        for name, gradient in ours.items():
            assert (gradient - theirs.get(name, torch.zeros_like(gradient))).norm() <= 1e-6 * norm, name


@pytest.mark.parametrize("changed", [0, 3, 6, 8])
def test_a_changed_document_changes_not_one_bit_of_the_others(models, changed):
    documents = drawn(OTHERS)
    before = in_a_row(models[1], documents)
    documents[changed] = drawn(OTHERS, seed=1)[changed]
    after = in_a_row(models[1], documents)
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(one, other) == (number != changed), number


def test_groups_hold_documents_of_like_length_and_pad_within_themselves():
    row = Row([400, 390, 300, 100, 100, 5])
    cpu = torch.device("cpu")
    assert [(g.documents, g.longest, g.at_DL is None) for g in row.groups(cpu)] == [(3, 400, False), (3, 100, False)]
    x_T = torch.arange(row.ends[-1], dtype=torch.float32)
    assert torch.equal(row.within(lambda x_DL: x_DL * 2, x_T), x_T * 2)
    assert row.position_T().tolist() == [i for length in row.lengths for i in range(length)]


FAKE = """
def chunk_gated_delta_rule(q, k, v, g, beta, **more):
    raise AssertionError("a GPU's kernel has met a tensor of a CPU")

fused_recurrent_gated_delta_rule = chunk_gated_delta_rule
"""
ON_A_CPU = """
import sys
import torch
from transformers import AutoModelForCausalLM
from train.data.row import Row
from train.layers.mixing import install, states_of_row

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.arange(100, 109)
try:
    model(ids[None])
    print("transformers runs without the package")
except AssertionError as error:
    print(error)
install(model)
stock = model(ids[None]).logits[0]
packed = model.lm_head(states_of_row(model, ids.repeat(2), Row([9, 9])))
torch.testing.assert_close(packed, torch.cat([stock, stock]))
answer = model.generate(ids[None], max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=True)[0]
again = model.generate(ids[None], max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=False)[0]
assert len(answer) == 12 and torch.equal(answer, again)
"""


def test_a_model_runs_on_a_cpu_where_a_gpus_kernels_are_installed(tmp_path: Path):
    """transformers binds flash-linear-attention's at import: here a package of that name that takes no tensor."""
    ops = tmp_path / "fla" / "ops"
    ops.mkdir(parents=True)
    for package in (ops, ops.parent):
        (package / "__init__.py").touch()
    (ops / "gated_delta_rule.py").write_text(FAKE)
    write_model(tmp_path / "model", "qwen")
    first = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", ON_A_CPU, str(tmp_path / "model")], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": first},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["a GPU's kernel has met a tensor of a CPU"]
