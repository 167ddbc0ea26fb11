"""Budgets per layer: exact totals, the published ERK densities, saturation, errors."""

from __future__ import annotations

import json
import math
import random
from fractions import Fraction

import pytest

from prune_lab.foundations.errors import UserError
from prune_lab.pruning.masks.distributions import (
    LayerSize,
    allocate,
    clamp_counts,
    file_counts,
    largest_remainder,
    load_densities,
    num_keep_total,
)

CONV1, CONV2, FC = LayerSize("conv1", (16, 3, 3, 3)), LayerSize("conv2", (32, 16, 3, 3)), LayerSize("fc", (10, 32))
EXAMPLE = [CONV1, CONV2, FC]  # rigl.md example A: 432 + 4608 + 320 = 5360 weights


def resnet50() -> list[LayerSize]:
    """Return the 54 layers of ResNet-50 in torchvision's order (25,502,912 weights)."""
    layers, width_in = [LayerSize("conv1", (64, 3, 7, 7))], 64
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            layers += [
                LayerSize(f"{name}.conv1", (width, width_in, 1, 1)),
                LayerSize(f"{name}.conv2", (width, width, 3, 3)),
                LayerSize(f"{name}.conv3", (4 * width, width, 1, 1)),
            ]
            if block == 0:
                layers.append(LayerSize(f"{name}.downsample.0", (4 * width, width_in, 1, 1)))
            width_in = 4 * width
    return [*layers, LayerSize("fc", (1000, 2048))]


def total(layers: list[LayerSize]) -> int:
    return sum(layer.size for layer in layers)


def spread(distribution: str, layers: list[LayerSize], sparsity: float, **options) -> dict[str, int]:
    return allocate(distribution, layers, num_keep_total(total(layers), sparsity), **options)


@pytest.mark.parametrize(
    ("weights", "sparsity", "kept"),
    [
        (10, 0.9, 1), (15, 0.9, 2), (25, 0.9, 2), (35, 0.9, 4),  # 1.5, 2.5, 3.5: halves to even
        (5, 0.7, 2), (3, 0.5, 2), (1, 0.5, 0), (25_502_912, 0.8, 5_100_582), (7, 1e-05, 7),
    ],
)  # fmt: skip
def test_total_is_rounded_in_decimals(weights, sparsity, kept):
    assert num_keep_total(weights, sparsity) == kept


def test_example_a_without_saturation():
    assert spread("erk", EXAMPLE, 0.95) == {"conv1": 55, "conv2": 120, "fc": 93}  # 55.37, 119.60, 93.02
    assert spread("erk", EXAMPLE, 0.9) == {"conv1": 111, "conv2": 239, "fc": 186}  # 110.74, 239.21, 186.05


def test_example_a_with_saturation():
    assert spread("erk", EXAMPLE, 0.8) == {"conv1": 238, "conv2": 514, "fc": 320}  # 237.97, 514.03, full
    assert spread("erk", EXAMPLE, 0.5) == {"conv1": 432, "conv2": 1928, "fc": 320}


def test_example_a_er_ignores_the_kernel():
    counts = spread("er", EXAMPLE, 0.8)  # densities 0.657881, 0.155814, 0.218140
    assert counts == {"conv1": 284, "conv2": 718, "fc": 70}


def test_first_layer_dense_and_paid_for():
    assert spread("erk", EXAMPLE, 0.8, first_layer="dense_compensated") == {"conv1": 432, "conv2": 360, "fc": 280}
    counts = spread("uniform", EXAMPLE, 0.8, first_layer="dense_compensated")
    assert counts["conv1"] == 432 and sum(counts.values()) == 1072
    assert counts["conv2"] == pytest.approx(640 * 4608 / 4928, abs=1)


def test_power_zero_is_uniform_and_a_huge_power_fails_with_a_message():
    assert spread("erk", EXAMPLE, 0.9, power=0.0) == spread("uniform", EXAMPLE, 0.9)
    message = r"conv1 would keep no weight; the reachable maximum is 0\.859514"  # 320 + 432 + 1 of 5360
    with pytest.raises(UserError, match=message):
        spread("erk", EXAMPLE, 0.95, power=1000.0)


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
@pytest.mark.parametrize("first_layer", ["sparse", "dense_compensated"])
@pytest.mark.parametrize("layers", [EXAMPLE, resnet50()], ids=["example", "resnet50"])
def test_totals_are_exact_for_every_density(distribution, first_layer, layers):
    for percent in range(1, 100):
        sparsity = percent / 100
        budget = num_keep_total(total(layers), sparsity)
        if first_layer == "dense_compensated" and budget < layers[0].size + 100:
            continue
        counts = allocate(distribution, layers, budget, first_layer=first_layer)
        assert sum(counts.values()) == budget
        assert all(1 <= counts[layer.name] <= layer.size for layer in layers)


