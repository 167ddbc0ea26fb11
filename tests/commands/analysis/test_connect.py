"""Curves between two networks: barriers and lengths by hand, training of the middle, the command on small runs."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from prune_lab.commands.analysis import bench, connection
from prune_lab.commands.analysis.bench import Bench, recompute_statistics
from prune_lab.commands.analysis.connect import main, plot, verdict
from prune_lab.commands.analysis.curve_training import Recipe, lr_factor, train_middle
from prune_lab.commands.analysis.curves import Curve, barrier, coefficients, distance, positions
from prune_lab.foundations.checkpoint import CheckpointPair
from prune_lab.foundations.errors import UserError
from prune_lab.training.device_config import DeviceConfig
from tests.helpers.analysis_runs import contents, make_run, only_result

LINE = ("--points", "3", "--device", "cpu")

# --- curves ----------------------------------------------------------------------------------------------------------


def values(*numbers: float) -> list[torch.Tensor]:
    return [torch.tensor(numbers)]


def double_well(count: int) -> float:
    """Return the barrier of the loss (t^2 - 1)^2 between its minima -1 and 1."""
    curve = Curve(values(-1.0), values(1.0))
    return barrier([float((curve.at(t)[0] ** 2 - 1) ** 2) for t in positions(count)])


def test_31_points_hit_the_top_of_a_symmetric_barrier_and_30_do_not():
    assert double_well(31) == 1
    assert 0.9 < double_well(30) < 1


def test_bezier_curve_by_hand():
    curve = Curve(values(0.0, 0.0), values(2.0, 0.0), values(1.0, 2.0))
    assert curve.at(0.25)[0].tolist() == [0.5, 0.75]
    assert curve.at(0.5)[0].tolist() == [1, 1]
    assert curve.at(0)[0].tolist() == [0, 0] and curve.at(1)[0].tolist() == [2, 0]
    # |theta'| = 2 |(1, 2 - 4t)|; substituting u = 2 - 4t leaves the integral of sqrt(1 + u^2) from 0 to 2
    assert curve.length() == pytest.approx(math.sqrt(5) + math.asinh(2) / 2, rel=1e-6)


def test_a_middle_on_the_line_makes_the_curve_the_line():
    start, end = values(1.0, -3.0), values(4.0, 1.0)
    straight, bent = Curve(start, end), Curve(start, end, Curve(start, end).at(0.5))
    assert straight.length() == distance(start, end) == 5
    assert bent.length() == pytest.approx(5, rel=1e-9)
    for t in (0.2, 0.7):
        torch.testing.assert_close(bent.at(t), straight.at(t))


@pytest.mark.parametrize("bezier", [False, True])
def test_coefficients_sum_to_one(bezier):
    for t in positions(7):
        assert math.fsum(coefficients(t, bezier=bezier)) == pytest.approx(1, abs=1e-15)


def test_between_equal_ends_every_point_is_that_network_bit_for_bit():
    w = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for curve in (Curve([w], [w.clone()]), Curve([w], [w.clone()], [w.clone()])):
        assert all(torch.equal(curve.at(t)[0], w) for t in positions(31))
        assert curve.length() == 0


def test_barrier_counts_from_the_mean_of_the_ends():
    assert barrier([1.0, 7.0, 3.0]) == 5
    assert barrier([3.0, 7.0, 1.0]) == 5
    assert barrier([2.0, 0.5, 2.0]) == 0  # a curve may go below its ends
    assert barrier([1.0, math.nan, 1.0]) == barrier([1.0, math.inf, 1.0]) == math.inf


def test_learning_rate_has_the_published_shape():
    assert [lr_factor(epoch, 10) for epoch in (1, 5)] == [1, 1]
    assert lr_factor(7, 10) == pytest.approx(0.505)
    assert [lr_factor(epoch, 10) for epoch in (9, 10)] == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize(("error", "word"), [(1.99, "stable:"), (2.0, "not stable:"), (None, "not stable:")])
def test_stable_is_strictly_under_two_points(error, word):
    assert verdict(error, split="test", curve="line").startswith(word)


def test_plot_shows_values_that_are_not_finite():
    assert plot([1.0, None, 3.0]) == "1.00 [ !@] 3.00"
    assert plot([2.0, 2.0]) == "2.00 [  ] 2.00"
    assert plot([None]) == "[!]"


# --- training of the middle ------------------------------------------------------------------------------------------

CENTRE = torch.tensor([0.0, -0.2])


class Ring(nn.Module):
    """A network of two weights whose loss is low on a ring around CENTRE and high within it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        right = 4 - 8 * ((self.w - CENTRE).square().sum() - 1).square()
        return torch.stack([right.expand(len(x)), torch.zeros(len(x))], dim=1)


