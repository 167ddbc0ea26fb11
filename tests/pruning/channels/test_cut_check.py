"""The check of a cut: it passes right ones whatever was trained, and sees wrong ones behind every kind of branch."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from prune_lab.foundations.errors import UserError
from prune_lab.models.resnet_cifar import ZeroPadShortcut
from prune_lab.pipeline import runner, stored_phases
from prune_lab.pipeline.dry_run import dry_run
from prune_lab.pruning.channels import cut_check
from prune_lab.pruning.channels.cut_check import TOLERANCE, check_equal
from prune_lab.pruning.channels.groups import ChannelMap, channel_map
from tests.helpers.channel_networks import NARROW, disturb, thinned
from tests.helpers.runs import METHODS, TINY, compose


def block(*, width: int = 6) -> nn.Sequential:
    """Return 3x3 convolution, batch norm, activation, 1x1 convolution: 4 -> width -> 4 channels."""
    return nn.Sequential(nn.Conv2d(4, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 1))


class Branch(nn.Module):
    """A stem of 4 channels, a branch that is joined to it in one way or another, a head of 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.fc = nn.Conv2d(3, 4, 3, 2), block(), nn.Linear(4, 5)
        self.parts()

    def parts(self) -> None:
        """Make what else there is."""

    def join(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.join(self.stem(x).relu()).mean([2, 3]))


class ZeroScale(Branch):
    def parts(self) -> None:
        self.norm = nn.BatchNorm2d(4)
        nn.init.zeros_(self.norm.weight)

    def join(self, x: Tensor) -> Tensor:
        return x + self.norm(self.branch(x))


class LayerScale(Branch):
    def parts(self) -> None:
        self.gamma = nn.Parameter(torch.full((4, 1, 1), 1e-6))

    def join(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.branch(x)


class SkipGain(Branch):
    def parts(self) -> None:
        self.gain = nn.Parameter(torch.tensor(0.0))

    def join(self, x: Tensor) -> Tensor:
        return x + self.branch(x).mul_(self.gain)


class Squeeze(Branch):
    def parts(self) -> None:
        self.down, self.up = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 4, 1)
        nn.init.zeros_(self.up.weight)
        nn.init.constant_(self.up.bias, -50)  # a gate that is shut

    def join(self, x: Tensor) -> Tensor:
        x = self.branch(x)
        return x * self.up(self.down(x.mean([2, 3], keepdim=True)).relu()).sigmoid()


class Depthwise(Branch):
    def parts(self) -> None:
        self.each = nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def join(self, x: Tensor) -> Tensor:
        return self.each(self.branch(x))


class Joined(Branch):
    def parts(self) -> None:
        self.fc = nn.Linear(8, 5)
        nn.init.zeros_(self.fc.weight)

    def join(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.branch(x)], 1)


class Padded(Branch):
    def parts(self) -> None:
        self.shortcut, self.conv, self.fc = ZeroPadShortcut(4, 8), nn.Conv2d(4, 8, 3, 2, padding=1), nn.Linear(8, 5)

    def join(self, x: Tensor) -> Tensor:
        return self.conv(self.branch(x)) + self.shortcut(x)


BRANCHES = (Branch, ZeroScale, LayerScale, SkipGain, Squeeze, Depthwise, Joined, Padded)


def wrong_maps(channels: ChannelMap, alive: Tensor) -> Iterator[tuple[str, ChannelMap]]:
    """Yield (place, map) for each place in which the wrong channels can be kept: the last instead of the first."""
    for kind in ("rows", "columns", "norms"):
        places = getattr(channels, kind)
        for path, classes in places.items():
            kept = channels.kept(classes, alive)
            if not torch.equal(kept, kept.flip(0)):
                yield f"{kind} of {path}", dataclasses.replace(channels, **{kind: places | {path: classes.flip(0)}})
    for path, (front, back) in channels.pads.items():
        if int(channels.kept(front, alive).sum()) != int(channels.kept(back, alive).sum()):
            yield f"zeros of {path}", dataclasses.replace(channels, pads=channels.pads | {path: (back, front)})


