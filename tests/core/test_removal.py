"""Channels that a run masked are taken out of its network, and what the run leaves behind is the smaller network."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from prune_lab import models
from prune_lab.accounting.costs import dense_macs, profile
from prune_lab.accounting.eligibility import select_layers
from prune_lab.core.context import Context
from prune_lab.core.removal import remove_dead
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.files import read_json
from prune_lab.pipeline.dry_run import dry_run
from prune_lab.pipeline.saved_model import load_model
from prune_lab.pipeline.summary import explained, sparsity_counts
from prune_lab.pruning.channels import cut_check, surgery
from prune_lab.pruning.channels.groups import ChannelMap, channel_map
from prune_lab.tracking.lines import epoch_line, summary_rows
from prune_lab.training import loop
from tests.helpers.channel_networks import NARROW, outputs, phase, thinned
from tests.helpers.contexts import context_of
from tests.helpers.method_runs import configure, finish, summary
from tests.helpers.runs import METHODS, TINY, assert_same_run, compose, execute, fork, records, run_dir, wait_for


def masked_phase(family: str = "resnet20-A", **options: bool) -> tuple[Context, ChannelMap, Tensor]:
    """Return a phase whose masks leave out 40 % of the channels, with what it reports in `said`."""
    torch.manual_seed(0)
    context = phase(NARROW[family](), 32, "remove", **options)
    context.said = []
    context.report = context.said.append
    channels = channel_map(context.model, 32)
    alive = thinned(channels)
    context.install_masks(channels.weight_masks(alive, context.model))
    return context, channels, alive


@pytest.mark.parametrize("family", ["resnet20-A", "vgg16-imagenet", "mobilenet_v3_small"])
def test_the_network_of_the_phase_becomes_the_smaller_one(family: str) -> None:
    context, channels, alive = masked_phase(family)
    whole, before = outputs(context.model.eval()), context.forward_macs
    figures = remove_dead(context)
    assert torch.allclose(outputs(context.model.eval()), whole, atol=1e-5)
    assert context.masks is None and context.history is None
    assert context.widths == surgery.widths(context.model, channels)
    assert context.forward_macs == dense_macs(profile(context.model, 32)) <= before
    assert figures["remove/channels_kept"] == int(alive.sum()) / channels.num_classes
    assert figures["remove/difference"] < 1e-5
    gone = int((~alive).sum())
    assert context.said[-1].startswith(f"removed {gone} of {channels.num_classes} channels, tied ones counted once; ")
    assert "but for" not in context.said[-1]


def test_masks_of_single_weights_go_on() -> None:
    context, channels, alive = masked_phase()
    masks = dict(context.masks.masks)
    name = "layer3.1.conv1.weight"
    some = masks[name] & (torch.rand(masks[name].shape, generator=torch.Generator().manual_seed(1)) < 0.9)
    context.install_masks(masks | {name: some})
    left = int(some.sum())
    remove_dead(context)
    assert list(context.masks.masks) == [name] and context.masks.num_kept == left < context.masks.num_weights
    assert not context.parameters()[name][~context.masks.masks[name]].any()
    unused = next(cost for cost in context.costs if cost.parameter == name)
    assert context.forward_macs == context.dense_macs - (unused.weights - left) * unused.positions


def test_constants_of_channels_that_are_read_still_are_told() -> None:
    context, channels, alive = masked_phase()
    rows = {name: mask.flatten(1).any(1).view(-1, *[1] * (mask.dim() - 1)).expand_as(mask).clone()
            for name, mask in context.masks.masks.items()}
    context.install_masks(rows)
    remove_dead(context)
    gone = int((~alive).sum())
    assert context.said[-1].endswith(f", but for the constants of {gone} channels that were still read")


def test_nothing_dead_is_an_error_but_for_a_validation() -> None:
    context = phase(NARROW["vgg16"](), 32, "remove")
    with pytest.raises(UserError, match="nothing to remove: no channel has all of its weights at zero"):
        remove_dead(context)
    context.validating = True
    assert remove_dead(context) == {} and context.widths is None


def test_an_emptied_layer_is_an_error_that_names_it() -> None:
    context, channels, alive = masked_phase()
    alive[channels.rows["layer2.1.conv1"]] = False
    alive[channels.rows["layer3.2.conv1"]] = False
    context.install_masks(channels.weight_masks(alive, context.model))
    with pytest.raises(UserError, match=r"without channels: layer2\.1\.conv1, layer3\.2\.conv1; prune less"):
        remove_dead(context)


def test_an_optimizer_that_holds_the_parameters_is_an_error() -> None:
    context, _, _ = masked_phase()
    context.optimizer = torch.optim.SGD(context.model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="removed between phases: the optimizer of this one holds the old parameters"):
        remove_dead(context)


def test_a_wrapped_network_is_an_error() -> None:
    context, _, _ = masked_phase()
    context.model = nn.DataParallel(context.model)
    with pytest.raises(UserError, match="from plain networks, got DataParallel"):
        remove_dead(context)


def test_a_cut_that_changes_outputs_ends_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    context, _, _ = masked_phase()
    monkeypatch.setattr(cut_check, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="the channels of this architecture cannot be removed"):
        remove_dead(context)
    assert context.widths is None and context.model.linear.in_features == 32


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ("model=mobilenet_v3_small", "model.width=0.35")
    return finish(configure(tmp_path_factory.mktemp("run"), "l1_filter", *options))


def test_the_summary_is_that_of_the_network_on_disk(folder: Path) -> None:
    written, model = summary(folder), load_model(folder)
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert written["params/total"] == written["params/kept"] == sum(sizes) < written["params/dense"]
    macs = sum(cost.macs for cost in profile(model, 16))
    assert written["macs/inference"] == macs
    assert written["macs/inference_ratio"] == macs / written["macs/dense"] <= 0.8
    whole = models.from_description(read_json(folder / "model.json"))
    eligible = {layer.parameter: layer.size for layer in select_layers(whole, include=["*"])}
    left = sum(model.get_parameter(name).numel() for name in eligible)
    assert written["sparsity/achieved"] is written["sparsity/requested"] is written["params/nonzero"] is None
    rows = json.loads((folder / "layers.json").read_text())
    assert sum(row["kept"] for row in rows) == left and sum(row["macs_kept"] for row in rows) == macs


def test_records_of_channels_show_no_sparsity(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert not [row["phase"] for row in rows if "sparsity" in row]
    (removed,) = [row for row in rows if row["phase"] == "remove"]
    (pruned,) = [row for row in rows if row["phase"] == "prune"]
    assert 0 < removed["remove/channels_kept"] < 1
    assert "  channels kept 0." in epoch_line(pruned, {}) and "  channels kept 0." in epoch_line(removed, {})
    lines = dict(summary_rows(summary(folder)))
    assert lines["channels"] == f"{removed['remove/channels_kept']:.2%} kept of those that can be removed"
    assert "sparsity" not in lines
    assert "nonzero" not in lines["parameters"] and "% of" in lines["parameters"]


def test_sparsity_counts_eligible_weights_whether_under_a_mask_or_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Flatten(), nn.Linear(4, 2, bias=False))
    mask = torch.arange(12).view(4, 3, 1, 1) < 3
    context = context_of(model, {"0.weight": mask}, image_size=1)
    assert context.masks.density == 3 / 12 and context.sparsity == 1 - 11 / 20
    assert context.mask_figures()["sparsity"] == 1 - 11 / 20
    assert sparsity_counts(context.layers, context.masks.counts(), None)["sparsity/achieved"] == 1 - 11 / 20
    context.removes_channels = True
    assert context.sparsity is None and "sparsity" not in context.mask_figures()
    context.widths = {"0": [3, 4]}  # the channels are gone, the masks are what is left of single weights
    assert context.sparsity == 1 - 11 / 20


def test_figures_of_masks_that_are_gone_are_not_in_the_summary(folder: Path, tmp_path: Path) -> None:
    assert not [key for key in summary(folder) if key.startswith("mask/")]
    assert "remove/channels_kept" in summary(folder) and "prune/macs_kept" in summary(folder)
    kept = summary(finish(configure(tmp_path, "magnitude")))
    assert kept["mask/dead_filters"] >= 0 and kept["mask/overlap"] == 1
    assert explained([{"mask/a": 1, "b": 2}, {"mask/c": 3, "b": 4}]) == {"mask/c": 3, "b": 4}


def test_a_fresh_process_rebuilds_the_network_bit_by_bit(folder: Path, child_environment: dict, tmp_path: Path) -> None:
    code = """