def ring_bench() -> Bench:
    def train_batches(*, batch_size: int, **_: int):
        return ((torch.zeros(batch_size, 1), torch.zeros(batch_size, dtype=torch.int64)) for _ in range(20))

    dataset = SimpleNamespace(train_batches=train_batches, num_batches=lambda _: 20)
    return Bench(dataset, DeviceConfig("cpu", "fp32", False, False), None, seed=0)


def train_ring(folder: Path, epochs: int, *, stop_after: int | None = None) -> Curve:
    def report(line: str) -> None:
        if stop_after is not None and line.startswith(f"curve {stop_after}/"):
            raise KeyboardInterrupt

    line = Curve(values(-1.0, 0.0), values(1.0, 0.0))
    recipe = Recipe(epochs=epochs, lr=0.05, momentum=0.5, batch_size=4)
    return train_middle(Ring(), line, ring_bench(), recipe, CheckpointPair(folder, print), report)


def ring_barrier(curve: Curve) -> float:
    model, losses = Ring(), []
    for t in positions(31):
        bench.place(model, curve.at(t))
        losses.append(nn.functional.cross_entropy(model(torch.zeros(1, 1)), torch.tensor([0])).item())
    return barrier(losses)


def test_a_trained_curve_goes_round_the_hill_between_fixed_ends(tmp_path):
    line = Curve(values(-1.0, 0.0), values(1.0, 0.0))
    curve = train_ring(tmp_path, 10)
    assert ring_barrier(line) > 3
    assert ring_barrier(curve) < 0.1 * ring_barrier(line)
    assert torch.equal(curve.start[0], line.start[0]) and torch.equal(curve.end[0], line.end[0])
    assert curve.length() > distance(curve.start, curve.end)


def test_training_that_was_stopped_ends_in_the_same_curve(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    with pytest.raises(KeyboardInterrupt):
        train_ring(parts, 4, stop_after=2)
    torch.testing.assert_close(train_ring(parts, 4).middle, train_ring(whole, 4).middle, rtol=0, atol=0)


def test_a_diverging_curve_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(Ring, "forward", lambda self, x: self.w.sum().log() * torch.ones(len(x), 2))
    with pytest.raises(UserError, match=r"the loss along the curve is nan in epoch 1; lower --lr"):
        train_ring(tmp_path, 2)


# --- batch norm ------------------------------------------------------------------------------------------------------


def test_recomputed_statistics_are_means_over_batches_and_nothing_else_changes():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2, momentum=0.3)).train()
    model[1].num_batches_tracked.fill_(7)
    first, second = torch.tensor([[0.0, 1.0], [2.0, 5.0]]), torch.tensor([[4.0, 0.0], [8.0, 2.0]])
    recompute_statistics(model, [(first, None), (second, None)])
    assert model[1].running_mean.tolist() == [3.5, 2]  # means 1 and 6, 3 and 1; dropout took no part
    assert model[1].running_var.tolist() == [5, 5]  # unbiased: 2 and 8, 8 and 2
    assert model[1].num_batches_tracked == 7 and model[1].momentum == 0.3
    assert all(module.training for module in model.modules())