def water_filling(layers: list[LayerSize], budget: int) -> dict[str, Fraction]:
    """Return the exact solution of sum min(eps d, N) = budget, by going through the saturation points."""
    order = sorted(layers, key=lambda layer: Fraction(layer.size, sum(layer.shape)))
    for index in range(len(order)):
        eps = Fraction(budget - total(order[:index]), sum(sum(layer.shape) for layer in order[index:]))
        if eps * sum(order[index].shape) <= order[index].size:
            break
    return {layer.name: min(eps * sum(layer.shape), Fraction(layer.size)) for layer in layers}


@pytest.mark.parametrize("sparsity", [0.02, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_erk_is_water_filling_within_one_weight(sparsity):
    layers = resnet50()
    budget = num_keep_total(total(layers), sparsity)
    exact, counts = water_filling(layers, budget), allocate("erk", layers, budget)
    assert all(abs(counts[name] - exact[name]) < 1 for name in counts)


def test_order_of_layers_does_not_matter_beyond_a_rounded_weight():
    layers = resnet50()
    shuffled = random.Random(0).sample(layers, len(layers))
    straight, mixed = spread("erk", layers, 0.8), spread("erk", shuffled, 0.8)
    assert max(abs(straight[name] - mixed[name]) for name in straight) <= 1


def test_density_follows_raw_density_and_full_budget_is_dense():
    layers = resnet50()
    counts = spread("erk", layers, 0.9)
    by_raw = sorted(layers, key=lambda layer: sum(layer.shape) / layer.size)
    densities = [counts[layer.name] / layer.size for layer in by_raw]
    assert all(later >= earlier - 1e-3 for earlier, later in zip(densities, densities[1:], strict=False))
    assert allocate("erk", layers, total(layers)) == {layer.name: layer.size for layer in layers}


SATURATED = {
    0.8: ["layer1.0.conv1", "layer1.0.conv3", "layer1.0.downsample.0", "layer1.1.conv1", "layer1.1.conv3",
          "layer1.2.conv1", "layer1.2.conv3", "layer2.0.conv1"],
    0.9: ["layer1.0.conv1"],
    0.95: [],
}  # fmt: skip
EPS = {0.8: 99.561, 0.9: 48.786, 0.95: 24.3716, 0.965: 17.0601, 0.99: 4.8743}
DENSITIES = {  # (out, in, k, k) -> number of layers, ERK density at sparsity 0.8, 0.9, 0.95
    (64, 3, 7, 7): (1, 0.8572, 0.4200, 0.2098),
    (64, 64, 1, 1): (1, 1, 1, 0.7735),
    (64, 64, 3, 3): (3, 0.3619, 0.1773, 0.0886),
    (256, 64, 1, 1): (4, 1, 0.9588, 0.4790),
    (64, 256, 1, 1): (2, 1, 0.9588, 0.4790),
    (128, 256, 1, 1): (1, 1, 0.5747, 0.2871),
    (128, 128, 3, 3): (4, 0.1769, 0.0867, 0.0433),
    (512, 128, 1, 1): (4, 0.9753, 0.4779, 0.2387),
    (128, 512, 1, 1): (3, 0.9753, 0.4779, 0.2387),
    (512, 256, 1, 1): (1, 0.5849, 0.2866, 0.1432),
    (256, 512, 1, 1): (1, 0.5849, 0.2866, 0.1432),
    (256, 256, 3, 3): (6, 0.0874, 0.0428, 0.0214),
    (1024, 256, 1, 1): (6, 0.4869, 0.2386, 0.1192),
    (256, 1024, 1, 1): (5, 0.4869, 0.2386, 0.1192),
    (1024, 512, 1, 1): (1, 0.2921, 0.1431, 0.0715),
    (512, 1024, 1, 1): (1, 0.2921, 0.1431, 0.0715),
    (512, 512, 3, 3): (3, 0.0435, 0.0213, 0.0106),
    (2048, 512, 1, 1): (3, 0.2433, 0.1192, 0.0595),
    (512, 2048, 1, 1): (2, 0.2433, 0.1192, 0.0595),
    (2048, 1024, 1, 1): (1, 0.1459, 0.0715, 0.0357),
    (1000, 2048): (1, 0.1482, 0.0726, 0.0363),
}


@pytest.mark.parametrize("sparsity", sorted(EPS))
def test_resnet50_erk_scale(sparsity):
    layers = resnet50()
    counts = spread("erk", layers, sparsity)
    free = [layer for layer in layers if counts[layer.name] < layer.size]
    eps = sum(counts[layer.name] for layer in free) / sum(sum(layer.shape) for layer in free)
    assert eps == pytest.approx(EPS[sparsity], rel=1e-5)
    if sparsity in SATURATED:
        assert [layer.name for layer in layers if counts[layer.name] == layer.size] == SATURATED[sparsity]


@pytest.mark.parametrize("column", [0, 1, 2])
def test_resnet50_erk_densities(column):
    layers = resnet50()
    counts = spread("erk", layers, (0.8, 0.9, 0.95)[column])
    for shape, (number, *expected) in DENSITIES.items():
        found = [counts[layer.name] for layer in layers if layer.shape == shape]
        assert len(found) == number
        for count in found:
            # four printed decimals and a whole number of weights
            assert count / math.prod(shape) == pytest.approx(expected[column], abs=5.1e-5 + 1 / math.prod(shape))
    assert sum(number for number, *_ in DENSITIES.values()) == len(layers) == 54


def test_too_small_a_budget_names_the_layer_and_a_reachable_maximum():
    layers = [LayerSize("wide", (1000, 1000)), LayerSize("tiny", (2, 2))]
    with pytest.raises(UserError, match=r"method\.sparsity is out of reach: tiny would keep no weight") as caught:
        spread("uniform", layers, 0.999)
    reachable = float(str(caught.value).split("maximum is ")[1].split()[0])
    assert min(spread("uniform", layers, reachable).values()) == 1
    with pytest.raises(UserError):
        spread("uniform", layers, reachable + 1e-5)


def test_dense_first_layer_beyond_the_budget_is_refused():
    with pytest.raises(UserError, match="the first one all; the reachable maximum is 0.919"):
        spread("erk", EXAMPLE, 0.95, first_layer="dense_compensated")  # 432 + 1 + 1 of 5360


def test_more_than_everything_is_refused_at_once():
    with pytest.raises(ValueError, match="cannot keep 6000 of 5360"):
        allocate("erk", EXAMPLE, 6000)


def test_largest_remainder_gives_ties_to_earlier_layers():
    sizes = {"a": 9, "b": 9, "c": 9}
    assert largest_remainder({"a": 1.5, "b": 1.5, "c": 2.0}, sizes, 5) == {"a": 2, "b": 1, "c": 2}
    assert largest_remainder({"a": 8.9, "b": 9.0, "c": 0.1}, sizes, 18) == {"a": 9, "b": 9, "c": 0}


def test_clamped_counts_stay_between_their_limits():
    low, high = {"a": 1, "b": 2}, {"a": 5, "b": 6}
    assert clamp_counts({"a": 9, "b": 0}, low=low, high=high, total=8) == {"a": 5, "b": 3}
    with pytest.raises(ValueError, match="between 3 and 11"):
        clamp_counts({"a": 1, "b": 2}, low=low, high=high, total=12)


NAMES = {"conv1": "conv1.weight", "fc": "fc.weight"}


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_densities_come_from_a_file(tmp_path, suffix):
    path = tmp_path / f"densities.{suffix}"
    path.write_text(json.dumps({"fc": 1, "conv1": 0.25}))
    assert load_densities(str(path), NAMES) == {"conv1.weight": 0.25, "fc.weight": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{conv1: 0.5}", "no density for fc"),
        ("{conv1: 0.5, fc: 0.5, fd: 1}", r"fd is no eligible layer \(did you mean 'fc'\?\)"),
        ("{conv1: 0, fc: 0.5}", r"conv1 must lie in \(0, 1\], got 0"),
        ("{conv1: true, fc: 0.5}", "conv1 must lie in"),
        ("{conv1: .nan, fc: 0.5}", "conv1 must lie in"),
        ("[1, 2]", "must hold a mapping"),
        ("{", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "densities.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_densities(str(path), NAMES)
    assert "method.densities" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_densities(str(tmp_path / "none.yaml"), NAMES)


def test_file_counts_are_exact_and_must_agree_with_the_target():
    densities = {"conv1": 0.551, "conv2": 0.1116, "fc": 1.0}  # sparsity 0.80000 of example A, rounded
    counts = file_counts(EXAMPLE, densities, target=0.8, sparsity=0.8)
    assert sum(counts.values()) == 1072
    assert counts == {"conv1": 238, "conv2": 514, "fc": 320}
    with pytest.raises(UserError, match=r"asks for sparsity 0\.79\d+, method\.sparsity for 0\.9"):
        file_counts(EXAMPLE, densities, target=0.9, sparsity=0.9)


@pytest.mark.parametrize(
    ("sparsity", "counts"),
    [(0.0, [432, 4608, 320]), (0.4, [335, 2561, 320]), (0.1, [408, 4096, 320]), (0.8, [238, 514, 320])],
)  # at 0.1 the layers' ways stand at 407.75, 4096.25 and 320
def test_layers_go_straight_to_the_densities_of_a_file(sparsity, counts):
    densities = {"conv1": 0.551, "conv2": 0.1116, "fc": 1.0}
    assert list(file_counts(EXAMPLE, densities, target=0.8, sparsity=sparsity).values()) == counts


def test_a_file_goes_no_further_than_its_densities():
    with pytest.raises(ValueError, match=r"between 0 and the target 0\.8, got 0\.9"):
        file_counts(EXAMPLE, {"conv1": 0.551, "conv2": 0.1116, "fc": 1.0}, target=0.8, sparsity=0.9)
