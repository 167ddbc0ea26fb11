"""The one counter: hand-computed layers, published totals, FLOPs multipliers of papers."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from prune_lab.accounting.costs import LayerCost, count_parameters, dense_macs, layer_table, profile, sparse_macs
from prune_lab.accounting.eligibility import select_layers
from prune_lab.accounting.training import TrainingCost, rigl_training_ratio
from prune_lab.models import build, parse_config
from prune_lab.pruning.masks.distributions import LayerSize, allocate, num_keep_total
from prune_lab.pruning.masks.sparsity_schedules import cubic_sparsity


def ghost(name: str) -> nn.Module:
    """Return a torchvision network without memory."""
    with torch.device("meta"):
        return torchvision.models.get_model(name)


def layout(model: nn.Module, sparsity: float, distribution: str, *, dense_first: bool) -> dict[str, int]:
    """Return kept weights per eligible parameter."""
    chosen = [layer for layer in select_layers(model, dense_first=dense_first) if layer.eligible]
    sizes = [LayerSize(layer.parameter, layer.shape) for layer in chosen]
    return allocate(distribution, sizes, num_keep_total(sum(size.size for size in sizes), sparsity))


def ratio(costs: list[LayerCost], kept: dict[str, int]) -> float:
    return sparse_macs(costs, kept) / dense_macs(costs)


# --- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "positions", "macs"),
    [
        (nn.Conv2d(3, 8, 3), 6 * 6, 8 * 27 * 36),
        (nn.Conv2d(3, 8, 3, padding=1, bias=False), 8 * 8, 8 * 27 * 64),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), 4 * 4, 8 * 27 * 16),
        (nn.Conv2d(3, 8, 3, dilation=2), 4 * 4, 8 * 27 * 16),
        (nn.Conv2d(3, 6, (1, 5), groups=3), 8 * 4, 6 * 5 * 32),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), 1, 1920),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.AvgPool2d(2)), 64, 12 * 64),
    ],
)
def test_single_layers_by_hand(layer, positions, macs):
    (cost,) = profile(layer, 8)
    assert (cost.positions, cost.macs) == (positions, macs)
    assert cost.weights == torch.tensor(cost.shape).prod()


def test_a_layer_used_twice_counts_twice_and_an_unused_one_not():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.idle = nn.Linear(3, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(images))

    (cost,) = profile(Twice(), 4)
    assert (cost.parameter, cost.macs) == ("conv.weight", 2 * 81 * 16)


def test_a_weight_shared_by_two_layers_is_one_entry_and_pruned_in_both():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, stride=2)
            self.second.weight = self.first.weight

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(images))

    (cost,) = profile(Tied(), 4)
    assert (cost.parameter, cost.weights, cost.positions) == ("first.weight", 9, 16 + 4)
    assert sparse_macs([cost], {"first.weight": 2}) == 2 * 20


def test_profiling_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    profile(model, 8)
    assert model.training and all(module.training for module in model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model)


def test_attention_projections_count_although_their_layers_are_not_called():
    # ViT-B/32 at 224: 12 blocks of 12 d^2 weights at 50 tokens, the patches, the head. Dense total by hand.
    model = ghost("vit_b_32")
    costs = profile(model, 224)
    assert dense_macs(costs) == 12 * 12 * 768**2 * 50 + 3072 * 768 * 49 + 768 * 1000
    counted = {cost.parameter for cost in costs}
    assert {layer.parameter for layer in select_layers(model)} <= counted
    rows = layer_table(select_layers(model), costs, {})
    assert sum(row["macs_dense"] for row in rows) == dense_macs(costs)


@pytest.mark.parametrize(
    ("name", "macs", "weights"),
    [
        ("resnet18", 1_814_073_344, 11_678_912),
        ("resnet50", 4_089_184_256, 25_502_912),
        ("vgg16_bn", 15_470_264_320, 138_344_128),
    ],
)
def test_totals_of_well_known_networks(name, macs, weights):
    costs = profile(ghost(name), 224)
    assert dense_macs(costs) == macs
    assert sum(cost.weights for cost in costs) == weights


@pytest.mark.parametrize(
    "name", ["resnet34", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "shufflenet_v2_x1_0"]
)
def test_totals_agree_with_those_torchvision_publishes(name):
    published = torchvision.models.get_model_weights(name).DEFAULT.meta["_ops"]  # 10^9 MACs, three decimals
    assert dense_macs(profile(ghost(name), 224)) / 1e9 == pytest.approx(published, abs=1.1e-3)


def test_parameters_count_shared_ones_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert count_parameters(model) == 24
    model[1].weight = model[0].weight
    assert count_parameters(model) == 15


def test_layer_table_adds_up():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(64, 2))
    costs, layers = profile(model, 8), select_layers(model)
    kept = {"0.weight": 54, "3.weight": 32}
    rows = layer_table(layers, costs, kept)
    assert [row["kept"] for row in rows] == [54, 36, 32]
    assert [row["density"] for row in rows] == [0.5, 1.0, 0.25]
    assert [row["macs_kept"] for row in rows] == [54 * 36, 36 * 16, 32]
    assert sum(row["macs_kept"] for row in rows) == sparse_macs(costs, kept)
    assert [bool(row["reason"]) for row in rows] == [False, True, False]
    unknown = layer_table(layers, costs, None)
    assert all(row["kept"] is row["density"] is row["macs_kept"] is None for row in unknown)


# --- published multipliers -------------------------------------------------------------------------------------------

RESNET50 = [  # sparsity, distribution, first layer outside the budget, inference x in MACs, official x, RigL train x
    (0.8, "uniform", True, 0.2231, 0.2254, 0.2279),
    (0.8, "erk", False, 0.4138, 0.4153, 0.4172),
    (0.9, "uniform", True, 0.1260, 0.1285, 0.1314),
    (0.9, "erk", False, 0.2418, 0.2431, 0.2456),
    (0.95, "uniform", True, 0.0774, 0.0801, 0.0831),
    (0.95, "erk", False, 0.1217, 0.1230, 0.1259),
    (0.965, "uniform", True, 0.0628, 0.0656, 0.0687),
    (0.965, "erk", False, 0.0852, 0.0865, 0.0895),
    (0.965, "erk", True, 0.1099, 0.1125, 0.1154),
    (0.99, "erk", True, 0.0520, 0.0548, 0.0579),
]


def official_flops(costs: list[LayerCost], kept: dict[str, int]) -> float:
    """Return FLOPs by the RigL authors' count: (2 fan_in density + 1) per output, conv1 with 115 x 115 of them."""
    total = 0.0
    for cost in costs:
        positions = 115 * 115 if cost.name == "conv1" else cost.positions
        total += (2 * kept.get(cost.parameter, cost.weights) + cost.shape[0]) * positions
    return total


