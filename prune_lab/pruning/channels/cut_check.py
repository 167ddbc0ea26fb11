"""Whether a cut is right: the network without its channels against the masked one, in float64 with drawn weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prune_lab.foundations.errors import UserError
from prune_lab.foundations.lazy import no_grad, torch
from prune_lab.pruning.batch_norm.kind import is_norm
from prune_lab.pruning.channels.groups import ChannelMap
from prune_lab.pruning.channels.surgery import remove_channels

if TYPE_CHECKING:
    from torch import Tensor, nn

TOLERANCE = 1e-8
"""largest difference between masked and smaller network in float64, as a fraction of the largest output"""


@no_grad
def check_equal(model: nn.Module, channels: ChannelMap, alive: Tensor, image_size: int) -> float:
    """Return the largest difference between the masked and the smaller network, as a fraction of the values compared.

    Both are copies in float64 on the CPU with weights drawn anew, so that the answer depends on the architecture and on
    `alive` alone: what training left of a branch (gains near 0, dead activations) cannot hide a wrong cut, and rounding
    cannot make a right one look wrong. Compared are the outputs and what every layer that was cut makes of its inputs,
    so that a wrong cut shows where it is, whatever becomes of it later.

    Args:
        alive: bool [num_classes].
        image_size: height and width of the RGB images, px.

    Raises:
        UserError: they differ by more than TOLERANCE (the message names the first layer that does), the smaller
            network does not compute, or the network cannot compute in float64.
    """
    masked = copy.deepcopy(model).cpu().double().eval()  # not every device knows float64
    source = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, image_size, image_size, generator=source, dtype=torch.float64)
    _draw_parameters(masked, source)
    kind = type(model).__name__
    with _one_line(f"removing channels needs a check in float64, which {kind} does not compute"):
        with _measured_norms(masked, source):
            masked(images)
    small = remove_channels(masked, channels, alive)
    for name, mask in channels.weight_masks(alive, masked).items():
        masked.get_parameter(name).mul_(mask)
    places = channels.rows | channels.norms
    expected = _values(masked, places, images)
    with _one_line(f"{kind} does not compute without its dead channels; those of this architecture cannot be removed"):
        got = _values(small, places, images)
    kept = {path: channels.kept(classes, alive) for path, classes in places.items()}
    differences = {
        path: _difference(values, expected[path][kept[path]] if path in kept else expected[path])
        for path, values in got.items()
    }
    for path, difference in differences.items():
        if not difference <= TOLERANCE:  # also for NaN
            raise UserError(
                f"the network without its dead channels differs from the masked one by {difference:.3g} of the output "
                f"(allowed: {TOLERANCE:g}), first at {path}; the channels of this architecture cannot be removed"
            )
    return max(differences.values())


@contextmanager
def _one_line(refusal: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a foreign forward may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{refusal}: {reason}") from error


def _values(network: nn.Module, paths: Iterable[str], images: Tensor) -> dict[str, Tensor]:
    """Return the mean output per channel of the modules at `paths`, in the order of their work, and all outputs."""
    found: dict[str, Tensor] = {}

    def note(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        dim = -1 if isinstance(module, torch.nn.Linear) else 1
        found[names[module]] = output.movedim(dim, 0).flatten(1).mean(1)

    names = {network.get_submodule(path): path for path in paths}
    hooks = [module.register_forward_hook(note) for module in names]
    outputs = network(images)
    for hook in hooks:
        hook.remove()
    return found | {"its end": outputs}


def _draw_parameters(model: nn.Module, source: torch.Generator) -> None:
    """Draw all parameters so that every branch is open and values keep their size.

    Kernels and matrices: variance 1 / inputs. Vectors and single numbers (scales, biases, gains of branches): uniform
    in [0.5, 1.5], so that most activations are alive, also where maps have one position. Shifts of batch norms: half of
    that, because a constant that joins the values in every layer wears differences of early layers away.
    """
    shifts = {id(norm.bias) for norm in model.modules() if is_norm(norm)}
    for parameter in model.parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        if parameter.numel() == max(parameter.shape, default=1):
            parameter.uniform_(0.5, 1.5, generator=source).mul_(0.5 if id(parameter) in shifts else 1)
        else:
            bound = (3 * parameter.shape[0] / parameter.numel()) ** 0.5
            parameter.uniform_(-bound, bound, generator=source)


@contextmanager
def _measured_norms(model: nn.Module, source: torch.Generator) -> Iterator[None]:
    """Give batch norms, as they are reached, random statistics near those of all that they read.

    Mean and variance are taken over all channels at once: those of one channel may be of a single position, whose
    variance is 0 and would blow up rounding.
    """
    def measure(norm: Any, inputs: tuple[Any, ...]) -> None:
        if norm.running_mean is not None:
            variance, mean = torch.var_mean(inputs[0], correction=0)
            norm.running_mean.uniform_(-0.5, 0.5, generator=source).mul_(variance.sqrt()).add_(mean)
            norm.running_var.uniform_(0.5, 1.5, generator=source).mul_(variance)

    hooks = [norm.register_forward_pre_hook(measure) for norm in model.modules() if is_norm(norm)]
    yield
    for hook in hooks:
        hook.remove()


def _difference(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny))
