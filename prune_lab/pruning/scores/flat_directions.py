"""Group shrinkage that keeps to the flat directions of the loss: direction scores from the Hessian, and the projection.

With v = w_SGD, groups G and d = the gradient of sum_G s_G |w_G| at v, d_G = s_G v_G / |v_G|: the score of a group is
<v_G / |v_G|, (P0 d)_G>, P0 = I - E E^T, where the columns of E are the eigenvectors of the largest eigenvalues of the
Hessian. The penalty with these scores in place of s_G has the minimiser that `shrunk` returns.

Source: reconstruction. The unstructured score sign(v) (P0 sign(v)) of Chao et al. 2020, arXiv 2006.09358, with groups
in place of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_lab.accounting.network import Network
from prune_lab.foundations import distributed
from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import no_grad, torch
from prune_lab.optim.row_groups import RowGroups, as_rows
from prune_lab.pruning.scores.hessian import flatten, hessian_product, unflatten
from prune_lab.pruning.scores.lanczos import Eigenpairs, largest, projection_ratio

if TYPE_CHECKING:
    from torch import Tensor, nn

    Data = Callable[[], Iterator[tuple[Tensor, Tensor]]]
    """returns batches of images and labels, the same in every call"""

_TOLERANCE = 0.02
"""of the eigenvalues, relative"""

_REPORT_EVERY = 10
"""products"""

_PRODUCT_COST = 9
"""MACs of a Hessian-vector product over those of a forward pass: forward, backward, and backward through both"""


def directions(groups: RowGroups, weights: Sequence[Tensor], norms: Tensor, scales: Tensor) -> list[Tensor]:
    """Return d: s_G v_G / |v_G| in each group, 0 elsewhere and in groups that are zero.

    Args:
        weights: the tensors of `groups`.
        norms: |v_G| [groups].
        scales: s_G [groups].
    """
    factors = groups.spread(torch.where(norms > 0, scales / norms, 0.0), outside=0.0)
    return [weight * as_rows(factor, weight) for weight, factor in zip(weights, factors, strict=True)]


def direction_scores(
    groups: RowGroups, weights: Sequence[Tensor], norms: Tensor, projected: Sequence[Tensor]
) -> Tensor:
    """Return <v_G / |v_G|, (P0 d)_G> [groups]; 0 for groups that are zero.

    Args:
        projected: P0 d, tensors like `weights`.
    """
    products = [(weight * part).flatten(1).sum(1) if weight.dim() > 1 else weight * part
                for weight, part in zip(weights, projected, strict=True)]
    return torch.where(norms > 0, groups.sums(products) / norms, 0.0)


def shrunk(norms: Tensor, scores: Tensor, strength: float) -> Tensor:
    """Return the factor of each group in argmin 1/2 |v - w|^2 + strength sum_G scores_G |w_G| [groups].

    A positive score shrinks, to zero at the least; a negative one pushes outward.
    """
    return torch.where(norms > 0, 1 - strength * scores / norms, 0.0).clamp(min=0)


def order(norms: Tensor, scores: Tensor) -> Tensor:
    """Return the groups' ranking, -scores_G / |v_G| in float64 [groups]: the lowest become zero first."""
    return torch.where(norms > 0, -scores.double() / norms, -torch.inf)


def strength(norms: Tensor, scores: Tensor, gone: Tensor) -> float:
    """Return the smallest strength that zeroes those of the groups `gone` that shrink at all; 0: none does.

    Args:
        gone: groups to zero, bool [groups].
    """
    reached = gone & (scores > 0)
    return float((norms[reached] / scores[reached]).max()) if bool(reached.any()) else 0.0


@dataclass(frozen=True)
class Flatness:
    """Which groups lie in flat directions at the weights of a network."""

    norms: Tensor
    """|v_G| [groups]"""
    scores: Tensor
    """[groups]"""
    sharp: float
    """|E^T d| / |d|: the part of d in the sharpest directions"""
    by_chance: float
    """the same for a random direction: sqrt(k / parameters)"""
    pairs: Eigenpairs
    macs: int
    """spent on the products"""