def first_ones(channels: ChannelMap) -> Tensor:
    """Return a choice that keeps the first two thirds of each lane."""
    alive = torch.zeros(channels.num_classes, dtype=torch.bool)
    for lane in channels.lanes:
        alive[lane.classes[: -(-2 * lane.size // 3)]] = True
    return alive


@pytest.mark.parametrize("kind", BRANCHES)
def test_the_right_cut_passes_and_every_wrong_one_is_refused(kind: type[Branch]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    channels = channel_map(model, 8)
    alive = first_ones(channels)
    assert check_equal(model, channels, alive, 8) < 1e-13
    wrong = dict(wrong_maps(channels, alive))
    assert {"rows of branch.0", "columns of branch.3", "norms of branch.1"} <= set(wrong)
    for place, bad in wrong.items():
        with pytest.raises(UserError, match="differs from the masked one by"):
            check_equal(model, bad, alive, 8)
            pytest.fail(f"the wrong {place} pass")


@pytest.mark.parametrize("family", [
    "resnet20-A", "vgg16-imagenet", pytest.param("mobilenet_v3_small", marks=pytest.mark.slow),
])  # fmt: skip
def test_the_right_cut_of_whole_networks_passes_and_wrong_ones_are_refused(family: str) -> None:
    torch.manual_seed(0)
    model = NARROW[family]().eval()
    channels = channel_map(model, 32)
    alive = thinned(channels)
    assert check_equal(model, channels, alive, 32) < 1e-13
    for place, bad in list(wrong_maps(channels, alive))[::5]:
        with pytest.raises(UserError, match="differs from the masked one by"):
            check_equal(model, bad, alive, 32)
            pytest.fail(f"the wrong {place} pass")


def test_the_message_names_the_first_layer_that_reads_the_wrong_channels() -> None:
    torch.manual_seed(0)
    model = NARROW["resnet18"]()
    channels = channel_map(model, 32)
    wrong = channels.columns | {"layer2.0.conv2": channels.columns["layer2.0.conv2"].flip(0)}  # as many, but others
    with pytest.raises(UserError, match=r"differs from the masked one by [\d.e-]+ .*first at layer2\.0\.conv2;"):
        check_equal(model, dataclasses.replace(channels, columns=wrong), thinned(channels), 32)


# What was trained does not matter


@pytest.mark.parametrize("name", [
    pytest.param("efficientnet_v2_s", marks=pytest.mark.slow), pytest.param("efficientnet_b3", marks=pytest.mark.slow),
    "regnet_y_400mf",
])  # fmt: skip
def test_maps_of_one_position_do_not_blow_rounding_up(name: str) -> None:
    for seed in range(1 if name == "efficientnet_v2_s" else 3):
        torch.manual_seed(seed)
        model = torchvision.models.get_model(name, weights=None)
        channels = channel_map(model, 32)
        assert check_equal(model, channels, thinned(channels, seed=seed), 32) < 1e-12


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4])
def test_the_answer_does_not_depend_on_the_weights(scale: float) -> None:
    blocks = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(25)]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(48, 2)).eval()
    channels = channel_map(model, 4)
    before = check_equal(model, channels, thinned(channels), 4)
    for parameter in model.parameters():
        parameter.data.mul_(scale)
    assert check_equal(model, channels, thinned(channels), 4) == before < 1e-12


class CountsChannels(nn.Module):
    """Divides by its number of channels, which no graph of ties knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.fc((self.b(x / x.shape[1])).mean([2, 3]))


def test_a_network_that_uses_its_width_as_a_number_is_refused() -> None:
    model = CountsChannels()
    channels = channel_map(model, 8)
    with pytest.raises(UserError, match="first at b; the channels of this architecture cannot be removed"):
        check_equal(model, channels, thinned(channels), 8)


class NeedsItsWidth(CountsChannels):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.fc(self.b(F.avg_pool2d(x, x.shape[1] - 4)).mean([2, 3]))


def test_a_network_that_fails_without_its_channels_is_refused_for_that() -> None:
    model = NeedsItsWidth()
    channels = channel_map(model, 24)
    alive = torch.ones(channels.num_classes, dtype=torch.bool)
    alive[:4] = False
    with pytest.raises(UserError, match="^NeedsItsWidth does not compute without its dead channels; .*zero") as found:
        check_equal(model, channels, alive, 24)
    assert "\n" not in str(found.value)


class SinglePrecision(CountsChannels):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x.float())).mean([2, 3]))


def test_a_network_that_cannot_compute_in_float64_is_refused_in_one_line() -> None:
    model = SinglePrecision()
    channels = channel_map(model, 8)
    with pytest.raises(UserError, match="needs a check in float64, which SinglePrecision does not compute") as found:
        check_equal(model, channels, thinned(channels), 8)
    assert "\n" not in str(found.value)


def test_the_check_changes_nothing() -> None:
    model = disturb(NARROW["vgg16"]())
    channels = channel_map(model, 32)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check_equal(model, channels, thinned(channels), 32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())


# Before the training


REMOVING = ("l1_filter", "fpgm", "slimming", "masksparsity", "greedy", "gdp", "dep_l0", "dep_l0 dense", "l0 filter",
            "constrained_l0 filter", "structured_directional", "structured_directional SDP")
"""names in METHODS of those that remove channels"""


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", REMOVING)
@pytest.mark.parametrize("command", [runner.run, dry_run])
def test_a_cut_that_would_fail_is_refused_before_the_training(
    command, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_training(*_arguments, **_options) -> None:
        pytest.fail("trained before the cut was tried")

    monkeypatch.setattr(cut_check, "TOLERANCE", -1.0)
    monkeypatch.setattr(stored_phases, "perform", no_training)
    config = compose(*TINY, *METHODS[name], f"output_dir={tmp_path}")
    with pytest.raises(UserError, match="the channels of this architecture cannot be removed"):
        command(config)
    assert not list(tmp_path.glob("*/*.json"))


def test_the_tolerance_is_that_of_float64() -> None:
    assert TOLERANCE == 1e-8


# Cost

LARGE = """
import resource, sys, time, torch
from tests.helpers.channel_networks import FULL, disturb, thinned
from prune_lab.pruning.channels.groups import channel_map
from prune_lab.pruning.channels.cut_check import check_equal
from prune_lab.pruning.channels.surgery import remove_channels

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
model = disturb(FULL["resnet50"][0]())
size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
before, started = peak(), time.process_time()
channels = channel_map(model, 224)
alive = thinned(channels)
check_equal(model, channels, alive, 224)
remove_channels(model, channels, alive)
print(time.process_time() - started, (size + peak() - before) / size)
"""


@pytest.mark.slow
def test_a_resnet50_is_cut_and_checked_within_ten_seconds_and_five_times_its_memory(child_environment) -> None:
    # In float64 the masked copy alone takes twice the memory of the network.
    command = [sys.executable, "-c", LARGE]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seconds, times = map(float, done.stdout.split())
    assert seconds < 10 and times < 5, done.stdout
