"""Static sparse training: a mask is drawn once, exactly to budget."""

from __future__ import annotations

import torch

from tests.helpers.method_runs import configure, finish, make, watch
from tests.helpers.toys import OneLayer, open_phase


def static(**changes):
    return make("static", **{"distribution": "uniform", "first_layer": "sparse"} | changes)


def drawn(seed: int = 0) -> torch.Tensor:
    model = OneLayer(torch.randn(40, 12))
    method = static(sparsity=0.873)
    context = open_phase(model, method)
    context.seed = seed
    method.setup(context)
    return context.masks.masks["fc.weight"]


def test_mask_has_the_exact_count_and_depends_on_the_seed_only() -> None:
    masks = [drawn(seed) for seed in (0, 0, 1, 2)]
    assert [int(mask.sum()) for mask in masks] == [61] * 4  # round(0.127 * 480)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_positions_are_equally_likely() -> None:
    share = torch.stack([drawn(seed) for seed in range(300)]).float().mean(0)
    assert torch.all((share - 61 / 480).abs() < 0.1)  # five standard deviations


def test_masks_never_change_and_cost_is_that_of_the_sparse_network(tmp_path, monkeypatch) -> None:
    digests, ratios = set(), set()

    def look(training, step: int) -> None:
        digests.add(training.context.masks.digest())
        ratios.add(training.context.cost.total / (3 * 8 * (step + 1) * training.context.forward_macs))

    watch(monkeypatch, look)
    finish(configure(tmp_path, "static"))
    assert len(digests) == 1
    assert ratios == {1.0}
