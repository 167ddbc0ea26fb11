"""Options `auto` resolved for the machine, and work in the precision that was chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_lab.foundations.errors import UserError
from prune_lab.training.device_config import DeviceConfig, resolve_device_config
from tests.helpers.runs import compose


def resolved(*overrides: str) -> DeviceConfig:
    return resolve_device_config(compose("dataset=fake", "trainer.device=cpu", *overrides).trainer)


@pytest.mark.parametrize("fast", [True, False])
def test_auto_takes_bf16_with_channels_last_where_the_processor_has_it(monkeypatch, fast):
    monkeypatch.setattr("prune_lab.training.device_config._has_bf16", lambda device: fast)
    assert resolved() == DeviceConfig("cpu", "bf16" if fast else "fp32", fast, False)


def test_what_is_chosen_is_kept():
    assert resolved("trainer.precision=fp32", "trainer.channels_last=true") == DeviceConfig("cpu", "fp32", True, False)
    contiguous = resolved("trainer.precision=bf16", "trainer.channels_last=false")
    assert contiguous == DeviceConfig("cpu", "bf16", False, False)


@pytest.mark.parametrize("option, message", [
    ("trainer.precision=fp16", "trainer.precision=fp16 needs a GPU"),
    ("trainer.device=cuda:99", "trainer.device=cuda:99: this machine has"),
    ("trainer.device=tpu", "trainer.device=tpu is not allowed"),
])  # fmt: skip
def test_what_the_machine_cannot_do_is_refused_in_one_line(option, message):
    with pytest.raises(UserError, match=message) as refusal:
        resolved(option)
    assert "\n" not in str(refusal.value)


def test_identity_names_the_kind_of_device_not_its_number():
    one, other = (DeviceConfig(f"cuda:{index}", "bf16", True, False).identity() for index in (0, 3))
    assert one == other and one["device"] == "cuda"


def test_identity_tells_runs_that_compute_together_from_single_ones():
    alone, together = (DeviceConfig("cpu", "fp32", False, False, vectorised).identity() for vectorised in (False, True))
    assert alone != together


def test_autocast_computes_in_the_format():
    image, weight = torch.ones(2, 2), torch.ones(2, 2)
    with DeviceConfig("cpu", "bf16", False, False).autocast():
        assert (image @ weight).dtype == torch.bfloat16
    with DeviceConfig("cpu", "fp32", False, False).autocast():
        assert (image @ weight).dtype == torch.float32


def test_kernels_of_rank_5_and_shared_weights_are_placed_beside_those_of_images():
    model = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv3d(1, 4, 3), nn.Conv2d(3, 8, 3), nn.Linear(4, 4)])
    model[2].weight = model[0].weight
    values = [parameter.clone() for parameter in model.parameters()]
    assert DeviceConfig("cpu", "fp32", True, False).placed(model) is model
    assert model[0].weight is model[2].weight
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[1].weight.is_contiguous()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), values, strict=True))
