"""A layer whose weight is computed in each pass stays dense under every method, and its costs count as dense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn
from torch.nn.utils import parametrizations

from prune_lab.accounting.costs import profile
from prune_lab.accounting.eligibility import NO_PARAMETER, select_layers
from prune_lab.accounting.weight_use import COMPUTED
from prune_lab.core.method import Method, MethodConfig
from prune_lab.core.usable_layers import usable_layers
from prune_lab.foundations.errors import UserError
from prune_lab.pipeline import dry_run
from prune_lab.pipeline.saved_model import load_model
from tests.accounting.test_weight_use import StandardisedConv2d
from tests.helpers.runs import METHODS, TINY, compose, execute, run_dir, summary

CHANNELS = {"l0 filter", "constrained_l0 filter", "dep_l0", "dep_l0 dense", "greedy", "l1_filter", "fpgm", "slimming",
            "gdp", "structured_directional", "structured_directional SDP", "masksparsity", "small_dense"}
WEIGHTS = sorted(METHODS.keys() - CHANNELS - {"dense", "haste"})


def network(num_classes: int, *, all_standardised: bool = False) -> nn.Module:
    """Return a network of which the second convolution standardises its weight."""
    conv, last = (StandardisedConv2d, num_classes) if all_standardised else (nn.Conv2d, 8)
    model = nn.Sequential(
        conv(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), StandardisedConv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8), nn.ReLU(), conv(8, last, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    if not all_standardised:
        model.append(nn.Linear(8, num_classes))
    return model


def options(name: str, *method: str) -> list[str]:
    kept = [line for line in TINY if not line.startswith(("model", "dataset.image_size"))]
    return [*kept, "model=torchvision", f"model.name={name}", "dataset.image_size=8", *method]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have two small networks known by name."""

    def build(config, *, num_classes: int, image_size: int) -> nn.Module:
        return network(num_classes, all_standardised=config.name == "all_standardised")

    monkeypatch.setattr("prune_lab.models.external.build", build)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("name", WEIGHTS)
def test_no_method_prunes_a_weight_that_is_not_the_one_used(name: str, tmp_path: Path) -> None:
    assert dry_run.dry_run(compose(*options("partly_standardised", *METHODS[name]), f"output_dir={tmp_path}")) == 0
    (path,) = tmp_path.glob("*/dry_run.json")
    rows = {row["name"]: row for row in json.loads(path.read_text())["layers"]}
    assert (rows["3"]["eligible"], rows["3"]["reason"]) == (False, COMPUTED)
    assert rows["3"]["kept"] in (576, None) and rows["3"]["macs_kept"] in (rows["3"]["macs_dense"], None)
    assert rows["6"]["eligible"]


@pytest.mark.thin(4)
@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_saved_network_has_no_zeros_there_and_its_costs_add_up(name: str, tmp_path: Path) -> None:
    assert execute(tmp_path, *options("partly_standardised", *METHODS[name])) == 0
    rows = json.loads((run_dir(tmp_path) / "layers.json").read_text())
    kept = {row["name"]: row["kept"] for row in rows}
    left = dict(load_model(run_dir(tmp_path)).named_parameters())
    assert kept["3"] == 576 and all(kept[path] == int(left[f"{path}.weight"].count_nonzero()) for path in "069")
    assert sum(row["macs_kept"] for row in rows) == summary(tmp_path)["macs/inference"]


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("name", ["static", "gmp", "snip", "magnitude", "rigl"])
def test_sparsity_and_costs_count_the_layers_whose_zeros_act(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    chosen = [*METHODS[name], "method.sparsity=0.75", "method.distribution=uniform", "method.first_layer=sparse"]
    assert execute(tmp_path, *options("partly_standardised", *chosen)) == 0
    assert f"note: 1 layers with 51.59% of the MACs stay dense: {COMPUTED}" in capsys.readouterr().out.splitlines()
    model, found = load_model(run_dir(tmp_path)), summary(tmp_path)
    zeros = {path: int((module.weight == 0).sum()) for path, module in model.named_modules() if path in {*"0369"}}
    assert zeros == {"0": 162, "3": 0, "6": 432, "9": 24}
    assert found["params/dense"] - found["params/nonzero"] == 162 + 432 + 24
    assert found["macs/inference"] == 54 * 64 + 576 * 64 + 144 * 36 + 8
    assert found["sparsity/achieved"] == 0.75


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("name", ["static", "l0", "l1_filter", "2:4"])
def test_a_network_without_any_usable_layer_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    method = METHODS.get(name, ("method=static", "method.distribution=2:4", "method.sparsity=0.5"))
    with pytest.raises(UserError, match=r"^method=\w+: the network has no layer that can be .*weight is computed"):
        execute(tmp_path, *options("all_standardised", *method))
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("known")
def test_dense_training_of_such_a_network_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert execute(tmp_path, *options("all_standardised", "method=dense")) == 0
    assert "note:" not in capsys.readouterr().out
    assert summary(tmp_path)["macs/inference_ratio"] == 1


def test_parametrized_layers_are_listed_and_not_eligible() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 8, 1))
    first, second = select_layers(model)
    assert (first.parameter, first.shape, first.reason) == ("0.weight", (8, 3, 3, 3), NO_PARAMETER)
    assert second.eligible


def test_an_old_weight_norm_is_no_parameter_either() -> None:
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(4, 4))
    first, second = select_layers(nn.Sequential(layer, nn.Linear(4, 4)))
    assert (first.parameter, first.eligible, second.eligible) == ("0.weight", False, True)


def test_layers_that_the_method_leaves_out_keep_its_reason() -> None:
    model = network(4)
    layers = usable_layers(Method(MethodConfig("any")), model, profile(model, 8))
    assert [layer.reason for layer in layers] == ["", COMPUTED, "", ""]


@pytest.mark.parametrize("source", ["nf_resnet26"])
def test_weight_standardised_networks_of_timm_prune_their_classifier_only(source: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    chosen = ["method=static", "method.sparsity=0.9", "model=torchvision", "model.source=timm", f"model.name={source}",
              "dataset=fake", "dataset.image_size=32"]  # fmt: skip
    assert dry_run.dry_run(compose(*chosen, f"output_dir={tmp_path}")) == 0
    (path,) = tmp_path.glob("*/dry_run.json")
    found = json.loads(path.read_text())
    assert [row["name"] for row in found["layers"] if row["eligible"]] == ["head.fc"]
    assert found["params/dense"] - found["params/nonzero"] == 18_432
    assert found["macs/inference_ratio"] > 0.999