import sys, torch
from prune_lab.pipeline.saved_model import load_model
images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    torch.save(load_model(sys.argv[1])(images), sys.argv[2])
"""
    done = subprocess.run([sys.executable, "-c", code, folder, tmp_path / "logits.pt"], env=child_environment,
                          capture_output=True, text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), outputs(load_model(folder), 16, 4))
    assert set(load_file(folder / "model.safetensors")) == set(load_model(folder).state_dict())


def test_start_weights_of_a_smaller_network_are_refused_as_such(folder: Path) -> None:
    config = dataclasses.replace(compose("model=mobilenet_v3_small", "model.width=0.35").model,
                                 weights=str(folder / "model.safetensors"))  # fmt: skip
    model = models.build(config, num_classes=4, image_size=16)
    with pytest.raises(UserError, match=r"does not fit model .* of another shape .*; the channels of"):
        models.load_weights(model, config)


def test_widths_that_do_not_fit_are_refused_on_loading(folder: Path, tmp_path: Path) -> None:
    description = read_json(folder / "model.json")
    wrong = ({"classifier.0": [5, 3]}, "does not fit model.json"), ({"nowhere": [1, 1]}, "are not this network's")
    for change, message in wrong:
        (tmp_path / "model.json").write_text(json.dumps(description | {"channels": description["channels"] | change}))
        (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        with pytest.raises(UserError, match=message):
            load_model(tmp_path)


def test_the_dry_run_knows_the_costs(tmp_path: Path) -> None:
    options = ("method.params_ratio=0.4", "method.macs_ratio=null", "method.exclude=[layer2.*]", "method.round_to=2")
    assert dry_run(configure(tmp_path, "l1_filter", *options)) == 0
    planned = json.loads(next(tmp_path.glob("*/dry_run.json")).read_text())
    real = summary(finish(configure(tmp_path, "l1_filter", *options)))
    for key in ("macs/inference", "params/total", "params/kept", "remove/channels_kept", "macs/train"):
        assert planned[key] == real[key] is not None
    assert planned["params/nonzero"] is planned["sparsity/achieved"] is None
    # 24 images per epoch, 3 epochs of the whole network and 2 of the smaller one
    assert real["macs/train"] == 3 * 24 * (3 * real["macs/dense"] + 2 * real["macs/inference"])


def test_a_run_killed_while_it_trains_the_smaller_network_goes_on(tmp_path: Path) -> None:
    options = (*TINY, *METHODS["l1_filter"], "trainer.checkpoint_interval_s=1e-9")

    def killed() -> int:
        real = loop.train_step

        def train_step(training, images, labels) -> None:
            if training.context.phase == "finetune" and training.progress.step == 4:
                training.saves.wait()  # for the checkpoint that is being written
                os.kill(os.getpid(), signal.SIGKILL)
            real(training, images, labels)

        loop.train_step = train_step
        return execute(tmp_path / "cut", *options)

    assert wait_for(fork(tmp_path / "log", killed)) == -signal.SIGKILL
    assert execute(tmp_path / "cut", *options) == 0
    assert "phase finetune: resumed at step 4" in (run_dir(tmp_path / "cut") / "log.txt").read_text()
    assert execute(tmp_path / "whole", *options) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    rows = records(run_dir(tmp_path / "whole"))
    assert rows[-2]["macs/inference"] < rows[0]["macs/inference"]
