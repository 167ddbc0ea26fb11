"""Recurrent language models: the network written out step by step, its state, its costs, its masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prune_lab import models
from prune_lab.accounting.costs import profile
from prune_lab.accounting.eligibility import select_layers
from prune_lab.foundations.errors import UserError
from prune_lab.pruning.masks.mask_set import MaskSet
from tests.helpers.models import node

SMALL = {"embedding": 6, "hidden": 5}


def built(name: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    readout = [7, 6] if name == "gru_lm" else [6]
    config = models.parse_config(node(name) | SMALL | {"readout": readout} | changes)
    return models.build(config, num_classes=11, image_size=0).double()


def gru_by_hand(model: nn.Module, symbols: Tensor, layers: int) -> Tensor:
    """Return the logits, symbol by symbol and gate by gate (Cho et al. 2014 in torch's form)."""
    values = model.embedding.weight[symbols]
    for layer in range(layers):
        (w_ih, w_hh), (b_ih, b_hh) = (
            [getattr(model.rnn, f"{kind}_{part}_l{layer}") for part in ("ih", "hh")] for kind in ("weight", "bias")
        )
        state, states = torch.zeros(len(symbols), w_hh.shape[1], dtype=values.dtype), []
        for time in range(symbols.shape[1]):
            reset_i, update_i, new_i = (values[:, time] @ w_ih.T + b_ih).chunk(3, dim=1)
            reset_h, update_h, new_h = (state @ w_hh.T + b_hh).chunk(3, dim=1)
            update = (update_i + update_h).sigmoid()
            new = (new_i + (reset_i + reset_h).sigmoid() * new_h).tanh()
            state = (1 - update) * new + update * state
            states.append(state)
        values = torch.stack(states, dim=1)
    first, second = model.readout
    values = (values @ first.weight.T + first.bias).relu() @ second.weight.T + second.bias
    return values @ model.embedding.weight.T + model.bias


@pytest.mark.parametrize("layers", [1, 2])
def test_masked_training_equals_the_network_written_out(layers: int) -> None:
    model, twin = built("gru_lm", layers=layers), built("gru_lm", layers=layers)
    source = torch.Generator().manual_seed(1)
    optimizers, masks = [], []
    for network in (model, twin):
        named = dict(network.named_parameters())
        chosen = {layer.parameter: torch.rand(layer.shape, generator=source.manual_seed(2)) < 0.4
                  for layer in select_layers(network)}  # fmt: skip
        masks.append(MaskSet({name: named[name] for name in chosen}, chosen))
        masks[-1].apply()
        optimizers.append(torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9))
    for _ in range(4):
        symbols, targets = (torch.randint(11, (3, 8), generator=source) for _ in range(2))
        for outputs, optimizer, mask in zip(
            (model(symbols)[0], gru_by_hand(twin, symbols, layers)), optimizers, masks, strict=True
        ):
            optimizer.zero_grad()
            nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten()).backward()
            optimizer.step()
            mask.apply()
    for (name, weight), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, other, msg=name)
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks[0].masks.items())


@pytest.mark.parametrize("name", ["gru_lm", "lstm_lm"])
def test_a_carried_state_continues_the_sequence(name: str) -> None:
    model = built(name, layers=2).eval()
    symbols = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))
    whole, _ = model(symbols)
    first, state = model(symbols[:, :4])
    second, _ = model(symbols[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    assert not torch.allclose(model(symbols[:, 4:])[0], second)


@pytest.mark.parametrize(("name", "gates"), [("gru_lm", 3), ("lstm_lm", 4)])
def test_each_weight_costs_one_mac_per_symbol(name: str, gates: int) -> None:
    model = built(name, layers=2)
    costs = {cost.name: (cost.kind, cost.weights, cost.positions) for cost in profile(model, 0)}
    assert costs["rnn.weight_ih_l0"] == ("input matrix", gates * 5 * 6, 1)
    assert costs["rnn.weight_hh_l0"] == ("recurrent matrix", gates * 5 * 5, 1)
    assert costs["rnn.weight_ih_l1"] == ("input matrix", gates * 5 * 5, 1)
    assert costs["embedding"] == ("linear", 11 * 6, 1)  # as the output matrix; looking a symbol up costs nothing
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    assert sum(cost.macs for cost in profile(model, 0)) == sum(matrix.numel() for matrix in matrices)


def test_input_and_recurrent_matrices_and_readout_are_eligible_the_embedding_is_not() -> None:
    layers = select_layers(built("gru_lm"))
    assert [layer.name for layer in layers if layer.eligible] == [
        "rnn.weight_ih_l0", "rnn.weight_hh_l0", "readout.0", "readout.1"]  # fmt: skip
    kept = select_layers(built("gru_lm"), exclude=["rnn.weight_hh_*"])
    assert [layer.name for layer in kept if not layer.eligible] == ["rnn.weight_hh_l0"]


def test_the_published_gru_has_its_sizes() -> None:
    model = models.build(models.parse_config(node("gru_lm")), num_classes=256, image_size=0)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert shapes == {
        "embedding.weight": (256, 128), "rnn.weight_ih_l0": (1536, 128), "rnn.weight_hh_l0": (1536, 512),
        "readout.0.weight": (256, 512), "readout.1.weight": (128, 256),
    }  # fmt: skip


def test_a_tied_output_needs_the_embedding_s_width() -> None:
    with pytest.raises(UserError, match="tied=true needs as many values before the output as in the .*, 6, got 9"):
        built("gru_lm", readout=[9])
    assert built("gru_lm", readout=[9], tied=False).decoder.weight.shape == (11, 9)
