"""Where leaving zeros out pays on a CPU: each layer as CSR over the same layer dense, for real shapes and sparsities.

    python scripts/benchmarks/sparse_inference.py           ResNet-50 at 224 px, VGG16's linear layers; ten minutes
    python scripts/benchmarks/sparse_inference.py --quick   one layer of each kind

A cell is time of CSR / time of the dense layer in PyTorch fp32 (below 1: CSR is faster), the median of rounds in which
all forms of a layer take turns; ~ marks a first look at what takes several times as long. The last row is the sum over
ResNet-50's layers, each in its faster form. Threads are PyTorch's; set OMP_NUM_THREADS for others. `prune-lab export`
measures the same on the network of a run, against other runtimes too.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from prune_lab import models
from prune_lab.accounting import eligibility
from prune_lab.commands.compare.formats import markdown
from prune_lab.commands.export.latency import MIN_ROUNDS, interleaved, roughly
from prune_lab.commands.export.machine import machine
from prune_lab.commands.export.sparse import CsrLayer
from prune_lab.pruning.masks import semi_structured, top_k

SPARSITIES = {"2:4": 0.5, "0.9": 0.9, "0.95": 0.95, "0.98": 0.98, "0.99": 0.99}
_HOPELESS = 4.0
"""times as slow in a first look: not timed any further"""
_IMAGE_SIZE = 224
_VGG16 = ((25088, 4096), (4096, 4096), (4096, 1000))


@dataclass(frozen=True)
class Kind:
    """One of a network's layers, or several that are alike."""

    layer: nn.Module
    shape: tuple[int, ...]
    """of its input, without the batch"""
    count: int = 1


@dataclass(frozen=True)
class Timed:
    """One kind of layer in all forms."""

    dense_s: float
    ratios: dict[str, float]
    """sparsity -> time of CSR / time of the dense layer"""
    in_turn: set[str]
    """the sparsities that were timed in turn with the dense layer, not in a first look"""

    def cell(self, label: str) -> str:
        if label not in self.ratios:
            return "-"
        return f"{self.ratios[label]:.2f}" if label in self.in_turn else f"~{self.ratios[label]:.0f}"


def main() -> None:
    options = _arguments()
    print(", ".join(f"{key} {value}" for key, value in machine(torch.get_num_threads()).items()))
    resnet = resnet50_layers()
    vgg = {f"VGG16 linear {i} -> {o}": Kind(nn.Linear(i, o), (i,)) for i, o in _VGG16}
    for batch in options.batch:
        rows, found = [], {}
        for name, kind in (quick(resnet | vgg) if options.quick else resnet | vgg).items():
            found[name] = measure(kind.layer, torch.randn(batch, *kind.shape), options.rounds)
            rows.append([name, *map(found[name].cell, SPARSITIES)])
            print(f"  {' | '.join(rows[-1])}", flush=True)
        if not options.quick:
            rows.append(_sum_row("ResNet-50, CSR where it is faster", resnet, found))
        print("\n" + markdown([f"CSR / dense, batch {batch}", *SPARSITIES], rows))


def _sum_row(title: str, kinds: dict[str, Kind], found: dict[str, Timed]) -> list[str]:
    """Return the time of all layers of a network, each in its faster form, over that of its dense layers."""
    dense = sum(kind.count * found[name].dense_s for name, kind in kinds.items())
    cells = []
    for label in SPARSITIES:
        best = {name: min(found[name].ratios.get(label, 1.0), 1.0) * found[name].dense_s for name in kinds}
        cells.append(f"{sum(kind.count * best[name] for name, kind in kinds.items()) / dense:.2f}")
    return [title, *cells]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="images per call (default: 1 16)")
    parser.add_argument("--rounds", type=int, default=15, help=f"at least {MIN_ROUNDS} (default: 15)")
    parser.add_argument("--quick", action="store_true", help="one layer of each kind instead of all shapes")
    options = parser.parse_args()
    if options.rounds < MIN_ROUNDS or min(options.batch) < 1:
        parser.error(f"--rounds must be {MIN_ROUNDS} or more, --batch 1 or more")
    return options


def resnet50_layers() -> dict[str, Kind]:
    """Return the layers of ResNet-50 by what they are."""
    config = models.parse_config({"name": "resnet50", "weights": None, "width": 1.0})
    model = models.build_on_meta(config, num_classes=1000, image_size=_IMAGE_SIZE).eval()
    found: dict[str, Kind] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        shape = tuple(inputs[0].shape[1:])
        name = _name(layer, shape)
        known = found.get(name, Kind(_copy(layer), shape, count=0))
        found[name] = replace(known, count=known.count + 1)

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(note)
    model(torch.empty(1, 3, _IMAGE_SIZE, _IMAGE_SIZE, device="meta"))
    return found


def _name(layer: nn.Module, shape: tuple[int, ...]) -> str:
    if isinstance(layer, nn.Linear):
        return f"linear {layer.in_features} -> {layer.out_features}"
    size, stride = layer.kernel_size[0], layer.stride[0]
    at = f"at {shape[1]} px" + (f", stride {stride}" if stride > 1 else "")
    return f"{size}x{size} {layer.in_channels} -> {layer.out_channels} {at}"


def _copy(layer: nn.Module) -> nn.Module:
    """Return a layer like `layer`, which has no memory, with weights."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features)
    sizes = layer.in_channels, layer.out_channels, layer.kernel_size
    return nn.Conv2d(*sizes, stride=layer.stride, padding=layer.padding, bias=layer.bias is not None)


def quick(layers: dict[str, Kind]) -> dict[str, Kind]:
    """Return the first 1x1, 3x3 and linear layer of each image size."""
    first: dict[tuple, str] = {}
    for name, kind in layers.items():
        first.setdefault((name.split()[0], kind.shape[1:]), name)
    return {name: layers[name] for name in first.values()}


def pruned(layer: nn.Module, label: str) -> nn.Module | None:
    """Return a copy of `layer` with zeros at random, None if its channels do not come in fours."""
    other, num_keep = _copy(layer), round(layer.weight.numel() * (1 - SPARSITIES[label]))
    if label == "2:4" and not eligibility.has_groups(tuple(layer.weight.shape)):
        return None
    rule = semi_structured if label == "2:4" else top_k
    with torch.no_grad():
        other.weight.mul_(rule.keep_top(torch.rand(layer.weight.shape), num_keep))
    return other


@torch.inference_mode()
def measure(layer: nn.Module, x: Tensor, rounds: int) -> Timed:
    """Return the times of `layer` on `x`, dense and without its zeros."""
    forms = {label: CsrLayer(form) for label in SPARSITIES if (form := pruned(layer, label)) is not None}
    dense_s = roughly(lambda: layer(x))
    found = {label: roughly(lambda form=form: form(x)) / dense_s for label, form in forms.items()}
    close = [label for label in forms if found[label] <= _HOPELESS]
    calls = [lambda form=form: form(x) for form in (layer, *(forms[label] for label in close))]
    dense, *others = interleaved(calls, rounds=rounds, seconds=30.0)
    for label, times in zip(close, others, strict=True):
        found[label] = statistics.median(time / other for time, other in zip(times, dense, strict=True))
    return Timed(statistics.median(dense), found, set(close))


if __name__ == "__main__":
    main()