def test_a_network_without_batch_norm_reads_no_images():
    def unread():
        raise AssertionError
        yield

    recompute_statistics(nn.Linear(2, 2), unread())


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Two runs that differ in the seed."""
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder, "seed=0"), make_run(folder, "seed=1")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def connect(*arguments: object) -> dict:
    assert main([*map(str, arguments), *LINE]) == 0
    return only_result(Path("outputs"))


def test_a_network_has_no_barrier_to_itself(runs):
    result = connect(runs[0], runs[0])
    assert set(result["barrier"].values()) == {0}
    assert result["distance"] == result["length"] == 0


def test_swapped_runs_give_the_same_curve_backwards(runs):
    there = connect(*runs)
    shutil.rmtree("outputs")
    back = connect(*reversed(runs))
    for one, other in zip(there["points"], reversed(back["points"]), strict=True):
        assert one["test/loss"] == pytest.approx(other["test/loss"], rel=1e-4)
        assert one["t"] == 1 - other["t"]
    for name, value in there["barrier"].items():
        assert back["barrier"][name] == pytest.approx(value, rel=1e-4, abs=1e-4)
    assert there["distance"] == back["distance"] > 0


def test_with_interpolated_statistics_the_ends_are_the_runs_own_networks(runs):
    result = connect(*runs, "--batch-norm", "interpolate")
    for run, point in zip(runs, (result["points"][0], result["points"][-1]), strict=True):
        summary = json.loads((run / "summary.json").read_text())
        assert point["test/error"] == pytest.approx(100 - summary["final/top1"])
        assert point["test/loss"] == pytest.approx(summary["final/loss"], rel=1e-5)


def test_statistics_matter_within_the_curve(runs):
    recomputed = connect(*runs)["points"][1]
    shutil.rmtree("outputs")
    assert connect(*runs, "--batch-norm", "interpolate")["points"][1]["train/loss"] != recomputed["train/loss"]


def test_the_runs_evaluation_batch_changes_no_statistics(runs, tmp_path):
    whole, small = connect(*runs), altered(runs[0], tmp_path, run=('"eval_batch_size": 500', '"eval_batch_size": 5'))
    shutil.rmtree("outputs")
    for one, other in zip(whole["points"], connect(small, runs[1])["points"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_the_same_command_reads_what_is_there_and_runs_stay_as_they_are(runs, monkeypatch, capsys):
    before = [contents(run) for run in runs]
    connect(*runs)
    first = capsys.readouterr().out.splitlines()
    assert [contents(run) for run in runs] == before
    monkeypatch.setattr(connection, "explore", None)  # not called
    connect(*runs)
    second = capsys.readouterr().out.splitlines()
    assert second[2].startswith("done already: ")
    assert second[:2] + second[3:] == first


def test_points_that_a_stopped_call_has_measured_are_taken_up(runs, monkeypatch):
    whole = connect(*runs)
    (result,) = Path("outputs").rglob("result.json")
    result.unlink()
    points = result.with_name("points.jsonl")
    points.write_text(points.read_text().splitlines()[0] + '\n{"t": 0.5, "tra')
    measured = []
    own = connection._Survey.measure
    monkeypatch.setattr(connection._Survey, "measure", lambda self, t: measured.append(t) or own(self, t))
    assert connect(*runs) == whole
    assert measured == [0.5, 1]


def test_bezier_leaves_its_middle_and_no_checkpoint(runs, capsys):
    bezier = ("--curve", "bezier", "--epochs", "2", "--batch-size", "16", "--lr", "0.01", "--limit-train-images", "all")
    result = connect(*runs, *bezier)
    assert result["length"] > result["distance"]
    (middle,) = Path("outputs").rglob("middle.safetensors")
    model = load_file(runs[0] / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in load_file(middle).items()}.items() <= {
        name: tuple(value.shape) for name, value in model.items()
    }.items()
    assert not list(Path("outputs").rglob("checkpoint*"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("curve ")] == ["1/2", "2/2"]
    assert "measured on                    48 training images without augmentation, all images of test" in lines


def test_zeros_of_sparse_runs_at_the_ends_and_in_the_middle(tmp_path):
    sparse = [make_run(tmp_path / "o", f"seed={seed}", "method=static", "method.sparsity=0.9") for seed in (0, 1)]
    zeros = connect(*sparse)["zeros"]
    assert zeros["start"] == zeros["end"] and zeros["start"] > 0.85
    # a weight of the middle is zero where both are: two independent masks of density 0.1 leave about 0.81
    assert 0.7 < zeros["middle"] < zeros["start"]


def test_an_output_folder_holds_one_analysis(runs, tmp_path):
    arguments = [*map(str, runs), *LINE, "--output", str(tmp_path / "here")]
    assert main(arguments) == 0 and (tmp_path / "here" / "result.json").exists()
    with pytest.raises(UserError, match="here holds another analysis"):
        main([*arguments, "--seed", "1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: RUN_B"),
        (("nowhere",), r"nowhere is not a run directory \(it has no run.json\)"),
        (("{b}", "--points", "2"), r"--points must lie in \[3, inf\), got 2"),
        (("{b}", "--curve", "cubic"), "argument --curve: invalid choice"),
        (("{b}", "--lr", "0.1"), "--lr goes with --curve bezier"),
        (("{b}", "--curve", "bezier", "--momentum", "1"), r"--momentum must lie in \[0, 1\), got 1"),
        (("{b}", "--curve", "bezier", "--lr", "nan"), "--lr must be a finite number"),
        (("{b}", "--curve", "bezier", "--batch-size", "49"), r"--batch-size must lie in \[1, 48\]"),
        (("{b}", "--batch-norm", "interpolate", "--batch-norm-images", "9"), "--batch-norm-images goes with"),
        (("{b}", "--limit-train-images", "few"), "--limit-train-images must be a whole number above 0, or all"),
        (("{b}", "--batch-norm-images", "1"), "--batch-norm-images must be a whole number above 1, or all, got 1"),
        (("{b}", "--batch-norm-images", ""), "--batch-norm-images must be a whole number above 1, .* got nothing"),
        (("{b}", "--data", "elsewhere"), "--data: the data set fake is not read from a folder"),
        (("{b}", "--device", "gpu"), "--device gpu is not allowed"),
        (("{b}", "--seed", "-1"), "--seed must lie in"),
        (("{b}", "--output", "{b}/curve"), "lies in the run directory"),
    ],
)
def test_wrong_arguments_are_one_line(runs, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        main([str(runs[0]), *(argument.format(b=runs[1]) for argument in arguments)])
    assert "\n" not in str(caught.value)
    assert not Path("outputs").exists()


def altered(source: Path, folder: Path, **changes: tuple[str, str]) -> Path:
    """Return a copy of the run `source` with a text in each of the JSON files named replaced."""
    copy = shutil.copytree(source, folder / "altered", symlinks=True)
    for name, (old, new) in changes.items():
        path = copy / f"{name}.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ('"width": 0.25', '"width": 0.5')}, "networks: model.width is 0.25 in .*, 0.5 in .*altered"),
        ({"model": ('"resnet20"', '"resnet32"')}, "different networks: model.name is resnet20 in "),
        ({"run": ('"image_size": 16', '"image_size": 32')}, "different data sets: image_size is 16 in "),
        ({"run": ('"content_seed": 0', '"content_seed": 1')}, "different data sets: content_seed is 0 in "),
        ({"run": ('"trainer"', '"trainers"')}, r"altered/run.json lacks options of the run \('trainer'\)"),
        ({"run": ('"content_seed"', '"old_seed"')}, "altered/run.json: unknown option dataset.old_seed"),
        ({"status": ('"finished"', '"running"')}, r"altered is not finished \(status: running\)"),
        ({"status": ('{', '[')}, "altered/status.json is not JSON"),
    ],
)
def test_runs_without_a_curve_between_them_are_named(runs, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        main([str(runs[0]), str(altered(runs[1], tmp_path, **changes)), *LINE])
    assert "\n" not in str(caught.value)


def test_a_run_without_its_network_is_named(runs, tmp_path):
    copy = altered(runs[1], tmp_path)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="altered holds no finished model"):
        main([str(runs[0]), str(copy)])


def test_data_at_two_places_need_the_option_and_missing_data_name_the_run(tmp_path):
    """The options of CIFAR-10 without its images."""
    node = {"name": "cifar10", "kind": "cifar", "archive": "cifar10", "root": "one", "cache_dir": "cache",
            "download": False, "image_size": 32, "num_classes": 10, "num_train": 50, "num_test": 10, "validation": 0.0,
            "validation_seed": 0, "augment": True, "crop_padding": 4, "flip": True, "mean": [0.5] * 3,
            "std": [0.2] * 3}  # fmt: skip
    run = make_run(tmp_path / "o")
    for name in ("a", "b"):
        options = json.loads((run / "run.json").read_text())
        options["config"]["dataset"] = node | {"root": name}
        copy = shutil.copytree(run, tmp_path / name, symlinks=True)
        (copy / "run.json").write_text(json.dumps(options))
    with pytest.raises(UserError, match="dataset.root is a in .*, b in .*; --data ROOT says which to read"):
        main([str(tmp_path / "a"), str(tmp_path / "b"), *LINE])
    with pytest.raises(UserError, match=r"the data of .*a \(--data ROOT names another place\): .*nothing-here"):
        main([str(tmp_path / "a"), str(tmp_path / "b"), *LINE, "--data", "nothing-here"])


def test_wrong_runs_are_found_without_torch(runs):
    code = (
        "import sys\nfrom prune_lab.commands.analysis import connect, hessian_projection\n"
        "for command in (connect, hessian_projection):\n"
        "    try: command.main([sys.argv[1], 'nowhere'])\n"
        "    except ValueError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code, str(runs[0])], cwd=root, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["nowhere is not a run directory (it has no run.json)"] * 2 + ["False"]
