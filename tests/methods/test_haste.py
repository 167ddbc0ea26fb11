"""Merging of alike channels at run time: hand examples, against the rule written out tile by tile, counts, runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab.accounting.costs import profile
from prune_lab.cli import command as cli
from prune_lab.foundations.errors import UserError
from prune_lab.pipeline.dry_run import dry_run
from prune_lab.pipeline.saved_model import load_model, save_model
from prune_lab.pruning.dynamic import hashed_convolution, wall_clock
from prune_lab.pruning.dynamic.hashed_convolution import HashedConv2d, draw_hyperplanes, find_buckets, hash_codes, plain
from prune_lab.pruning.dynamic.merging_cost import Operations, Tally, count_operations, observe
from prune_lab.tracking.lines import summary_lines
from tests.helpers.method_runs import configure, finish, last_result, make, summary


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hashed(conv: nn.Conv2d, hyperplanes: int, **options: Any) -> HashedConv2d:
    return HashedConv2d.of(conv.eval(), num_hyperplanes=hyperplanes, **options)


def conv_of(weight: Tensor, **options: Any) -> nn.Conv2d:
    """Return a convolution without bias with the given weight [outputs, inputs, height, width]."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False, **options).eval()
    conv.weight.data = weight.clone()
    return conv


@torch.no_grad()
def merged_by_hand(layer: HashedConv2d, images: Tensor) -> tuple[Tensor, int]:
    """Return (output, number of buckets) of the rule written out, one tile of one image after the other.

    For zero padding: buckets by the signs of the centred window under the hyperplanes (a window of one value has none),
    means of the channels, sums of their kernels, a plain convolution of what is left.
    """
    pad_y, pad_x = layer.padding
    (step_y, step_x), (dil_y, dil_x), (kernel_y, kernel_x) = layer.stride, layer.dilation, layer.kernel_size
    padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y))
    output = torch.zeros_like(F.conv2d(images, layer.weight, None, layer.stride, layer.padding, layer.dilation))
    total = 0
    for n in range(len(images)):
        for top in range(0, output.shape[2], layer.tile):
            for left in range(0, output.shape[3], layer.tile):
                rows, cols = (min(layer.tile, output.shape[2] - top), min(layer.tile, output.shape[3] - left))
                height = (rows - 1) * step_y + dil_y * (kernel_y - 1) + 1
                width = (cols - 1) * step_x + dil_x * (kernel_x - 1) + 1
                window = padded[n, :, top * step_y : top * step_y + height, left * step_x : left * step_x + width]
                planes = layer.hyperplanes[:, :height, :width].double()
                members: dict[tuple | int, list[int]] = {}
                for channel in range(layer.in_channels):
                    values = window[channel].double()
                    signs = tuple(bool((plane * (values - values.mean())).sum() > 1e-9) for plane in planes)
                    members.setdefault(signs if height * width > 1 else channel, []).append(channel)
                means = torch.stack([window[chosen].mean(dim=0) for chosen in members.values()])
                sums = torch.stack([layer.weight[:, chosen].sum(dim=1) for chosen in members.values()], dim=1)
                tile = F.conv2d(means[None], sums, layer.bias, layer.stride, 0, layer.dilation)
                output[n, :, top : top + rows, left : left + cols] = tile[0]
                total += len(members)
    return output, total


# By hand


@pytest.mark.parametrize(("weights", "merged", "exact"), [
    ((1.0, 1.0, 1.0), (8.0, 14.0), (8.0, 14.0)),
    ((1.0, 0.0, 0.0), (8 / 3, 14 / 3), (1.0, 3.0)),
])  # fmt: skip
def test_three_channels_of_two_pixels(weights: tuple, merged: tuple, exact: tuple) -> None:
    """Centred (-1,1), (-2,2), (0,0); under (1,-1) the products are -2, -4 and 0: bit 0 for all three."""
    images = torch.tensor([[1.0, 3.0], [2.0, 6.0], [5.0, 5.0]]).view(1, 3, 1, 2)
    conv = conv_of(torch.tensor(weights).view(1, 3, 1, 1))
    layer = hashed(conv, 1, tile=2)
    layer.hyperplanes[0, 0] = torch.tensor([1, -1])
    assert hash_codes(images, layer.hyperplanes[:, :1, :2]).tolist() == [[0, 0, 0]]
    torch.testing.assert_close(layer(images).flatten(), torch.tensor(merged))
    torch.testing.assert_close(conv(images).flatten(), torch.tensor(exact))
    assert (layer.tally.tiles, layer.tally.buckets) == (1, 1)


