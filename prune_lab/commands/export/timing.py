"""Latency of the dense and the pruned network in every runtime, measured in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.commands.export import agreement, sparse, tensor_cores
from prune_lab.commands.export.catalog import Runtime
from prune_lab.commands.export.latency import Ratio, interleaved, ratio, spread
from prune_lab.commands.export.runtimes import open_network

PYTORCH = "PyTorch"
SECONDS_PER_NETWORK = 10.0
"""time for one network in one runtime; if it does not suffice for all rounds, there are fewer"""
Samples = dict[tuple[str, str], list[float]]
"""(runtime, network) -> seconds per call, one per round"""


@dataclass(frozen=True)
class Timed:
    """A network with the folder that holds its files."""

    model: nn.Module
    folder: Path


@dataclass(frozen=True)
class Setting:
    """Duration and resources of a measurement."""

    batches: Sequence[int]
    rounds: int
    threads: int
    image_size: int
    tolerances: Mapping[str, float]
    """precision -> largest difference of a sparse form's outputs, relative to the scale of the reference"""


def measure(
    networks: Mapping[str, Timed], engines: Sequence[Runtime], setting: Setting, *,
    try_sparse: bool, try_kernels: bool, report: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Return rows of medians and ratios, and the outcome for sparse forms of the pruned network.

    Args:
        networks: "dense", and "pruned" if the run pruned anything.
        engines: runtimes besides PyTorch itself, with files in the folders.
        try_sparse: many weights of "pruned" are zero, and it has the dense network's shapes.
        try_kernels: layers of "pruned" are 2:4, and there is a GPU with kernels for them.
    """
    rows, tried, kernels = [], [], []
    for batch in setting.batches:
        images = torch.randn(batch, 3, setting.image_size, setting.image_size)
        candidate = _sparse(networks["pruned"].model, images, setting.tolerances["fp32"]) if try_sparse else None
        calls = _calls(networks, engines, images, setting.threads)
        if candidate is not None:
            calls[sparse.TITLE, "pruned"] = candidate[1]
        report(f"timing batches of {batch}, {len(calls)} networks in turn")
        with torch.inference_mode():
            samples = dict(zip(calls, _time(list(calls.values()), images, setting.rounds), strict=True))
        rows += [_row(title, batch, samples) for title in [PYTORCH, *(engine.title for engine in engines)]]
        if try_sparse:
            tried.append(_verdict(batch, samples, engines, candidate))
        if try_kernels:
            layers, row = _kernels(networks["pruned"].model, images, setting)
            kernels.append({"batch": batch, "layers": layers, "device": tensor_cores.device_name()})
            rows += row
    return {"rows": rows, "sparse": tried, "kernels": kernels}


def _kernels(model: nn.Module, images: Tensor, setting: Setting) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the layers that 2:4 kernels make faster, and the row of the GPU without and with them; empty if none."""
    on_device = tensor_cores.images_on_device
    dense, images = tensor_cores.on_device(model), on_device(images)
    layers = sparse.faster_layers(
        dense, images, can_be=tensor_cores.can_use_kernels, make=tensor_cores.SemiStructuredLayer,
        finished=tensor_cores.finished,
    )  # fmt: skip
    changed = sparse.replaced(dense, layers, tensor_cores.SemiStructuredLayer)
    tolerance, size = setting.tolerances["bf16"], images.shape[-1]
    if not layers or not _agrees(model, lambda x: changed(on_device(x)).cpu(), tolerance, size):
        return [], []
    with torch.inference_mode():
        times = _time([tensor_cores.finished(dense), tensor_cores.finished(changed)], images, setting.rounds)
    samples = dict(zip([(tensor_cores.TITLE, label) for label in ("dense", "pruned")], times, strict=True))
    return layers, [_row(tensor_cores.TITLE, len(images), samples)]


def _calls(
    networks: Mapping[str, Timed], engines: Sequence[Runtime], images: Tensor, threads: int
) -> dict[tuple[str, str], Callable[[Tensor], Tensor]]:
    calls: dict[tuple[str, str], Callable[[Tensor], Tensor]]
    calls = {(PYTORCH, label): network.model for label, network in networks.items()}
    for engine in engines:
        for label, network in networks.items():
            shape = tuple(images.shape)
            calls[engine.title, label] = open_network(engine, network.folder, threads=threads, shape=shape)
    return calls


def _time(runs: list[Callable[[Tensor], Tensor]], images: Tensor, rounds: int) -> list[list[float]]:
    calls = [lambda run=run: run(images) for run in runs]
    return interleaved(calls, rounds=rounds, seconds=SECONDS_PER_NETWORK * len(calls))


def _row(title: str, batch: int, samples: Samples) -> dict[str, Any]:
    own = {label: times for (runtime, label), times in samples.items() if runtime == title}
    last = own.get("pruned", own["dense"])
    row: dict[str, Any] = {"runtime": title, "batch": batch, "rounds": len(last)}
    for label, times in own.items():
        row[label] = _times(times)
    if "pruned" in own:
        row["by_pruning"] = _ratio(ratio(own["dense"], own["pruned"]))
    if title != PYTORCH and (PYTORCH, "dense") in samples:
        row["to_dense_pytorch"] = _ratio(ratio(samples[PYTORCH, "dense"], last))
    return row


def _times(times: Sequence[float]) -> dict[str, Any]:
    middle = spread(times)
    return {"median_s": middle.median, "quartiles_s": [middle.low, middle.high], "samples_s": list(times)}


def _ratio(found: Ratio) -> dict[str, Any]:
    return {**asdict(found), "is_difference": found.is_difference}


def _sparse(model: nn.Module, images: Tensor, tolerance: float) -> tuple[list[str], nn.Module] | None:
    """Return layers and network if computing without the zeros is faster in some layers, and correct."""
    layers = sparse.faster_layers(model, images)
    if not layers:
        return None
    changed = sparse.with_csr(model, layers)
    return (layers, changed) if _agrees(model, changed, tolerance, images.shape[-1]) else None


def _agrees(model: nn.Module, run: Callable[[Tensor], Tensor], tolerance: float, image_size: int) -> bool:
    """Return whether another form of `model` has the same outputs, on enough images to detect a difference."""
    reference = agreement.make_reference(model, image_size, batches=(8,))
    return agreement.compare(reference, run).within(tolerance)


def _verdict(
    batch: int, samples: Samples, engines: Sequence[Runtime], candidate: tuple[list[str], nn.Module] | None
) -> dict[str, Any]:
    """Return whether the sparse form is faster than the fastest fp32 runtime of the same network."""
    if candidate is None:
        return {"batch": batch, "layers": [], "is_faster": False}
    exact = [PYTORCH, *(engine.title for engine in engines if engine.precision == "fp32")]
    fastest = min(exact, key=lambda title: spread(samples[title, "pruned"]).median)
    times = samples[sparse.TITLE, "pruned"]
    found = ratio(samples[fastest, "pruned"], times)
    is_faster = found.is_difference and found.median > 1
    return {"batch": batch, "layers": candidate[0], "is_faster": is_faster, "against": fastest,
            **_times(times), "ratio": _ratio(found)}  # fmt: skip