@pytest.fixture(scope="module")
def resnet50() -> tuple[nn.Module, list[LayerCost]]:
    model = ghost("resnet50")
    return model, profile(model, 224)


@pytest.mark.parametrize(("sparsity", "distribution", "dense_first", "macs", "official", "train"), RESNET50)
def test_resnet50_multipliers_of_the_rigl_paper(resnet50, sparsity, distribution, dense_first, macs, official, train):
    model, costs = resnet50
    kept = layout(model, sparsity, distribution, dense_first=dense_first)
    assert ratio(costs, kept) == pytest.approx(macs, abs=5.1e-5)
    dense, sparse = official_flops(costs, {}), official_flops(costs, kept)
    assert dense == pytest.approx(8.2023e9, rel=1e-5)
    assert sparse / dense == pytest.approx(official, abs=5.1e-5)
    assert rigl_training_ratio(sparse, dense, 100) == pytest.approx(train, abs=5.1e-5)


def test_gradual_pruning_of_resnet50_costs_what_the_rigl_paper_says(resnet50):
    model, costs = resnet50
    for sparsity, expected in ((0.8, 0.5603), (0.9, 0.5053)):
        flops = []
        for step in range(0, 33_000, 1_000):  # the paper's mean takes both ends in: 33 points
            level = cubic_sparsity(step, begin=10_000, end=25_000, initial=0, final=sparsity)
            kept = layout(model, level, "uniform", dense_first=True) if level else {}
            flops.append(official_flops(costs, kept))
        assert sum(flops) / len(flops) / official_flops(costs, {}) == pytest.approx(expected, abs=5.1e-5)


WRN = {0.5: (0.5014, 0.7282, 12), 0.8: (0.2022, 0.3521, 5), 0.9: (0.1025, 0.1736, 4), 0.95: (0.0527, 0.0881, 3)}
MOBILE = {
    "mobilenet_v2": (300.77, {0.75: (0.3287, 0.6809, 12), 0.85: (0.2392, 0.5609, 6), 0.9: (0.1944, 0.4557, 2),
                              0.95: (0.1497, 0.2931, 0)}),
    "mobilenet_v3_large": (216.59, {0.75: (0.3325, 0.7172, 18), 0.85: (0.2434, 0.5766, 13), 0.9: (0.1989, 0.4771, 8),
                                    0.95: (0.1544, 0.3204, 1)}),
    "mobilenet_v3_small": (56.51, {0.75: (0.4209, 0.8402, 24), 0.85: (0.3437, 0.6888, 10), 0.9: (0.3051, 0.5786, 4),
                                   0.95: (0.2665, 0.4163, 3)}),
}  # fmt: skip