def test_bits_of_a_code() -> None:
    """Centred (-1,1): the products with (1,-1), (-1,1), (0,1) are -2, 2, 1: bits 1 and 2 of three."""
    windows = torch.tensor([[1.0, 3.0], [3.0, 1.0]]).view(1, 2, 1, 2)
    planes = torch.tensor([[1, -1], [-1, 1], [0, 1]]).view(3, 1, 2)
    assert hash_codes(windows, planes).tolist() == [[0b110, 0b001]]


def test_buckets_of_codes() -> None:
    buckets = find_buckets(torch.tensor([[5, 2, 5, 0], [1, 1, 1, 1]]))
    assert buckets.order.tolist() == [[3, 1, 0, 2], [0, 1, 2, 3]]
    assert buckets.first.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert buckets.count.tolist() == [3, 1]


def test_pairs_of_equal_channels_merge_exactly() -> None:
    images = drawn(1, 4, 8, 8).repeat_interleave(2, dim=1)
    conv = conv_of(drawn(8, 8, 3, 3, seed=1), padding=1)
    layer = hashed(conv, 14)
    assert (layer(images) - conv(images)).abs().max() < 1e-5
    assert layer.tally.buckets == 4


@pytest.mark.parametrize("change", [lambda x: 3 * x, lambda x: x + 2], ids=["multiple", "shifted"])
def test_alike_channels_share_a_bucket_but_are_not_exact(change) -> None:
    image = drawn(1, 1, 8, 8)
    images = torch.cat([image, change(image)], dim=1)
    conv = conv_of(drawn(2, 2, 3, 3, seed=1))
    layer = hashed(conv, 62)
    assert (layer(images) - conv(images)).abs().max() > 0.1
    assert layer.tally.buckets == 1


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3])
def test_constant_channels_have_code_zero(value: float) -> None:
    planes = draw_hyperplanes(62, (10, 10), zero_fraction=2 / 3, seed=0)
    assert hash_codes(torch.full((1, 1, 10, 10), value), planes).tolist() == [[0]]


def test_dead_channels_merge_exactly_and_damage_what_joins_them() -> None:
    images = torch.zeros(1, 4, 8, 8)
    conv = conv_of(drawn(2, 4, 3, 3, seed=1))
    layer = hashed(conv, 14)
    images[:, 3] = drawn(8, 8)
    assert hash_codes(images, layer.hyperplanes[:, :8, :8])[0, 3] != 0
    torch.testing.assert_close(layer(images), conv(images))
    assert layer.tally.buckets == 2
    layer.hyperplanes.zero_()  # every channel has code 0
    torch.testing.assert_close(layer(images), F.conv2d(images.mean(1, keepdim=True), conv.weight.sum(1, keepdim=True)))


# The rule written out

SHAPES = {
    "padding": dict(kernel_size=3, padding=1),
    "stride": dict(kernel_size=3, padding=1, stride=2),
    "dilation": dict(kernel_size=3, padding=2, dilation=2),
    "rectangle": dict(kernel_size=(1, 3), padding=(0, 1), stride=(1, 2), dilation=(1, 2)),
    "pointwise": dict(kernel_size=1),
}


