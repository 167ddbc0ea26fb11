"""Projection on sharp directions: the ratio by hand, eigenpairs of known operators, Hessians of small networks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from prune_lab.commands.analysis import projection
from prune_lab.commands.analysis.hessian_projection import main
from prune_lab.commands.analysis.projection import spread
from prune_lab.foundations.errors import UserError
from prune_lab.pruning.scores.hessian import flatten, hessian_product, unflatten
from prune_lab.pruning.scores.lanczos import Eigenpairs, largest, projection_ratio
from tests.helpers.analysis_runs import contents, make_run, only_result

FEW = ("--eigenvectors", "3", "--images", "24", "--iterations", "12", "--device", "cpu")


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the ratio -------------------------------------------------------------------------------------------------------


def test_ratio_by_hand_and_not_as_the_published_notebook_computes_it():
    axes = torch.eye(3)[:2]
    assert projection_ratio(axes, torch.tensor([3.0, 4.0, 12.0])) == pytest.approx(5 / 13, rel=1e-12)
    # The notebook sums |d|^2 once per eigenvector: 0.271964 for two of them.
    assert 5 / 13 / math.sqrt(2) == pytest.approx(0.271964, abs=1e-6)


def test_ratio_is_one_inside_and_zero_outside_the_space():
    axes = torch.eye(4)[:2]
    assert projection_ratio(axes, torch.tensor([0.6, -0.8, 0.0, 0.0])) == pytest.approx(1)
    assert projection_ratio(axes, torch.tensor([0.0, 0.0, 2.0, 1.0])) == 0


def test_random_directions_lie_about_the_printed_level():
    size, count, generator = 20_000, 10, source()
    drawn = [projection_ratio(torch.eye(count, size), torch.randn(size, generator=generator)) for _ in range(50)]
    assert sum(drawn) / len(drawn) == pytest.approx(math.sqrt(count / size), rel=0.1)


def test_spread_of_equal_weights_and_of_a_single_one():
    assert spread(torch.full((25,), -0.3)) == pytest.approx(1 / 5)
    assert spread(torch.tensor([0.0, 4.0, 0.0])) == 1


# --- eigenpairs ------------------------------------------------------------------------------------------------------


def pairs_of(matrix: Tensor, count: int, *, iterations: int = 100, tolerance: float = 1e-9) -> Eigenpairs:
    start = torch.randn(len(matrix), generator=source(), dtype=matrix.dtype)
    return largest(
        lambda vector: matrix @ vector, start, count, iterations=iterations, tolerance=tolerance, source=source(1)
    )


def rotated(eigenvalues: list[float]) -> Tensor:
    """Return a symmetric matrix with these eigenvalues."""
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=source(), dtype=torch.float64))
    return turn @ torch.diag(values) @ turn.T


def test_eigenpairs_of_a_known_quadratic():
    """The Hessian of sum_i h_i (w, q_i)^2 / 2 has the eigenvalues h."""
    matrix = rotated([9.0, 4.0, 1.0, *([0.01] * 40)])
    pairs = pairs_of(matrix, 3)
    torch.testing.assert_close(pairs.values, torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(pairs.vectors @ pairs.vectors.T, torch.eye(3, dtype=torch.float64))
    assert pairs.converged and pairs.num_products < 10


def test_residuals_are_those_of_the_pairs():
    matrix = rotated([3.0, 2.0, 1.0, *(index / 100 for index in range(90))])
    pairs = pairs_of(matrix, 3, iterations=12)
    true = (matrix @ pairs.vectors.T - pairs.vectors.T * pairs.values).norm(dim=0)
    torch.testing.assert_close(pairs.residuals, true, rtol=1e-6, atol=1e-12)
    assert not pairs.converged and pairs.num_products == 12


def test_negative_curvature_is_not_taken_for_sharpness():
    pairs = pairs_of(rotated([-100.0, 5.0, 3.0, 0.1, 0.2]), 2)
    torch.testing.assert_close(pairs.values, torch.tensor([5.0, 3.0], dtype=torch.float64))


def test_equal_eigenvalues_are_all_found():
    """A Krylov space holds one vector of each eigenspace; a new direction is drawn when it is exhausted."""
    for eigenvalues, count in (([5.0, 5.0, 5.0, 1.0, 0.0, 0.0], 4), ([5.0, 5.0, 1.0, 0.5, *([0.2] * 30)], 2)):
        pairs = pairs_of(rotated(eigenvalues), count)
        torch.testing.assert_close(pairs.values, torch.tensor(eigenvalues[:count], dtype=torch.float64))
        assert pairs.converged


def test_as_many_pairs_as_dimensions():
    pairs = pairs_of(torch.diag(torch.tensor([2.0, -1.0])), 2)
    torch.testing.assert_close(pairs.values, torch.tensor([2.0, -1.0], dtype=torch.float64))
    assert projection_ratio(pairs.vectors, torch.tensor([0.3, 0.4])) == pytest.approx(1)


def test_products_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="product 1 is not finite"):
        pairs_of(torch.full((3, 3), math.nan), 1)


# --- Hessians --------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Layers that behave differently in training: batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.norm(self.first(x)).tanh(), 0.5, self.training))


@pytest.fixture
def small() -> tuple[Small, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model, x, y = Small().double(), torch.randn(7, 3, dtype=torch.float64), torch.randint(0, 3, (7,))
    model(x)  # moves the running statistics
    return model, [(x[:5], y[:5]), (x[5:], y[5:])]


def whole_hessian(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the Hessian [n, n] of the mean loss in eval mode."""
    names, weights = zip(*model.named_parameters(), strict=True)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    model.eval()

    def loss(vector: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, dict(zip(names, unflatten(vector, weights), strict=True)), x), y)

    return torch.autograd.functional.hessian(loss, flatten(weights))