def saturated(model: nn.Module, kept: dict[str, int]) -> int:
    named = dict(model.named_parameters())
    return sum(count == named[name].numel() for name, count in kept.items())


@pytest.mark.parametrize("name", MOBILE)
def test_mobilenets_with_first_and_depthwise_convolutions_dense(name):
    model = ghost(name)
    costs = profile(model, 224)
    millions, rows = MOBILE[name]
    assert dense_macs(costs) / 1e6 == pytest.approx(millions, abs=0.01)
    for sparsity, (uniform, erk, full) in rows.items():
        assert ratio(costs, layout(model, sparsity, "uniform", dense_first=True)) == pytest.approx(uniform, abs=6e-5)
        kept = layout(model, sparsity, "erk", dense_first=True)
        assert ratio(costs, kept) == pytest.approx(erk, abs=6e-5)
        assert saturated(model, kept) == full


def from_catalog(name: str) -> nn.Module:
    from pathlib import Path

    from omegaconf import OmegaConf

    file = Path(__file__).parents[2] / "conf" / "model" / f"{name}.yaml"
    with torch.device("meta"):
        return build(parse_config(OmegaConf.to_container(OmegaConf.load(file))), num_classes=10, image_size=32)


def test_resnet110_with_every_layer_in_the_budget():
    model = from_catalog("resnet110")
    costs = profile(model, 32)
    assert sum(cost.weights for cost in costs) == 1_719_856
    assert dense_macs(costs) / 1e6 == pytest.approx(252.89, abs=0.01)
    rows = {0.5: (0.7356, 39), 0.8: (0.3693, 2), 0.9: (0.1850, 2), 0.95: (0.0922, 1), 0.98: (0.0369, 0)}
    for sparsity, (erk, full) in rows.items():
        kept = layout(model, sparsity, "erk", dense_first=False)
        # 36 layers of one shape round to whole weights in the same direction: 0.036834 for 0.036852 at 0.98
        assert ratio(costs, kept) == pytest.approx(erk, abs=7e-5)
        assert saturated(model, kept) == full
        kept = layout(model, sparsity, "uniform", dense_first=False)
        assert ratio(costs, kept) == pytest.approx(1 - sparsity, abs=6e-5)


def test_wide_resnet_22_2():
    model = from_catalog("wrn_22_2")
    costs = profile(model, 32)
    assert sum(cost.weights for cost in costs) == 1_076_912
    assert 2 * dense_macs(costs) / 1e6 == pytest.approx(315.5, abs=0.1)
    for sparsity, (uniform, erk, full) in WRN.items():
        assert ratio(costs, layout(model, sparsity, "uniform", dense_first=True)) == pytest.approx(uniform, abs=6e-5)
        kept = layout(model, sparsity, "erk", dense_first=False)
        assert ratio(costs, kept) == pytest.approx(erk, abs=6e-5)
        assert saturated(model, kept) == full


# --- training cost ---------------------------------------------------------------------------------------------------


def test_training_cost_of_ordinary_and_update_steps():
    cost = TrainingCost()
    cost.add(10, 7)
    assert cost.total == 10 * 3 * 7
    cost.add(10, 7, dense_gradient=20)
    assert cost.total == 210 + 10 * (2 * 7 + 20)
    other = TrainingCost()
    other.load_state_dict(cost.state_dict())
    assert other.total == cost.total and type(other.total) is int


@pytest.mark.parametrize(("density", "expected"), [(0.2, 0.20264), (0.1, 0.10297), (1.0, 1.0)])
def test_rigl_formula(density, expected):
    assert rigl_training_ratio(round(density * 1000), 1000, 100) == pytest.approx(expected, abs=5e-6)


def test_ledger_equals_the_formula_when_updates_never_stop():
    cost = TrainingCost()
    for step in range(101 * 5):
        cost.add(1, 200, dense_gradient=1000 if step % 101 == 0 else None)
    assert cost.total / (3 * 1000 * 505) == pytest.approx(rigl_training_ratio(200, 1000, 100))


def test_costs_that_are_still_on_the_device_add_up_to_the_same():
    on_host, deferred = TrainingCost(), TrainingCost()
    for images, forward, dense in ((4, 10, None), (4, 7, 20), (2, 10**12, None)):
        on_host.add(images, forward, dense)
        deferred.add(images, torch.tensor(forward) if forward != 7 else forward, dense)
    assert deferred.state_dict() == on_host.state_dict() == {
        "total": 3 * 40 + 4 * (14 + 20) + 6 * 10**12, "images": 10, "forward": 40 + 28 + 2 * 10**12,
    }  # fmt: skip
    deferred.total += 5
    assert (deferred.total, deferred.mean_forward) == (on_host.total + 5, on_host.mean_forward)
