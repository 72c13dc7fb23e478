"""Gradient checkpointing must route the recomputed forward as the first one, even when the router's numbers flip."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from train.experts.recompute import first_time, fix_choices, recomputing, same_routing


class Flipping(nn.Module):
    """Chooses the larger of two inputs; from its second forward on, its logits are the other way round."""

    def __init__(self):
        super().__init__()
        self.chosen: list[int] = []
        self.again: list[bool] = []
        self.worked_out = 0
        self.experts = nn.Identity()
        fix_choices(self, self.experts)

    def work_out(self) -> int:
        self.worked_out += 1
        return self.worked_out

    def forward(self, x_2: torch.Tensor) -> torch.Tensor:
        values, indices = torch.topk(x_2 * (-1) ** len(self.chosen), 1)
        self.chosen.append(indices.item())
        self.again.append(recomputing())
        values = self.experts(values)
        first_time(self.work_out)
        return (values * torch.tensor([10.0, 100.0])[indices]).sum()


def gradient(flips: Flipping, **options) -> list[float]:
    x_2 = torch.tensor([1.0, 2.0], requires_grad=True)
    checkpoint(flips, x_2, use_reentrant=False, **options).backward()
    return x_2.grad.tolist()


def test_the_recomputation_keeps_the_first_forwards_choice():
    flips = Flipping()
    # Entry 1 was chosen, so the gradient is 100 there, though the recomputation sees -x.
    assert gradient(flips, context_fn=same_routing) == [0.0, 100.0]
    assert flips.chosen == [1, 1] and flips.again == [False, True]
    assert flips.worked_out == 1  # and what follows from the choice is not computed again


def test_without_it_the_choice_flips():
    flips = Flipping()
    assert gradient(flips) == [10.0, 0.0]  # of the entry that was not chosen: a wrong gradient
    assert flips.chosen == [1, 0] and flips.worked_out == 2


def test_two_layers_each_keep_their_own_choice():
    first, second = Flipping(), Flipping()
    x_2 = torch.tensor([1.0, 2.0], requires_grad=True)
    y = checkpoint(first, x_2, use_reentrant=False, context_fn=same_routing)
    z = checkpoint(second, torch.stack([y, y - 1]), use_reentrant=False, context_fn=same_routing)
    z.backward()
    assert first.chosen == [1, 1] and second.chosen == [0, 0]
    assert not recomputing()