@pytest.mark.parametrize("tile", [2, 4, 8, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_buckets_are_those_of_the_rule_tile_by_tile(shape: str, tile: int) -> None:
    torch.manual_seed(0)
    images = F.relu(drawn(2, 7, 9, 11))
    layer = hashed(nn.Conv2d(7, 5, **SHAPES[shape]), 2, tile=tile)  # 4 codes for 7 channels
    expected, buckets = merged_by_hand(layer, images)
    torch.testing.assert_close(layer(images), expected, rtol=1e-4, atol=1e-5)
    assert layer.tally.buckets == buckets < 7 * layer.tally.tiles


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images, conv = F.relu(drawn(3, 8, 9, 9)), nn.Conv2d(8, 4, 3, padding=1)
    whole, parts = hashed(conv, 3, tile=4), hashed(conv, 3, tile=4)
    expected = whole(images)
    monkeypatch.setattr(hashed_convolution, "_WINDOW_VALUES", 1)
    monkeypatch.setattr(hashed_convolution, "_KERNEL_VALUES", 1)
    torch.testing.assert_close(parts(images), expected)
    assert parts.tally == whole.tally


EXACT = SHAPES | {
    "same": dict(kernel_size=4, padding="same"),
    "reflect": dict(kernel_size=3, padding=2, padding_mode="reflect"),
    "circular": dict(kernel_size=3, padding=1, padding_mode="circular", stride=2),
    "replicate": dict(kernel_size=3, padding=(1, 2), padding_mode="replicate"),
}


@pytest.mark.parametrize("shape", EXACT)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_equals_the_convolution_when_nothing_merges(shape: str) -> None:
    torch.manual_seed(0)
    images, conv = drawn(2, 6, 13, 15), nn.Conv2d(6, 3, **EXACT[shape])
    layer = hashed(conv, 62, tile=5, zero_fraction=0.1)
    torch.testing.assert_close(layer(images), conv.eval()(images), rtol=1e-4, atol=1e-4)
    assert layer.tally.buckets == 6 * layer.tally.tiles


def test_many_hyperplanes_leave_a_bucket_for_each_direction() -> None:
    """Five directions: channels that are positive multiples of each other have the same one."""
    directions = drawn(5, 8, 8)
    images = torch.stack([scale * directions[index] for index in range(5) for scale in (0.5, 1.0, 4.0)])[None]
    layer = hashed(conv_of(drawn(2, 15, 1, 1)), 62)
    layer(images)
    assert layer.tally.buckets == 5


def test_without_hyperplanes_the_mean_of_the_channels_meets_the_sum_of_the_kernels() -> None:
    images, conv = drawn(2, 6, 9, 9), nn.Conv2d(6, 4, 3, padding=1)
    expected = F.conv2d(images.mean(1, keepdim=True), conv.weight.sum(1, keepdim=True), conv.bias, padding=1)
    torch.testing.assert_close(hashed(conv, 0)(images), expected)


def test_windows_of_one_value_are_not_merged() -> None:
    """Squeeze-and-excitation: centred, nothing would be left to tell the channels apart by."""
    images, conv = drawn(4, 6, 1, 1), nn.Conv2d(6, 3, 1)
    layer = hashed(conv, 14)
    torch.testing.assert_close(layer(images), conv(images))
    operations = layer.operations()
    assert operations.macs(1.0) == operations.dense == 4 * 18


# Invariants


def test_order_of_channels_does_not_matter() -> None:
    images, conv, order = F.relu(drawn(2, 8, 8, 8)), nn.Conv2d(8, 4, 3, padding=1), torch.randperm(8)
    permuted = nn.Conv2d(8, 4, 3, padding=1)
    permuted.weight.data, permuted.bias.data = conv.weight.data[:, order], conv.bias.data
    one, other = hashed(conv, 3), hashed(permuted, 3)
    torch.testing.assert_close(one(images), other(images[:, order]))
    assert one.tally == other.tally


def test_same_seed_same_result_and_images_do_not_meet() -> None:
    images, conv = F.relu(drawn(4, 8, 9, 9)), nn.Conv2d(8, 4, 3, padding=1)
    layer, again, other = hashed(conv, 3, seed=1), hashed(conv, 3, seed=1), hashed(conv, 3, seed=2)
    output = layer(images)
    assert torch.equal(output, again(images))
    assert not torch.equal(output, other(images))
    torch.testing.assert_close(layer(images[2]), output[2])
    again.redraw(2)
    assert torch.equal(again.hyperplanes, other.hyperplanes)


@pytest.mark.parametrize("num", [0, 1, 2, 5])
def test_number_of_buckets_is_bounded(num: int) -> None:
    images, layer = drawn(8, 12, 8, 8), hashed(nn.Conv2d(12, 2, 3, padding=1), num)
    layer(images)
    assert layer.tally.tiles <= layer.tally.buckets <= layer.tally.tiles * min(12, 2**num)
    windows = drawn(8, 12, 10, 10)
    buckets = find_buckets(hash_codes(windows, layer.hyperplanes))
    assert buckets.order.sort(dim=1).values.tolist() == [list(range(12))] * 8  # every channel is in one bucket


def test_hyperplanes_are_a_saved_buffer() -> None:
    layer = hashed(nn.Conv2d(4, 4, 3), 14)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    assert layer.state_dict()["hyperplanes"].shape == (14, 10, 10)
    assert layer.hyperplanes.dtype == torch.int8


@pytest.mark.parametrize("zeros", [0.0, 2 / 3])
def test_hyperplanes_are_sparse_signs(zeros: float) -> None:
    planes = draw_hyperplanes(60, (40, 40), zero_fraction=zeros, seed=0).flatten()
    shares = [(planes == value).double().mean().item() for value in (-1, 0, 1)]
    assert sum(shares) == 1
    assert shares == pytest.approx([(1 - zeros) / 2, zeros, (1 - zeros) / 2], abs=0.01)


# In the place of a convolution


def test_takes_the_very_parameters_of_the_convolution() -> None:
    conv = nn.Conv2d(4, 4, 3, dtype=torch.float64)
    layer = hashed(conv, 14)
    assert layer.weight is conv.weight and layer.bias is conv.bias and not layer.training
    images = drawn(1, 4, 8, 8).double()
    with plain(layer):
        assert torch.equal(layer(images), conv(images))
        assert layer.tally.tiles == 0
    layer(images)
    assert layer.tally.tiles == 1


def test_without_values_it_is_the_plain_convolution() -> None:
    layer = hashed(nn.Conv2d(4, 6, 3, stride=2, device="meta"), 14)
    assert layer.hyperplanes.is_meta
    assert layer(torch.empty(2, 4, 9, 9, device="meta")).shape == (2, 6, 4, 4)
    assert hashed(nn.Conv2d(4, 6, 3, stride=2), 14)(torch.empty(0, 4, 9, 9)).shape == (0, 6, 4, 4)


def test_layouts_and_precisions() -> None:
    images, conv = drawn(2, 8, 9, 9), nn.Conv2d(8, 4, 3, padding=1)
    layer = hashed(conv, 4)
    expected = layer(images)
    conv.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(images.contiguous(memory_format=torch.channels_last)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(images).float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("shape", "options", "message"), [
    (dict(groups=2), {}, "groups must be 1"),
    ({}, dict(num_hyperplanes=-1), r"num_hyperplanes must lie in \[0, 62\], got -1"),
    ({}, dict(num_hyperplanes=63), r"num_hyperplanes must lie in \[0, 62\], got 63"),
    ({}, dict(zero_fraction=1.0), r"zero_fraction must lie in \[0, 1\), got 1.0"),
    ({}, dict(zero_fraction=-0.1), r"zero_fraction must lie in \[0, 1\), got -0.1"),
    ({}, dict(tile=0), "tile must be at least 1, got 0"),
])  # fmt: skip
def test_bad_values_are_refused(shape: dict, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HashedConv2d.of(nn.Conv2d(4, 4, 3, **shape), **{"num_hyperplanes": 14} | options)


def test_training_and_derived_classes_are_refused() -> None:
    layer = hashed(nn.Conv2d(4, 4, 3), 14)
    with pytest.raises(RuntimeError, match="inference only"):
        layer.train()(drawn(1, 4, 8, 8))
    with pytest.raises(TypeError, match="not a HashedConv2d"):
        HashedConv2d.of(layer, num_hyperplanes=14)
    assert "depends on the image" in HashedConv2d.export_refusal


# Operations


def one_tile(channels: int, buckets: int) -> Operations:
    """Return the operations of a 3x3 convolution with as many outputs as inputs on one 8x8 tile, as published."""
    tally = Tally(tiles=1, values=100, positions=64, buckets=buckets, bucket_positions=64 * buckets)
    sizes = {"channels": channels, "outputs": channels, "kernel": (3, 3)}
    return count_operations(tally, **sizes, num_hyperplanes=14, zero_fraction=2 / 3)


def test_operations_of_one_tile() -> None:
    operations = one_tile(64, 38)
    assert (operations.dense, operations.merged) == (2_359_296, 1_400_832)
    assert round(operations.hashing) == 29_867
    assert (operations.centring, operations.averaging, operations.kernel_merge) == (12_800, 6_400, 14_976)
    assert 1 - operations.macs(1.0) / operations.dense == pytest.approx(0.3791, abs=5e-5)
    assert 1 - operations.macs(0.0) / operations.dense == pytest.approx(0.4063, abs=1e-4)
    assert operations.overhead(0.5) == operations.overhead(1.0) / 2


@pytest.mark.parametrize(("channels", "percent"), [(16, 8.3), (64, 2.1), (128, 1.0), (256, 0.5), (512, 0.3)])
def test_overhead_without_any_merging(channels: int, percent: float) -> None:
    operations = one_tile(channels, channels)
    assert operations.merged == operations.dense
    assert 100 * operations.overhead(1.0) / operations.dense == pytest.approx(percent, abs=0.05)


def test_counts_of_cut_tiles_add_up() -> None:
    """A 9x9 map in tiles of 4: (4 + 4 + 1)^2 positions; windows of 6, 6 and 3 rows and columns."""
    layer = hashed(nn.Conv2d(4, 2, 3, padding=1), 0, tile=4)
    layer(drawn(5, 4, 9, 9))
    assert layer.tally == Tally(5 * 9, 5 * (6 + 6 + 3) ** 2, 5 * 81, 5 * 9, 5 * 81)


def test_a_layer_that_works_twice_per_image_counts_twice() -> None:
    shared = nn.Conv2d(6, 6, 3, padding=1)
    model = make("haste", min_channels=6, hyperplanes=0).finish(nn.Sequential(shared, nn.ReLU(), shared).eval())
    assert isinstance(model[0], HashedConv2d) and model[0] is model[2] is not shared
    seen = observe(model, {"0": model[0]}, lambda network: {"top1": float(network(drawn(3, 6, 8, 8)).shape[0])})
    (cost,) = profile(model, 8, channels=6)
    assert seen.operations["0"].dense == cost.macs == 2 * 6 * 6 * 9 * 64
    assert seen.operations["0"].merged == cost.macs / 6
    assert (seen.channels_left, seen.scores["top1"]) == (1 / 6, 3)


# Time


def test_networks_are_timed_in_turn() -> None:
    calls: list[str] = []
    forwards = [lambda images: calls.append("a"), lambda images: calls.append("b")]
    times = wall_clock.seconds_per_image(forwards, [drawn(2, 3, 4, 4)] * 2)
    assert calls == ["a", "a", "b", "b", "a", "b"]  # the first batch warms up, too
    assert all(seconds > 0 for seconds in times)


@pytest.mark.parametrize(("merged", "text"), [
    (0.004, "4 ms measured, dense 1 ms; slower than dense: 4.0 times as long"),
    (0.0005, "0.5 ms measured, dense 1 ms; 2.0 times faster"),
])  # fmt: skip
def test_a_slower_network_is_called_slower(merged: float, text: str) -> None:
    lines = summary_lines({"time/inference_s_per_image": merged, "time/inference_dense_s_per_image": 0.001})
    assert lines == [f"time per image  {text}"]


# Runs

DEEPER = ("method.min_channels=8", "method.pointwise=false", "method.hyperplanes=3")
"""the last two of three stages of the tiny network"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(configure(tmp_path_factory.mktemp("haste"), "haste", *DEEPER, "method.seeds=3"))


def rows(folder: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((folder / "layers.json").read_text())}


def test_weights_are_those_of_the_trained_network(run: Path) -> None:
    trained, loaded = last_result(run)["model"], load_model(run)
    saved = loaded.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained.items())
    layers = hashed_convolution.hashed_layers(loaded)
    assert set(saved) - set(trained) == {f"{path}.hyperplanes" for path in layers}
    assert len(layers) == 11 and all(layer.in_channels >= 8 for layer in layers.values())
    assert len({tuple(layer.hyperplanes.flatten().tolist()) for layer in layers.values()}) == 11


def test_loaded_network_costs_and_scores_what_the_run_says(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prune_lab import datasets
    from prune_lab.datasets import BatchFormat

    config, written, model = configure(run.parent, "haste", *DEEPER, "method.seeds=3"), summary(run), load_model(run)
    dataset = datasets.load(config.dataset, BatchFormat(torch.device("cpu"), torch.float32, False))
    layers, correct, count = hashed_convolution.hashed_layers(model), 0, 0
    for images, labels in dataset.eval_batches(dataset.eval_split, 8, rank=0, world_size=1):
        correct += int((model(images).argmax(1) == labels).sum())
        count += len(images)
    assert written["final/top1"] == 100 * correct / count
    for name, layer in layers.items():
        row, operations = rows(run)[name], layer.operations()
        assert row["macs_dense"] == operations.dense / count
        assert row["macs_kept"] == pytest.approx(operations.macs(1.0) / count)
        assert row["macs_without_overhead"] == pytest.approx(operations.merged / count)
        assert row["channels_left"] == pytest.approx(layer.tally.buckets / layer.tally.tiles / layer.in_channels)
    assert written["macs/inference"] == round(sum(row["macs_kept"] for row in rows(run).values()))
    assert written["macs/inference_ratio"] == pytest.approx(written["macs/inference"] / written["macs/dense"], rel=1e-5)
    without = written["macs/inference_ratio"] - written["haste/overhead_ratio"]
    assert written["haste/macs_ratio_without_overhead"] == pytest.approx(without)
    assert 0 < written["haste/channels_left"] < 1
    assert written["delta/top1"] == written["final/top1"] - written["dense/top1"]


def test_several_draws_are_summed_up(run: Path) -> None:
    written = summary(run)
    assert written["haste/macs_ratio_std"] > 0
    assert abs(written["haste/macs_ratio_mean"] - written["macs/inference_ratio"]) < 5 * written["haste/macs_ratio_std"]
    assert any("(mean and std)" in line for line in summary_lines(written))
    assert min(written[f"time/inference{which}_s_per_image"] for which in ("", "_dense")) > 0


def test_additions_cost_what_the_option_says(run: Path, tmp_path: Path) -> None:
    folder = finish(configure(tmp_path, "haste", *DEEPER, "method.addition_cost=0"))
    free, paid = summary(folder), summary(run)
    assert free["macs/inference_ratio"] == pytest.approx(paid["haste/macs_ratio_without_overhead"])
    assert free["final/top1"] == paid["final/top1"]


def test_dry_run_does_not_know_what_depends_on_the_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert dry_run(configure(tmp_path, "haste", *DEEPER, "method.exclude=[layer3.*]")) == 0
    (path,) = tmp_path.glob("*/dry_run.json")
    planned = json.loads(path.read_text())
    assert planned["macs/inference"] is None and planned["macs/inference_ratio"] is None
    assert planned["params/nonzero"] == planned["params/total"]
    unknown = {row["name"]: row["reason"] for row in planned["layers"] if row["macs_kept"] is None}
    assert unknown == {f"layer2.{block}": "" for block in ("0.conv2", "1.conv1", "1.conv2", "2.conv1", "2.conv2")}
    assert "? depends on the images" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "message"), [
    (("method.hyperplanes=63",), r"method.hyperplanes must lie in \[0, 62\], got 63"),
    (("method.zero_fraction=1",), r"method.zero_fraction must lie in \[0, 1\), got 1"),
    (("method.tile=0",), "method.tile must lie in"),
    (("method.seeds=0",), "method.seeds must lie in"),
    (("method.min_channels=999",), "method=haste takes no layer of this network: input channels below "
                                   "method.min_channels=999, no convolution"),
    (("schedule.train.epochs=0",), "schedule.train.epochs=0 does not go with method=haste"),
])  # fmt: skip
def test_bad_options_are_one_line_before_anything_is_written(
    options: tuple, message: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("method=haste", "dataset=fake", "model=resnet20", "trainer.device=cpu", "logger.wandb=disabled")
    assert cli.main([*command, *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "outputs").exists()


def test_a_pattern_without_a_layer_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(32, 4, 3), nn.Conv2d(32, 4, 3))
    with pytest.raises(UserError, match=r"method.exclude: '2\*' matches no layer"):
        make("haste", exclude=["2*"]).layers(model)
    assert [layer.eligible for layer in make("haste", exclude=["1*"]).layers(model)] == [True, False]


def test_other_kinds_of_layers_are_left_alone() -> None:
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(nn.Conv2d(4, 4, 3), Own(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1),
                          nn.Conv2d(3, 4, 3))
    reasons = {layer.name: layer.reason for layer in make("haste", min_channels=4).layers(model)}
    assert reasons == {
        "0": "", "1": "a class of its own (Own)", "2": "grouped convolution",
        "3": "1x1 convolution (method.pointwise=false)", "4": "input channels below method.min_channels=4",
    }  # fmt: skip


@pytest.mark.parametrize(("entry", "message"), [
    ({"layer9": {"type": "HashedConv2d", "num_hyperplanes": 3}}, "layer9 cannot become a HashedConv2d"),
    ({"bn1": {"type": "HashedConv2d", "num_hyperplanes": 3}}, "bn1 cannot become a HashedConv2d: only an nn.Conv2d"),
    ({"conv1": {"type": "HashedConv2d", "num_hyperplanes": 63}}, "conv1 cannot become a HashedConv2d: num_hyper"),
    ({"conv1": {"type": "HashedConv2d", "bits": 3}}, "conv1 cannot become a HashedConv2d"),
    ({"conv1": {"type": "Sequential"}}, "conv1 has the type Sequential; known are HashedConv2d"),
])  # fmt: skip
def test_a_description_that_does_not_fit_is_one_line(entry: dict, message: str, run: Path, tmp_path: Path) -> None:
    description = json.loads((run / "model.json").read_text()) | {"modules": entry}
    save_model(nn.Linear(1, 1), description, tmp_path)
    with pytest.raises(UserError, match=message) as refusal:
        load_model(tmp_path)
    assert "\n" not in str(refusal.value)