def test_products_are_those_of_the_whole_hessian_in_eval_mode(small):
    """The published code took them in training mode, where dropout and augmentation change from product to product."""
    model, data = small
    weights = list(model.parameters())
    size = sum(weight.numel() for weight in weights)
    model.train()
    columns = [hessian_product(model, weights, lambda: data, unit) for unit in torch.eye(size, dtype=torch.float64)]
    assert all(module.training for module in model.modules())
    assert all(weight.grad is None for weight in weights)
    torch.testing.assert_close(torch.stack(columns), whole_hessian(model, data))


def test_top_eigenvectors_of_a_network(small):
    model, data = small
    weights = list(model.parameters())
    exact = torch.linalg.eigh(whole_hessian(model, data))
    start = torch.randn(len(flatten(weights)), generator=source(), dtype=torch.float64)
    pairs = largest(
        lambda v: hessian_product(model, weights, lambda: data, v), start, 3,
        iterations=60, tolerance=1e-8, source=source(1),
    )  # fmt: skip
    torch.testing.assert_close(pairs.values, exact.eigenvalues.flip(0)[:3])
    cosines = (pairs.vectors * exact.eigenvectors.T.flip(0)[:3]).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64))


def test_a_parameter_without_effect_has_no_curvature(small):
    model, data = small
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    weights = list(model.parameters())
    product = hessian_product(model, weights, lambda: data, torch.ones(len(flatten(weights)), dtype=torch.float64))
    where = [index for index, weight in enumerate(weights) if weight is model.unused]
    assert bool((unflatten(product, weights)[where[0]] == 0).all()) and bool(product.any())


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """A dense and a sparse run from the same initial weights."""
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder, "method=dense"), make_run(folder, "method=static", "method.sparsity=0.9")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def project(*arguments: object) -> dict:
    assert main([*map(str, arguments), *FEW]) == 0
    return only_result(Path("outputs"))


def test_the_ratio_stands_beside_the_level_of_a_random_direction(runs, capsys):
    before = [contents(run) for run in runs]
    result = project(*runs)
    assert [contents(run) for run in runs] == before
    size = result["parameters"]
    assert result["random_level"] == pytest.approx(math.sqrt(3 / size))
    assert result["rho"] == pytest.approx(math.sqrt(sum(share**2 for share in result["cosines"])))
    assert len(result["random_rho"]) == 5 and max(result["random_rho"]) < 4 * result["random_level"]
    assert result["eigenvalues"] == sorted(result["eigenvalues"], reverse=True)
    assert result["spread"][1] > result["spread"][0]  # nine tenths of its weights are zero
    text = capsys.readouterr().out
    assert f"{result['random_level']:.4e} = sqrt(3 / {size})" in text
    assert f"rho = |P d| / |d|    {result['rho']:.4e}" in text


def test_the_same_command_reads_what_is_there(runs, monkeypatch, capsys):
    project(*runs)
    first = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(projection, "project", None)  # not called
    project(*runs)
    second = capsys.readouterr().out.splitlines()
    assert second[2].startswith("done already: ")
    assert second[3:] == [line for line in first[2:] if not line.startswith("product ")]


def test_pairs_that_have_not_converged_are_said_to_be(runs, capsys):
    project(*runs, "--tolerance", "1e-9")
    assert "NOT CONVERGED: raise --iterations (12 products)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{a}",), "hold the same network: nothing to project"),
        (("nowhere",), "nowhere is not a run directory"),
        (("{b}", "--eigenvectors", "0"), r"--eigenvectors must lie in \[1, inf\), got 0"),
        (("{b}", "--eigenvectors", "13", "--iterations", "12"), "must be at least --eigenvectors=13, got 12"),
        (("{b}", "--eigenvectors", "99999999", "--iterations", "99999999"), "--eigenvectors must lie in .1, "),
        (("{b}", "--images", "0"), "--images must lie in"),
        (("{b}", "--tolerance", "1"), r"--tolerance must lie in \(0, 1\), got 1"),
        (("{b}", "--random-directions", "0"), "--random-directions must lie in"),
        (("{b}", "--output", "{b}"), "lies in the run directory"),
    ],
)
def test_wrong_arguments_are_one_line(runs, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        main([str(runs[0]), *(argument.format(a=runs[0], b=runs[1]) for argument in arguments)])
    assert "\n" not in str(caught.value)
