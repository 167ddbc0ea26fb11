"""Channels that can never be removed: how many there are and which operations hold them, said before the training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prune_lab.core.method import build_method
from prune_lab.families.channel_pruning import Problem
from prune_lab.foundations.errors import UserError
from prune_lab.pipeline.dry_run import dry_run
from prune_lab.pruning.channels.groups import channel_map
from prune_lab.pruning.channels.removable import RemovableChannels
from tests.helpers.channel_networks import NARROW, phase
from tests.helpers.runs import TINY, compose, execute, run_dir


class Shuffled(nn.Module):
    """Changes the order of channels by numbers in the code."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 2, 5, 4, 4).transpose(1, 2).flatten(1, 2)


def network() -> nn.Sequential:
    """Return layers of 6, 8, 10, 12 channels and 3 outputs: the first is free, and so is the last but one."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 10, 1, groups=2),
        Shuffled(), nn.Conv2d(10, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


def test_channels_are_counted_by_what_holds_them() -> None:
    channels = channel_map(network(), 4)
    assert channels.num_classes == 18
    assert channels.held == {"Conv2d of 2 groups (4)": 10, "GroupNorm (3)": 8}
    assert list(channels.held.values()) == [10, 8]
    assert channels.share([True] * len(channels.lanes)) == (
        "removable: 18 of 36 channels that layers make (50.0%); others are held by Conv2d of 2 groups (4): 10, "
        "GroupNorm (3): 8"
    )


def test_an_operation_is_named_with_the_module_it_stands_in() -> None:
    model = network()
    model[4] = nn.Conv2d(8, 10, 1)
    assert channel_map(model, 4).held == {"view in Shuffled (5)": 10, "GroupNorm (3)": 8}


def test_what_a_held_channel_is_added_to_is_held_by_the_same() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.norm, self.fc = nn.GroupNorm(2, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.fc(self.norm(x + self.b(x)).mean([2, 3]))

    channels = channel_map(Sum(), 4)
    assert channels.held == {"GroupNorm (norm)": 8} and channels.num_classes == 0


@pytest.mark.parametrize("family", ["resnet20-A", "vgg16", "mobilenet_v3_small"])
def test_networks_of_which_all_may_go_have_a_short_line(family: str) -> None:
    channels = channel_map(NARROW[family](), 32)
    made = sum(len(channels.rows[path]) for path in channels.columns) - 10
    tied = f"; {channels.num_classes} counting tied ones once" if channels.num_classes < made else ""
    line = f"removable: all {made} channels that layers make, but for the outputs{tied}"
    assert channels.share([True] * len(channels.lanes)) == line
    assert bool(tied) == (family != "vgg16")


@pytest.mark.parametrize(("layers", "reason"), [
    ([nn.Conv2d(3, 6, 1), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(96, 2)], "they are held by GroupNorm (1): 6"),
    ([nn.Conv2d(3, 6, 1, groups=3), nn.MaxPool2d(4), nn.Flatten()], "they are held by Conv2d of 3 groups (0): 6"),
    ([nn.Flatten(), nn.Linear(48, 2)], "its layers make the outputs only"),
])  # fmt: skip
def test_nothing_to_remove_names_what_holds_the_channels(layers: list[nn.Module], reason: str) -> None:
    with pytest.raises(UserError) as found:
        RemovableChannels(phase(nn.Sequential(*layers), 4).network, residual=True, exclude=[])
    assert str(found.value) == f"no channels of this network can be removed: {reason}"


def test_a_budget_out_of_reach_names_what_holds_the_channels() -> None:
    context = phase(network(), 4)
    method = build_method(compose(*TINY, "method=l1_filter", "method.macs_ratio=0.2"))
    with pytest.raises(UserError, match=r"is out of reach: .* \(removable: 18 of 36 .* GroupNorm \(3\): 8\)$"):
        Problem(method, context).counts(torch.zeros(18, dtype=torch.float64))


@pytest.mark.parametrize("command", ["run", "dry run"])
def test_the_plan_says_it(command: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = (*TINY, "method=l1_filter")
    if command == "run":
        assert execute(tmp_path, *options) == 0
        printed = (run_dir(tmp_path) / "log.txt").read_text()
    else:
        assert dry_run(compose(*options, f"output_dir={tmp_path}")) == 0
        printed = capsys.readouterr().out
    assert printed.count("removable: all 172 channels that layers make, but for the outputs; 100 counting tied") == 1


# Blocks make 4, 8, 16 channels of their own three times each: 84. Those of layer1's trunk run on through all layers.
@pytest.mark.thin(4)
@pytest.mark.parametrize(("options", "left"), [
    (("method=l1_filter", "method.residual=false"), 84),
    (("method=l1_filter", "method.exclude=[layer1.*]"), 120),
    (("method=gdp", "method.residual=false"), 84),
    (("method=slimming", "method.residual=false"), 84),
    (("method=masksparsity", "method.residual=false"), 84),
    (("method=structured_directional", "method.residual=false"), 84),
    (("method=greedy", "method.exclude=[layer3.*]"), 36),
    (("method=dep_l0",), 84),
    (("method=l0", "method.granularity=filter", "method.exclude=[layer2.0.conv1]"), 76),
])  # fmt: skip
def test_channels_that_the_method_leaves_alone_are_not_called_removable(
    options: tuple[str, ...], left: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert dry_run(compose(*TINY, *options, f"output_dir={tmp_path}")) == 0
    printed = capsys.readouterr().out
    assert f"removable: {left} of 172 channels that layers make ({left / 172:.1%}); " in printed
    assert f"others are held by the method and its options: {172 - left}\n" in printed


def test_blurred_pools_of_timm_are_named() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("resnetblur50")
    assert channel_map(model, 64).held == {"conv2d in BlurPool2d (maxpool.1)": 960}
