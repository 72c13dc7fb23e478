"""A rank's part of a training checkpoint, written and read: LoRA weights without padding, on any number of ranks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from train.checkpoints.reader import TensorFile
from train.checkpoints.resume import Part
from train.checkpoints.writer import SafetensorsWriter

A, B = torch.arange(1.0, 31).view(2, 3, 5), torch.arange(1.0, 25).view(2, 4, 3)  # 2 experts, rank 3


def padded(factor: Tensor, to: int) -> Tensor:
    """As it is trained: A [2, to, 5] or B [2, 4, to]."""
    return pad(factor, (0, 0, 0, to - 3)) if factor is A else pad(factor, (0, to - 3))


def parts(factor: Tensor, to: int, ranks: int) -> list[Part]:
    whole, width = padded(factor, to), 5 if factor is A else 1
    size = -(-whole.numel() // ranks)
    starts = [min(rank * size, whole.numel()) for rank in range(ranks)]
    return [
        Part("x", None, tuple(factor.shape), start, min(size, whole.numel() - start), to * width, 3 * width)
        for start in starts
    ]


def test_places_of_padded_elements_in_a_save_by_hand():
    (part,) = parts(B, 4, 1)  # rows of three real elements and one of padding
    assert [part.place(element) for element in range(9)] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    (part,) = parts(A, 4, 1)  # of an expert three real rows of five, and one of padding
    assert [part.place(element) for element in (14, 15, 19, 20, 21)] == [14, 15, 15, 15, 16]


@pytest.mark.parametrize("factor", [A, B], ids="AB")
@pytest.mark.parametrize(("wrote", "reads"), [((4, 1), (8, 3)), ((8, 3), (4, 2)), ((4, 7), (4, 5)), ((3, 2), (8, 50))])
def test_a_save_of_one_padding_and_number_of_ranks_is_read_with_another(tmp_path: Path, factor, wrote, reads):
    """(padded rank, ranks): fp32 pads 3 to 4, bf16 to 8."""
    to, ranks = wrote
    whole = padded(factor, to).flatten()
    layout = {"x": (torch.float32, tuple(factor.shape))}
    writer = SafetensorsWriter(tmp_path / "state.safetensors", layout)
    for part in parts(factor, to, ranks):
        unused = torch.full((2,), torch.nan)  # a partition may be longer than what it holds
        part.write(writer, "x", torch.cat([whole[part.start : part.start + part.count], unused]))
    writer.check_whole()
    writer.close()
    writer.publish()
    saved = TensorFile(tmp_path / "state.safetensors")
    everything = torch.empty(factor.shape)
    saved.read("x", 0, everything)
    assert torch.equal(everything, factor)

    to, ranks = reads
    found = [part.read(saved, "x", part.count + 2) for part in parts(factor, to, ranks)]
    assert not any(partition[-2:].any() for partition in found)
    together = torch.cat([partition[:-2] for partition in found])
    assert torch.equal(together, padded(factor, to).flatten())
