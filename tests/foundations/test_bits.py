"""Zeros without a sign."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_lab.foundations.bits import bits_of, make_zeros_positive


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_negative_zeros_become_positive_and_all_other_bits_stay(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 3, dtype=dtype)
    model.register_buffer("count", torch.tensor([0, -1]))
    bits = bits_of(model.weight.detach()).view(-1)
    bits[0] = torch.iinfo(bits.dtype).min  # -0.0
    bits[1] = torch.iinfo(bits.dtype).min + 1  # the number below it, which is no zero
    expected = bits.clone()
    expected[0] = 0
    make_zeros_positive(model)
    assert torch.equal(bits, expected) and model.count.tolist() == [0, -1]