def measure(
    network: Network,
    rows: Mapping[nn.Parameter, Tensor],
    scales: Tensor,
    data: Data,
    *,
    eigenvectors: int,
    num_images: int,
    generator: Callable[[str], torch.Generator],
    report: Callable[[str], None],
    validating: bool = False,
) -> Flatness:
    """Return the direction scores of a network.

    The Hessian is that of the mean loss over training images without augmentation, in evaluation mode, by all trainable
    parameters.

    Args:
        rows: parameter -> group of each of its rows, int64; -1: in none.
        scales: s_G [groups].
        data: returns the images of the Hessian and their labels, in batches, the same in every call.
        eigenvectors: k, the number of largest eigenvalues that count as not flat.
        num_images: number of images in `data`.
        generator: returns the random generator of a key.
        validating: one product checks that the shapes fit; the result is discarded.

    Raises:
        UserError: more eigenvectors than parameters, no second derivatives, or a loss that is not finite.
    """
    trained = [parameter for parameter in network.model.parameters() if parameter.requires_grad]
    size = sum(parameter.numel() for parameter in trained)
    if eigenvectors > size:
        raise UserError(f"method.eigenvectors must lie in [1, {size}] (trainable parameters), got {eigenvectors}")
    grouped = [parameter for parameter in trained if parameter in rows]
    groups = RowGroups([rows[parameter] for parameter in grouped], len(scales)).to(network.device)
    values, scales = [parameter.detach() for parameter in grouped], scales.to(network.device)
    norms = groups.norms(values)
    own = dict(zip(grouped, directions(groups, values, norms, scales), strict=True))
    d = flatten([own.get(parameter, torch.zeros_like(parameter)) for parameter in trained])
    pairs = _sharpest(
        network.model, trained, data, eigenvectors, generator=generator, report=report, validating=validating
    )
    flat = d - pairs.vectors.T @ (pairs.vectors @ d)
    projected = dict(zip(trained, unflatten(flat, trained), strict=True))
    scores = direction_scores(groups, values, norms, [projected[parameter] for parameter in grouped])
    norms, scores = distributed.share((norms.cpu(), scores.cpu()))  # processes may round differently
    cost = pairs.num_products * num_images * _PRODUCT_COST * network.dense_macs
    share = projection_ratio(pairs.vectors, d)
    return Flatness(norms, scores, share, (eigenvectors / size) ** 0.5, pairs, cost)


def most_products(eigenvectors: int) -> int:
    """Return the maximum number of Hessian-vector products."""
    return 20 + 3 * eigenvectors


def _sharpest(
    model: nn.Module,
    weights: Sequence[nn.Parameter],
    data: Data,
    count: int,
    *,
    generator: Callable[[str], torch.Generator],
    report: Callable[[str], None],
    validating: bool,
) -> Eigenpairs:
    """Return the eigenpairs of the largest eigenvalues; a validation run only checks the shapes with one product."""

    def show(done: int, values: Tensor, residuals: Tensor) -> None:
        if done % _REPORT_EVERY == 0:
            report(f"Hessian: product {done} of {most_products(count)} at most, largest eigenvalue "
                   f"{float(values[0]):.4g}, largest residual {float(residuals.max()):.2g}")

    size = sum(weight.numel() for weight in weights)
    return largest(
        lambda vector: hessian_product(model, weights, data, vector),
        torch.randn(size, generator=generator("start vector")).to(weights[0]),
        1 if validating else count,
        iterations=1 if validating else most_products(count),
        tolerance=_TOLERANCE,
        source=generator("restarts"),
        report=show,
    )


@no_grad
def shrink(model: nn.Module, rows: Mapping[nn.Parameter, Tensor], found: Flatness, strength: float) -> None:
    """Multiply the groups of `model` by the factors of the minimiser.

    A group that would be zero keeps its weights. It is removed, or kept although it is among the smallest, because a
    budget has room for it or its layer needs it.
    """
    factors = shrunk(found.norms, found.scores, strength)
    factors = torch.where(factors > 0, factors, 1.0).to(next(model.parameters()).device)
    groups = RowGroups(list(rows.values()), len(factors)).to(factors.device)
    for parameter, factor in zip(rows, groups.spread(factors, outside=1.0), strict=True):
        parameter.mul_(as_rows(factor, parameter))
